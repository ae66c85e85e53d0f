"""The data of a run: one dataset or a mixture, opened and checked before any weights are loaded."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from prismatic.command_line import speaks_for_node
from prismatic.training.config import FinetuneConfig
from prismatic.vla.datasets.catalog import DatasetSpec, get_dataset_spec, is_known
from prismatic.vla.datasets.dataset import FrameDataset, frame_starts, train_and_val_episodes, training_episodes
from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec
from prismatic.vla.datasets.mixture import FrameMixture, MixtureOrder, parse_mixture
from prismatic.vla.datasets.sampler import GlobalBatchSampler
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.stored.index import DatasetIndex
from prismatic.vla.gripper import unsaid_gripper
from prismatic.vla.robots import RobotSpec, misfits
from prismatic.vla.transform import PolicyTransform

log = logging.getLogger(__name__)

Frames = FrameDataset | FrameMixture


def dataset_specs(config: FinetuneConfig) -> list[tuple[DatasetSpec, float]]:
    """How each dataset of the run is read, with its weight.

    `--robot`, `--gripper` and `--dataset_spec` speak for a single dataset, and for those of a mixture whose names do
    not say it; a file that names a dataset speaks for that one.

    Raises ValueError for a dataset or robot that is not known, or for datasets of different robots.
    """
    weights = parse_mixture(config.dataset_name)
    file = config.spec_file
    of = None if file is None else file.name
    if file is not None and of not in (None, *weights):
        raise ValueError(
            f"--dataset_spec {file.path} is of dataset {of!r}, and --dataset_name is {config.dataset_name!r}"
        )
    known = [name for name in weights if is_known(name) and name != of]
    if len(known) == len(weights):
        known = []

    def spec_of(name: str) -> DatasetSpec:
        if name in known:
            return get_dataset_spec(name)
        if file is not None and of == name:
            alone = len(weights) == 1
            if alone and config.robot is not None:
                raise ValueError(f"--robot {config.robot}: --dataset_spec {file.path} says it; leave one of both out")
            # In a mixture the flags speak for the others, and for the file's where it leaves the gripper open.
            speaks = alone or file.spec.map_actions is unsaid_gripper
            return file.named(name, config.gripper if speaks else None)
        return find_dataset_spec(name, config.robot, config.gripper, None if of else file)

    specs = [(spec_of(name), weight) for name, weight in weights.items()]
    (first, _), *others = specs
    for other, _ in others:
        for fact in misfits(first.robot, other.robot):
            raise ValueError(
                f"--dataset_name {config.dataset_name!r}: {first.name!r} and {other.name!r} are of robots that differ "
                f"in {fact}; one policy drives one robot"
            )
    return specs


@dataclass(frozen=True)
class _Part:
    """One dataset of the run: its episodes, weight, statistics, and the numbers of episodes to learn from and not."""

    index: DatasetIndex
    weight: float
    statistics: dict[str, Any]
    train: list[int]
    val: list[int] | None


@dataclass(frozen=True)
class SampleCounts:
    """How much there is to learn from.

    Attributes:
        train: samples, of all datasets.
        epoch: samples that one epoch takes; a mixture's weights make it more or less than `train`.
        held_out: samples to validate with; None without `--use_val_set`.
    """

    train: int
    epoch: int
    held_out: int | None


class TrainingData:
    """The datasets of a run, indexed, with a picture of every camera decoded and the gripper's values checked."""

    def __init__(self, config: FinetuneConfig):
        """Every process reads the shards' headings, states, actions and words; the first one on every node compares
        shards that have not been with their checksums, which may take minutes (the others go on without).

        Raises:
            ValueError, FileNotFoundError: for data that are not there or do not fit the flags.
        """
        self._config = config
        self._parts = [self._open(spec, weight) for spec, weight in dataset_specs(config)]

    def _open(self, spec: DatasetSpec, weight: float) -> _Part:
        config = self._config
        index = open_dataset(config.data_root_dir, spec.name, spec, config.use_proprio, speaks_for_node())
        index.check_cameras(config.num_images_in_input)
        index = index.with_checked_gripper()
        if config.use_val_set:
            train, val = train_and_val_episodes(index, config.val_fraction, config.seed)
        else:
            train, val = training_episodes(index), None
        chunk = spec.robot.chunk_length
        for numbers in filter(None, (train, val)):
            frame_starts(index, numbers, chunk)  # refuses data without a sample
        if short := sum(episode.num_frames < chunk for episode in index.episodes):
            log.warning(
                "%s: %d of %d episodes are shorter than one chunk of %d actions and are left out",
                spec.name, short, len(index.episodes), chunk,
            )  # fmt: skip
        return _Part(index, weight, dataset_statistics(index), train, val)

    @property
    def robot(self) -> RobotSpec:
        """The robot of all datasets."""
        return self._parts[0].index.spec.robot

    @property
    def statistics(self) -> dict[str, dict[str, Any]]:
        """Of each dataset by its name."""
        return {part.index.name: part.statistics for part in self._parts}

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each dataset by its name: which shards with which contents they are, wherever they lie."""
        return {part.index.name: part.index.fingerprint for part in self._parts}

    @property
    def instructions(self) -> set[str]:
        """All sentences that samples may begin with."""
        return {
            text for part in self._parts for episode in part.index.episodes for text in episode.instructions if text
        }

    def counts(self) -> SampleCounts:
        """Numbers of samples; needs no checkpoint."""
        chunk = self.robot.chunk_length

        def count(part: _Part, episodes: list[int]) -> int:
            return sum(map(len, frame_starts(part.index, episodes, chunk)))

        train = [count(part, part.train) for part in self._parts]
        held_out = [count(part, part.val) for part in self._parts if part.val is not None]
        weights = [part.weight for part in self._parts]
        epoch = train[0] if len(train) == 1 else len(MixtureOrder(train, weights))
        return SampleCounts(sum(train), epoch, sum(held_out) if held_out else None)

    def frames(self, transform: Callable[[str], PolicyTransform]) -> tuple[Frames, Frames | None]:
        """Frames to learn from, and those that are held out (None without `--use_val_set`).

        Args:
            transform: name of a dataset -> the way to model inputs with its statistics.
        """
        config = self._config
        train: list[FrameDataset] = []
        held_out: list[FrameDataset] = []
        for part in self._parts:
            make = partial(FrameDataset, part.index, part.index.spec, transform(part.index.name), seed=config.seed)
            train.append(make(augment=config.image_aug, episodes=part.train, state_noise=config.state_noise))
            told = f"{len(train[-1])} frames to learn from"
            if part.val is not None:
                held_out.append(make(augment=False, episodes=part.val))
                told += f", {len(held_out[-1])} held out"
            log.info("%s: %s", part.index.name, told)
        return _joined(train), _joined(held_out) if held_out else None

    def sampler(self, frames: Frames, rank: int, world_size: int, position: int) -> GlobalBatchSampler:
        """Endless batches of one process, from a position of the run on."""
        config = self._config
        order = None
        if isinstance(frames, FrameMixture):
            counts = [len(part) for part in frames.parts]
            order = MixtureOrder(counts, [part.weight for part in self._parts], config.seed)
            shares = ", ".join(
                f"{part.index.name} {draws} ({draws / len(order):.1%})"
                for part, draws in zip(self._parts, order.draws, strict=True)
            )
            log.info("an epoch of the mixture takes %d samples: %s", len(order), shares)
        return GlobalBatchSampler(
            len(frames), config.batch_size, rank, world_size, config.seed, position, frame_at=order
        )


def _joined(parts: list[FrameDataset]) -> Frames:
    return parts[0] if len(parts) == 1 else FrameMixture(parts)
