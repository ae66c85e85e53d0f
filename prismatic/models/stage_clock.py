"""How long the stages of one call take, without waiting for a GPU between them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

STAGES = ("vision", "pruner", "llm")


class StageClock:
    """Belongs to one call, so that calls of several threads do not disturb each other.

    A stage that begins inside another one (a pruner inside the vision backbone or the language model) interrupts it,
    so that no time counts twice. A stage that is entered several times, as under diffusion, adds up.

    Args:
        device: of the model. On a CUDA device stages are told apart by events in its stream, which nobody waits for
            before `seconds` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._current: str | None = None
        self._names: list[str | None] = []
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside as this stage's."""
        interrupted = self._current
        self._mark(name)
        try:
            yield
        finally:
            self._mark(interrupted)

    def _mark(self, name: str | None) -> None:
        self._current = name
        self._names.append(name)
        if self._stream is None:
            self._times.append(time.perf_counter())
        else:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record(self._stream)

    def seconds(self) -> dict[str, float]:
        """By stage; 0 for one that did not run. On a GPU this waits until the last stage has ended."""
        total = dict.fromkeys(STAGES, 0.0)
        if self._events:
            self._events[-1].synchronize()
        lasted = [end - begin for begin, end in pairwise(self._times)]
        lasted += [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self._events)]
        for name, seconds in zip(self._names, lasted, strict=False):
            if name is not None:
                total[name] += seconds
        return total
