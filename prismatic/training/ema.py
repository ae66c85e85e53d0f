"""An exponential moving average of the trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from prismatic.training.parallel.shards import own_part, part_like
from prismatic.training.schedules import ema_momentum


class WeightAverage:
    """Averages `parameters` over the steps. What it holds is what is validated and saved.

    Args:
        parameters: name -> trained parameter.
        decay: weight of the past; the momentum warms up as `min(decay, step / (step + 20))`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self._live: list[torch.Tensor] = list(parameters.values())
        self._names = list(parameters)
        self._average = [parameter.detach().clone() for parameter in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after finished step `step` (1, 2, ...)."""
        torch._foreach_lerp_(self._average, self._live, 1.0 - ema_momentum(step, self.decay))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the average; afterwards their own values again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Give the parameters the average, and the average the parameters' values."""
        for place, (parameter, average) in enumerate(zip(self._live, self._average, strict=True)):
            if (mine := own_part(parameter)) is parameter:
                self._average[place], parameter.data = parameter.data, average
            else:  # FSDP gathers from that memory, so the values move
                others = own_part(average)
                kept = mine.clone()
                mine.copy_(others)
                others.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """name -> averaged tensor, itself."""
        return dict(zip(self._names, self._average, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state_dict()`'s answer."""
        for name, tensor in zip(self._names, self._average, strict=True):
            tensor.copy_(part_like(state[name], tensor))
