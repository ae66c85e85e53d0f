"""Frames of a dataset as training samples: (episode, step) -> images, state, action chunk -> model inputs."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prismatic.vla.augmentation import AugmentationParameters, augment
from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.sampler import SampleRequest
from prismatic.vla.datasets.stored.episode import UnreadableImage
from prismatic.vla.datasets.stored.index import DatasetIndex
from prismatic.vla.images import center_crop, resize_lanczos3
from prismatic.vla.transform import PolicyTransform

HELD_OUT_SPLITS = ("val", "validation")
"""Splits to validate on, by either name."""
NEVER_USED_SPLIT = "test"
"""Neither trained nor validated on."""

_STATE_STREAM = 3  # keeps this noise apart from the random numbers of the order, the images and the pruner


@dataclass(frozen=True)
class Frame:
    """One step of an episode as stored, before any transform.

    Attributes:
        images: camera name -> (H, W, 3) uint8 at the stored resolution, in the robot's order.
        state: (proprio_dim,) float32, or None where it is not read.
        actions: (chunk_length, action_dim) float32 from this step on, gripper in [0, 1].
        instruction: the sentence of this step.
        episode: number of the episode in the index.
        step: step of the episode.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray | None
    actions: np.ndarray
    instruction: str
    episode: int
    step: int


@dataclass(frozen=True)
class FramePlace:
    """Where a frame is.

    Attributes:
        dataset: its name.
        episode: number of the episode in the dataset's index.
        step: step of the episode.
    """

    dataset: str
    episode: int
    step: int

    def __str__(self) -> str:
        return f"{self.dataset} episode {self.episode} step {self.step}"


class FrameDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """All frames that have a sentence and a whole chunk of actions ahead: of 0 .. T - chunk_length of every episode.

    Chunks are never padded; the last steps of an episode are only targets. Indexing takes a `SampleRequest`; what is
    random about a sample depends on (seed, position) alone.
    """

    def __init__(
        self,
        index: DatasetIndex,
        spec: DatasetSpec,
        transform: PolicyTransform,
        augment: bool,
        seed: int = 0,
        episodes: Sequence[int] | None = None,
        state_noise: float = 0.0,
    ):
        """Args:
            index: the episodes.
            spec: how they map to the robot.
            transform: to model inputs.
            augment: whether images are augmented (training) or prepared as inference does (validation).
            seed: of the augmentation.
            episodes: numbers of the episodes to use; all of them by default.
            state_noise: deviation of Gaussian noise on the normalised state (training).

        Raises:
            ValueError: the dataset has too few cameras, no state though the transform wants one, no episode that is as
                long as one chunk, or a sentence too long for the model.
        """
        self.index = index
        self.spec = spec
        self.transform = transform
        self.augment = augment
        self.seed = seed
        self.state_noise = state_noise
        self.cameras = index.check_cameras(transform.num_images)
        self._episodes = list(range(len(index.episodes)) if episodes is None else episodes)
        if transform.use_proprio and any(index.episodes[number].state is None for number in self._episodes):
            raise ValueError(f"dataset {spec.name!r} has no state: train with use_proprio False")
        self._actions = {number: spec.map_actions(index.episodes[number].action) for number in self._episodes}
        self._starts = frame_starts(index, self._episodes, transform.robot.chunk_length)
        self._check_sentences()
        self._ends = np.cumsum([len(starts) for starts in self._starts])

    def _check_sentences(self) -> None:
        """Raises ValueError for a sentence that is too long for the model."""
        sentences = {text for number in self._episodes for text in self.index.episodes[number].instructions if text}
        try:
            for sentence in sorted(sentences):
                self.transform.input_ids(sentence)
        except ValueError as error:
            raise ValueError(f"dataset {self.spec.name!r}: {error}") from None

    @property
    def pad_token_id(self) -> int:
        """Fills short prompts of a batch."""
        return self.transform.pad_token_id

    def __len__(self) -> int:
        return int(self._ends[-1])

    def by_episode(self) -> list[range]:
        """The numbers of the frames of each episode that has any, in order; their step rises with them."""
        ends = [0, *self._ends.tolist()]
        return [range(first, last) for first, last in itertools.pairwise(ends) if first < last]

    def place(self, index: int) -> FramePlace:
        """Where the frame of that number is; no picture is read. Raises IndexError outside 0 .. len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} is not in 0 .. {len(self) - 1}")
        place = int(np.searchsorted(self._ends, index, side="right"))
        step = int(self._starts[place][index - (int(self._ends[place - 1]) if place else 0)])
        return FramePlace(self.spec.name, self._episodes[place], step)

    def frame(self, index: int) -> Frame:
        """The stored frame of that number.

        Raises:
            IndexError: outside 0 .. len - 1.
            UnreadableImage: a picture cannot be decoded; names dataset, episode, step, camera and shard.
        """
        place = self.place(index)
        number, step = place.episode, place.step
        episode = self.index.episodes[number]
        try:
            images = {camera: episode.image(camera, step) for camera in self.cameras}
        except UnreadableImage as error:
            raise UnreadableImage(f"{place}: {error}") from error
        return Frame(
            images=images,
            state=None if episode.state is None else episode.state[step],
            actions=self._actions[number][step : step + self.transform.robot.chunk_length],
            instruction=episode.instructions[step],
            episode=number,
            step=step,
        )

    def __getitem__(self, request: SampleRequest) -> dict[str, Any]:
        """Model inputs and targets of one frame: augmented, or as inference sees it.

        Returns:
            input_ids (T,) int64, pixel_values (3*n*I, S, S) float32, actions (chunk_length, action_dim) float32 and
            proprio (proprio_dim,) float32 (if used), both normalised; position and dataset_name.
        """
        frame = self.frame(request.index)
        images = np.stack([resize_lanczos3(image, self.transform.image_size) for image in frame.images.values()])
        if self.augment:
            rng = np.random.default_rng([self.seed, request.position])
            images = augment(images, AugmentationParameters.draw(rng, len(images))).numpy()
        elif self.transform.center_crop:
            images = np.stack([center_crop(image) for image in images])
        sample = {
            "input_ids": self.transform.input_ids(frame.instruction),
            "pixel_values": self.transform.pixel_values(images),
            "actions": self.transform.actions(frame.actions),
            "position": request.position,
            "dataset_name": self.spec.name,
        }
        if self.transform.use_proprio and frame.state is not None:
            state = self.transform.proprio(frame.state)
            if self.state_noise > 0:
                rng = np.random.default_rng([self.seed, request.position, _STATE_STREAM])
                state = state + (self.state_noise * rng.standard_normal(state.shape)).astype(np.float32)
            sample["proprio"] = state
        return sample


def frame_starts(index: DatasetIndex, episodes: Sequence[int], chunk: int) -> list[np.ndarray]:
    """Steps of each of these episodes that begin a sample.

    Raises ValueError where no episode has any.
    """
    starts = [index.episodes[number].chunk_starts(chunk) for number in episodes]
    if not any(map(len, starts)):
        chosen = [index.episodes[number] for number in episodes]
        longest = max((episode.num_frames for episode in chosen), default=0)
        splits = ", ".join(sorted({episode.split for episode in chosen}))
        where = f"dataset {index.name!r} (split {splits})"
        if longest < chunk:
            raise ValueError(
                f"no episode of {where} is as long as one chunk of {chunk} actions: the longest of {len(chosen)} has "
                f"{longest} steps"
            )
        raise ValueError(
            f"no frame of {where} that has a sentence has a chunk of {chunk} actions ahead: in its {len(chosen)} "
            f"episodes only the last {chunk - 1} steps have sentences"
        )
    return starts


def training_episodes(index: DatasetIndex) -> list[int]:
    """Numbers of the episodes to learn from: the split `train`, else all that are neither held out nor `test`.

    Raises ValueError if there are none.
    """
    others = {*HELD_OUT_SPLITS, NEVER_USED_SPLIT}
    rest = [number for number, episode in enumerate(index.episodes) if episode.split not in others]
    if not rest:
        splits = sorted({episode.split for episode in index.episodes})
        raise ValueError(
            f"dataset {index.name!r} has only the splits {', '.join(splits)}, which are not trained on; name the "
            "shards to learn from NAME-train.tfrecord-..."
        )
    return index.numbers_of("train") or rest


def train_and_val_episodes(index: DatasetIndex, fraction: float = 0.05, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of the training and validation episodes.

    The splits `val` and `validation` are held out; without either a fraction of the training episodes is. `test` is
    left alone.

    Raises ValueError if there is nothing to learn from, or too little to hold something out.
    """
    training = training_episodes(index)
    if validation := [number for split in HELD_OUT_SPLITS for number in index.numbers_of(split)]:
        return training, sorted(validation)
    try:
        train, held_out = split_episodes(len(training), fraction, seed)
    except ValueError as error:
        raise ValueError(f"dataset {index.name!r}: {error}") from None
    return [training[place] for place in train], [training[place] for place in held_out]


def split_episodes(num_episodes: int, fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Hold out a fraction of the episodes, at least one: (training, validation), both sorted.

    Raises ValueError if there are fewer than two episodes or the fraction is not between 0 and 1.
    """
    if num_episodes < 2 or not 0 < fraction < 1:
        raise ValueError(
            f"cannot hold out a fraction {fraction} of {num_episodes} episodes: there must be at least 2 episodes and "
            "a fraction between 0 and 1"
        )
    count = min(max(round(fraction * num_episodes), 1), num_episodes - 1)
    order = np.random.default_rng(seed).permutation(num_episodes).tolist()
    return sorted(order[count:]), sorted(order[:count])
