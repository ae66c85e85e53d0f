"""The order of training samples as a pure function of (seed, epoch, position): global, shardable, resumable."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

_ORDER_STREAM = 1  # keeps the order's random numbers apart from those drawn per sample from (seed, position)


@dataclass(frozen=True)
class SampleRequest:
    """What a sampler asks a dataset for.

    Attributes:
        position: number of the sample in the whole training run; seeds everything random about it.
        index: frame of the dataset.
    """

    position: int
    index: int


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_frames: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, _ORDER_STREAM]).permutation(num_frames)


def index_at(seed: int, position: int, num_frames: int) -> int:
    """The frame at a position of the run: every epoch visits every frame once, in an order of its own."""
    epoch, offset = divmod(position, num_frames)
    return int(_order(seed, epoch, num_frames)[offset])


class GlobalBatchSampler(Sampler[list[SampleRequest]]):
    """Endless batches of one rank; use as `batch_sampler` of a `DataLoader`.

    Step s of W ranks with batches of B takes the positions start_position + s*B*W + r*B + k, so all ranks together see
    what a single one with batches of B*W would see.
    """

    def __init__(
        self,
        num_frames: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_position: int = 0,
        frame_at: Callable[[int], int] | None = None,
    ):
        """Args:
        num_frames: frames of the dataset.
        batch_size: samples per rank and step.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
        start_position: samples that all ranks together have seen before (of an earlier run).
        frame_at: the frame at a position of the run; by default the order of `index_at`.
        """
        if num_frames < 1 or batch_size < 1:
            raise ValueError(f"num_frames and batch_size must be positive, not {num_frames} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1} for world_size {world_size}, not {rank}")
        if seed < 0 or start_position < 0:
            raise ValueError(f"seed and start_position may not be negative, but are {seed} and {start_position}")
        self.num_frames = num_frames
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_position = start_position
        self.frame_at = frame_at or functools.partial(index_at, seed, num_frames=num_frames)

    def batch(self, step: int) -> list[SampleRequest]:
        """The requests of one step, counted from the start position."""
        first = self.start_position + (step * self.world_size + self.rank) * self.batch_size
        positions = range(first, first + self.batch_size)
        return [SampleRequest(position, self.frame_at(position)) for position in positions]

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1
