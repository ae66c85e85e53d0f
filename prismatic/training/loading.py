"""Batches of a run, read by worker processes, with another frame in place of one whose picture cannot be decoded."""

import logging
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from prismatic.training.data import Frames
from prismatic.training.distributed import Ranks
from prismatic.training.preemption import ignore_signals
from prismatic.vla.datasets.collate import collate
from prismatic.vla.datasets.sampler import SampleRequest
from prismatic.vla.datasets.stored.episode import UnreadableImage

if TYPE_CHECKING:
    from prismatic.training.build import Run

log = logging.getLogger(__name__)

PREFETCH = 4
"""Batches that each worker holds ready."""
ATTEMPTS = 20
"""Frames tried for one sample: where half of all pictures are bad, one sample in a million finds none."""

_SUBSTITUTE_STREAM = 7  # apart from the random numbers of order, images, states, noise, heads and mixtures


class TooManyBadSamples(UnreadableImage):
    """More pictures than `--max_bad_samples` cannot be decoded; all processes raise it at the same step."""


class BadSamples:
    """The stored pictures that any process could not decode since the run was started or resumed."""

    def __init__(self, limit: int, ranks: Ranks):
        """Args:
        limit: how many different ones a run may meet.
        ranks: the processes that count together.
        """
        self.limit = limit
        self._ranks = ranks
        self._told: dict[str, None] = {}
        self._new: list[str] = []

    def __len__(self) -> int:
        """Different ones, all processes together, as of the last `settle`."""
        return len(self._told)

    @property
    def are_new(self) -> bool:
        """Whether this process has met some since the last `settle`."""
        return bool(self._new)

    def meet(self, messages: Iterable[str]) -> None:
        """Take in what was said of the pictures of one batch. Known ones, as every epoch brings, do not count again."""
        self._new += [message for message in messages if message not in self._told]

    def settle(self) -> None:
        """Name each new one once in the log, and count it; every process must call it.

        Raises:
            TooManyBadSamples: in every process alike.
        """
        for message in chain.from_iterable(self._ranks.gather(self._new)):
            if message not in self._told:
                self._told[message] = None
                log.warning("another frame takes the place of one that cannot be read: %s", message)
        self._new = []
        if len(self._told) > self.limit:
            others = (
                f"{len(self._told)} stored pictures cannot be decoded, the last one: " if len(self._told) > 1 else ""
            )
            raise TooManyBadSamples(f"{others}{list(self._told)[-1]} (--max_bad_samples {self.limit})")


def substitute(seed: int, position: int, attempt: int, num_frames: int) -> int:
    """The frame that is tried after `attempt` (1, 2, ...) others at a position of the run could not be read."""
    return int(np.random.default_rng([seed, position, _SUBSTITUTE_STREAM, attempt]).integers(num_frames))


class ReadableFrames(torch.utils.data.Dataset[Any]):
    """Frames; where one cannot be read, another one has its position, so that nothing else of the order changes."""

    def __init__(self, frames: Frames, seed: int):
        self.frames = frames
        self.seed = seed

    def __getitem__(self, request: SampleRequest) -> dict[str, Any] | UnreadableImage:
        """The sample, with the number of its frame (`index`) and what is said of those not readable (`unreadable`).

        Where none is found in `ATTEMPTS` the error itself: raised in a worker it would become a traceback.
        """
        unreadable: list[str] = []
        index = request.index
        for attempt in range(1, ATTEMPTS + 1):
            try:
                sample = self.frames[SampleRequest(request.position, index)]
            except UnreadableImage as error:
                unreadable.append(str(error))
                index = substitute(self.seed, request.position, attempt, len(self.frames))
            else:
                return {**sample, "index": index, "unreadable": unreadable}
        return UnreadableImage(
            f"none of {ATTEMPTS} frames drawn one after another can be read, the last: {unreadable[-1]}"
        )


def train_batches(run: "Run") -> Generator[dict[str, Any], None, None]:
    """Endless collated batches of this process, from the position at which the run stands."""
    ranks = run.ranks
    sampler = run.data.sampler(run.train_data, ranks.rank, ranks.world_size, run.training.position)
    return _batches(run, run.train_data, sampler)


def val_batches(run: "Run", data: Frames) -> tuple[Iterator[dict[str, Any]], int]:
    """Every held-out frame once, dealt to the processes in a fixed shuffled order: a part of it is representative.

    Returns:
        This process's batches, and how many there are. Where processes share the weights, so that each needs the
        others in every pass, as many stand-ins follow as the one with most batches has more; they do not count.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(run.config.seed)).tolist()
    requests = [SampleRequest(position, index) for position, index in enumerate(order)]
    mine = requests[run.ranks.rank :: run.ranks.world_size]
    size = run.config.batch_size
    own = [mine[first : first + size] for first in range(0, len(mine), size)]
    shared = run.config.sharding != "none"
    stand_ins = [requests[:1]] * (num_val_batches(run, data) - len(own) if shared else 0)
    return _batches(run, data, own + stand_ins), len(own)


def num_val_batches(run: "Run", data: Frames) -> int:
    """Batches of the process that has most of them."""
    most = -(-len(data) // run.ranks.world_size)
    return -(-most // run.config.batch_size)


def _collate_readable(samples: list[Any], pad_token_id: int) -> dict[str, Any] | UnreadableImage:
    for sample in samples:
        if isinstance(sample, UnreadableImage):
            return sample
    told = {"unreadable": [message for sample in samples for message in sample["unreadable"]]}
    return collate(samples, pad_token_id) | {"indices": [sample["index"] for sample in samples]} | told


def _batches(
    run: "Run", data: Frames, requests: Iterable[list[SampleRequest]]
) -> Generator[dict[str, Any], None, None]:
    """Collated batches, with the numbers of their frames (`indices`); `run.bad_samples` hears of those left out.

    Raises UnreadableImage in the place of a batch that cannot be filled.
    """
    for batch in _loader(run, data, requests):
        if isinstance(batch, UnreadableImage):
            raise batch
        run.bad_samples.meet(batch.pop("unreadable"))
        yield batch


def _loader(run: "Run", data: Frames, batches: Iterable[list[SampleRequest]]) -> DataLoader[Any]:
    workers = run.config.num_workers
    return DataLoader(
        ReadableFrames(data, run.config.seed),
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=partial(_collate_readable, pad_token_id=data.pad_token_id),
        pin_memory=run.ranks.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
