"""How long the stages of one call take, without waiting for a GPU between them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        self._marks: list[tuple[str | None, float | torch.cuda.Event]] = []

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
        if self._stream is None:
            self._marks.append((name, time.perf_counter()))
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """By stage; 0 for one that did not run. On a GPU this waits until the last stage has ended."""
        total = dict.fromkeys(STAGES, 0.0)
        if self._stream is not None and self._marks:
            self._marks[-1][1].synchronize()  # type: ignore[union-attr]
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                total[name] += _between(begin, end)
        return total


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    return begin.elapsed_time(end) / 1e3  # type: ignore[union-attr, arg-type]
