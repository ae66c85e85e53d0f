"""A function of tensors with places of their own that is run again and again: on a GPU as one captured graph."""

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

_WARM_UP_CALLS = 3  # torch asks for calls on a side stream before a capture: libraries allocate and choose there
Result = TypeVar("Result")


class Replay(Generic[Result]):
    """Calls `function`, or replays what it did when it was captured.

    Args:
        function: takes nothing, reads tensors that stay where they are, returns new ones. Under a graph its results
            lie in the same memory at every call.

    Attributes:
        result: of the latest call.
        captured: whether a graph replays it.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self.result: Result | None = None

    @property
    def captured(self) -> bool:
        """Whether a graph replays it."""
        return self._graph is not None

    def capture(self, pool: Any) -> None:
        """Capture it on the current CUDA device; `pool` is the memory that the graphs of one plan share.

        Raises RuntimeError where an operation cannot be captured (one that waits for the device, for example).
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                self._function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            if not torch.cuda.is_current_stream_capturing():
                raise RuntimeError("the stream is not capturing")
            self.result = self._function()
        self._graph = graph

    def __call__(self) -> Result:
        """Run it on what its inputs hold now."""
        if self._graph is None:
            self.result = self._function()
        else:
            self._graph.replay()
        if self.result is None:
            raise RuntimeError("the function returned nothing")
        return self.result
