"""Several datasets as one: which share each has of the samples, and in which order their frames come."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prismatic.vla.datasets.dataset import FrameDataset, FramePlace
from prismatic.vla.datasets.sampler import SampleRequest

_EPOCH_STREAM, _FRAME_STREAM = 5, 6  # apart from the random numbers of images, states, noise and heads

MIXTURES: dict[str, str] = {
    "libero_4_task_suites_no_noops": (
        "libero_spatial_no_noops+libero_object_no_noops+libero_goal_no_noops+libero_10_no_noops"
    )
}
"""Published name -> what it mixes."""


def parse_mixture(name: str) -> dict[str, float]:
    """`name`, `name+name:weight` or a name of `MIXTURES` -> the weight of each dataset, in order.

    A weight that is not given is 1. Raises ValueError for a weight that is no positive number, a missing name, and a
    dataset that is named twice.
    """
    weights: dict[str, float] = {}
    for part in name.split("+"):
        single, colon, text = part.partition(":")
        try:
            weight = float(text) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not re.fullmatch(r"[\w.-]+", single) or not 0 < weight < math.inf:
            raise ValueError(
                f"--dataset_name {name!r}: {part!r} is no dataset; expected a name, or several as "
                "name+name:weight with positive weights"
            )
        inside = parse_mixture(MIXTURES[single]) if single in MIXTURES else {single: 1.0}
        for dataset, share in inside.items():
            if dataset in weights:
                raise ValueError(f"--dataset_name {name!r} names {dataset!r} twice; give it one weight instead")
            weights[dataset] = share * weight
    return weights


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order.

    Attributes:
        number: of the epoch.
        dataset: (N,) which dataset each position takes a frame of.
        turn: (N,) how often that dataset had its turn before in this epoch.
    """

    number: int
    dataset: np.ndarray
    turn: np.ndarray


class MixtureOrder:
    """The order of a mixture's samples as a pure function of (seed, position).

    An epoch takes round(weight x frames), at least one, samples of each dataset, in an order shuffled anew; so shares
    are exact over every epoch. Each dataset goes through all of its frames in a random order before any comes again,
    from one epoch into the next.
    """

    def __init__(self, frames: Sequence[int], weights: Sequence[float], seed: int = 0):
        """Args:
        frames: how many each dataset has, at least one.
        weights: how often an epoch takes each frame of a dataset, on average.
        seed: of the order.
        """
        self.frames = list(frames)
        self.draws = [max(round(count * weight), 1) for count, weight in zip(frames, weights, strict=True)]
        self.seed = seed
        self._first = np.cumsum([0, *self.frames]).tolist()
        self._epoch = _Epoch(-1, np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._rounds: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        """Samples of one epoch."""
        return sum(self.draws)

    def dataset_and_frame(self, position: int) -> tuple[int, int]:
        """Number of the dataset, and which of its frames, at a position of the run."""
        number, offset = divmod(position, len(self))
        if self._epoch.number != number:
            self._epoch = self._shuffled(number)
        dataset = int(self._epoch.dataset[offset])
        turn = number * self.draws[dataset] + int(self._epoch.turn[offset])
        rounds, place = divmod(turn, self.frames[dataset])
        if self._rounds.get(dataset, (-1,))[0] != rounds:
            rng = np.random.default_rng([self.seed, rounds, _FRAME_STREAM, dataset])
            self._rounds[dataset] = rounds, rng.permutation(self.frames[dataset])
        return dataset, int(self._rounds[dataset][1][place])

    def __call__(self, position: int) -> int:
        """The frame at a position, counted through all datasets one behind the other."""
        dataset, frame = self.dataset_and_frame(position)
        return self._first[dataset] + frame

    def _shuffled(self, number: int) -> _Epoch:
        datasets = np.repeat(np.arange(len(self.draws)), self.draws)
        datasets = datasets[np.random.default_rng([self.seed, number, _EPOCH_STREAM]).permutation(len(datasets))]
        turns = np.zeros(len(datasets), np.int64)
        for dataset, draws in enumerate(self.draws):
            turns[datasets == dataset] = np.arange(draws)
        return _Epoch(number, datasets, turns)


class FrameMixture(torch.utils.data.Dataset[dict[str, Any]]):
    """The frames of several datasets, one behind the other. Each sample is scaled by its own dataset's statistics."""

    def __init__(self, parts: Sequence[FrameDataset]):
        """Args:
        parts: datasets of one robot, at least one.
        """
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])

    @property
    def pad_token_id(self) -> int:
        """Fills short prompts of a batch."""
        return self.parts[0].pad_token_id

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, index: int) -> FramePlace:
        """Where the frame of that number is; no picture is read."""
        part, frame = self._part_and_frame(index)
        return part.place(frame)

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        """As of the dataset that the frame is in; what is random about it depends on (seed, position) alone."""
        part, frame = self._part_and_frame(request.index)
        return part[SampleRequest(request.position, frame)]

    def _part_and_frame(self, index: int) -> tuple[FrameDataset, int]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[place], index - (int(self._ends[place - 1]) if place else 0)
