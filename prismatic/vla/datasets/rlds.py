"""RLDS shards as a frame index: one walk notes where every frame's pictures lie in their memory-mapped shard.

Each record of a shard is one episode. States, actions and instructions are small and kept in memory; images stay in
the file until a frame is asked for, so a global shuffle costs nothing.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.progress import track

from prismatic.vla.datasets.catalog import DatasetSpec, get_dataset_spec
from prismatic.vla.datasets.checksums import Fingerprint, compare_shards
from prismatic.vla.datasets.shards import ShardFiles, find_shards, find_version, split_of, versions
from prismatic.vla.datasets.tfrecord import Example, WrongKind, read_examples
from prismatic.vla.gripper import GRIPPERS, Gripper, unsaid_gripper
from prismatic.vla.images import SIGNATURE_BYTES, decode_image, image_format, is_decodable
from prismatic.vla.robots import LIBERO

logger = logging.getLogger(__name__)

_PROGRESS_BAR_BYTES = 1 << 30  # smaller datasets are indexed within two seconds

_BYTES_LITERAL = re.compile(r"""b(?P<quote>['"]).*(?P=quote)""", re.DOTALL)


class UnreadableImage(ValueError):
    """A stored picture that cannot be decoded; the message names its shard and place."""


@dataclass(frozen=True)
class Episode:
    """One episode of T steps.

    Attributes:
        split: `train`, `val`, ... as in the shard's name.
        instructions: T sentences; empty where a step has none.
        state: (T, proprio_dim) float32, or None if the dataset has no state or it is not read.
        action: (T, action_dim) float32 as stored, or as the catalogue's `map_episode` makes it; gripper not mapped.
        image_ranges: camera name -> (T, 2) int64, first byte and the byte after the last in the shard.
    """

    split: str
    instructions: tuple[str, ...] = field(repr=False)
    state: np.ndarray | None = field(repr=False)
    action: np.ndarray = field(repr=False)
    image_ranges: Mapping[str, np.ndarray] = field(repr=False)
    shard: int
    shards: ShardFiles = field(repr=False)

    @property
    def num_frames(self) -> int:
        """T."""
        return len(self.action)

    @property
    def instruction(self) -> str:
        """The first sentence that there is."""
        return next(filter(None, self.instructions), "")

    def image_bytes(self, camera: str, step: int) -> bytes:
        """The stored picture of one camera at one step."""
        start, stop = self.image_ranges[camera][step]
        return self.shards.bytes_of(self.shard)[start:stop]

    def image(self, camera: str, step: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableImage for a picture that cannot be decoded."""
        try:
            return decode_image(self.image_bytes(camera, step))
        except ValueError as error:
            raise UnreadableImage(
                f"image of camera {camera!r} at byte {self.image_ranges[camera][step][0]} of shard "
                f"{self.shards.paths[self.shard]} (step {step} of its episode): {error}"
            ) from error

    def chunk_starts(self, chunk: int) -> np.ndarray:
        """Steps that have a sentence and `chunk` actions from there on, int64; fewer than T, often T - chunk + 1."""
        steps = range(max(self.num_frames - chunk + 1, 0))
        return np.array([step for step in steps if self.instructions[step]], np.int64)


@dataclass(frozen=True)
class RldsIndex:
    """All episodes of one dataset, `train` shards and others, in the order of shard names.

    Attributes:
        spec: how the dataset's features map to cameras, state and action.
        directory: the folder of the shards.
        episodes: the episodes.
        feature_names: every feature the first episode has, known to `spec` or not.
        fingerprint: `sha256:...` of the shards' names and contents, wherever they lie (`Fingerprint`).
        odd_images: camera -> what is wrong with the first of its pictures that cannot be decoded.
    """

    spec: DatasetSpec
    directory: Path
    episodes: list[Episode]
    feature_names: tuple[str, ...]
    fingerprint: str
    odd_images: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        root: Path | str,
        name: str,
        spec: DatasetSpec | None = None,
        use_state: bool = True,
        compare: bool = True,
        as_stored: bool = False,
    ) -> "RldsIndex":
        """Index `<root>/<name>/<version>/*.tfrecord*` (the newest version).

        Args:
            root: folder of datasets.
            name: the dataset's folder.
            spec: how to read it; the catalogue's entry by default.
            use_state: whether the policy reads the state; else its width and kind do not matter.
            compare: whether shards that have not been are compared with their checksums, which reads every byte.
            as_stored: keep episodes without an instruction, and NaN; training leaves those out and refuses these.

        Raises:
            ValueError: the dataset is unknown, a shard is cut off or damaged (names shard and byte), or its features
                do not fit the robot. What is wrong with pictures alone is said by `check_cameras`.
            FileNotFoundError: there is no such folder, or shards are missing.
        """
        spec = spec or get_dataset_spec(name)
        directory = find_version(Path(root), name)
        if len(found := [path.name for path in versions(directory.parent)]) > 1:
            logger.warning("%s has the versions %s; the newest is read", name, ", ".join(found))
        reader = _Reader(spec, ShardFiles(find_shards(directory)), use_state, finite=not as_stored)
        total = sum(path.stat().st_size for path in reader.shards.paths)
        episodes: list[Episode] = []
        fingerprint = Fingerprint()
        read = 0
        quiet = total < _PROGRESS_BAR_BYTES
        numbers = range(len(reader.shards.paths))
        for number in track(numbers, description=f"indexing {name}", transient=True, disable=quiet):
            fingerprint.add_shard(path := reader.shards.paths[number])
            for example in read_examples(reader.shards.bytes_of(number), path):
                fingerprint.add_record(example.record)
                episode = reader.checked_episode(example, number)
                read += 1
                if episode.instruction or as_stored:
                    episodes.append(episode)
        if compare:  # behind all that is said at once
            compare_shards(directory, reader.shards)
        if not read:
            raise ValueError(f"the shards of {directory} hold no episodes: collect or download the dataset again")
        if not episodes:
            raise ValueError(f"none of the {read} episodes of {directory} has an instruction in {spec.language_key!r}")
        if not as_stored:
            _tell_about_instructions(name, episodes, read)
        size = (total / 1e9, len(numbers), directory)
        logger.info("%s: %d episodes, %.2f GB in %d shards of %s", name, len(episodes), *size)
        return cls(spec, directory, episodes, reader.feature_names, str(fingerprint), reader.odd_images)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.spec.name

    def numbers_of(self, split: str) -> list[int]:
        """Numbers of the episodes that a split holds."""
        return [number for number, episode in enumerate(self.episodes) if episode.split == split]

    def check_cameras(self, num_images: int) -> tuple[str, ...]:
        """The first `num_images` camera names.

        Raises ValueError if the robot, catalogue or data has fewer, a camera's pictures are stored in a way that is not
        read, or the first one cannot be decoded.
        """
        keys = self.spec.camera_keys(num_images)
        for camera, key in keys.items():
            if camera in self.odd_images:
                raise ValueError(f"dataset {self.name!r}: {self.odd_images[camera]}")
            if any(camera not in episode.image_ranges for episode in self.episodes):
                raise ValueError(
                    f"dataset {self.name!r} lacks {key!r}, the image of camera {camera!r}, which {num_images} images "
                    f"per sample need; it has {', '.join(self.feature_names)}. Lower num_images_in_input or correct "
                    "the dataset's catalogue entry"
                )
            for episode in [episode for episode in self.episodes if episode.num_frames][:1]:
                episode.image(camera, 0)
        return tuple(keys)

    def with_checked_gripper(self) -> "RldsIndex":
        """This index, its stored gripper compared with what the catalogue or a flag says of it; logs what was found.

        Where nothing says it, data of LIBERO's robot that go from -1 to +1 are read as the simulator's own actions,
        with a warning.

        Raises ValueError where nothing says it otherwise, or the values cannot be of the convention that was said.
        """
        if not self.spec.has_gripper:
            logger.info("%s: grippers are scaled like joints, and come back as they were stored", self.name)
            return self
        actions = np.concatenate([episode.action for episode in self.episodes])
        spec, own = self.spec, GRIPPERS["libero"]
        if spec.map_actions is unsaid_gripper and spec.robot == LIBERO and own.reaches_both_ends(actions[:, -1]):
            spec = replace(spec, map_actions=own)
            logger.warning(
                "%s: gripper: nothing says how it is stored; it runs from -1 to 1 as the simulator's does, so -1 is "
                "taken for open. Pass --gripper libero if that is right, --gripper width:-1,1 if -1 is closed",
                self.name,
            )  # fmt: skip
        convention = spec.map_actions
        try:
            mapped = convention(actions)[:, -1]
            odd = convention.check(actions[:, -1]) if isinstance(convention, Gripper) else _odd_gripper(mapped)
        except ValueError as error:
            raise ValueError(f"dataset {self.name!r}, robot {spec.robot.name!r}: {error}") from None
        if odd:
            logger.warning("%s: gripper: %s", self.name, odd)
        logger.info(
            "%s: gripper: stored %g to %g, read as %s: %g (closed) to %g (open), open in %.0f %% of the steps",
            self.name, actions[:, -1].min(), actions[:, -1].max(), getattr(convention, "name", "its entry says"),
            mapped.min(), mapped.max(), 100 * (mapped > 0.5).mean(),
        )  # fmt: skip
        return replace(self, spec=spec)


def _odd_gripper(mapped: np.ndarray) -> str | None:
    """What is odd about (N,) values that somebody's own function made; None where they reach 0 and 1."""
    least, most = float(mapped.min()), float(mapped.max())
    if abs(least) <= 0.1 and abs(most - 1) <= 0.1:
        return None
    return f"map_actions makes values from {least:g} to {most:g}, where 0 should be closed and 1 open"


def _tell_about_instructions(name: str, episodes: list[Episode], read: int) -> None:
    quoted = (text for episode in episodes for text in episode.instructions if _BYTES_LITERAL.fullmatch(text))
    if (text := next(quoted, None)) is not None:
        logger.warning(
            "%s: sentences such as %r are bytes that were written by str(); write them with .decode()", name, text
        )
    if read > len(episodes):
        logger.warning("%s: %d of %d episodes without an instruction are left out", name, read - len(episodes), read)
    gaps = [sum(not text for text in episode.instructions) for episode in episodes]
    if any(gaps):
        logger.warning(
            "%s: %d frames without an instruction are left out (episodes: %d)", name, sum(gaps), sum(map(bool, gaps))
        )


class _Reader:
    """Records to episodes, by a catalogue's entry."""

    def __init__(self, spec: DatasetSpec, shards: ShardFiles, use_state: bool, finite: bool):
        self.spec = spec
        self.finite = finite
        self.shards = shards
        self.use_state = use_state
        self.feature_names: tuple[str, ...] = ()
        self.odd_images: dict[str, str] = {}
        self._sentences: dict[str, str] = {}  # each is kept in memory once

    def checked_episode(self, example: Example, shard: int) -> Episode:
        """As `episode`; a record that is refused is first compared with its checksum, since damage explains more."""
        try:
            return self.episode(example, shard)
        except ValueError:
            example.record.compare()
            raise

    def episode(self, example: Example, shard: int) -> Episode:
        """What the entry names of one record. A camera that is not there is left out."""
        spec = self.spec
        self.feature_names = self.feature_names or tuple(sorted(example.features))
        keys = {camera: key for camera, key in spec.image_keys.items() if key in example}
        ranges = {camera: self._images(example, camera, key) for camera, key in keys.items()}
        texts = self._texts(example)
        steps = self._steps(example, texts, {c: len(f) for c, f in ranges.items() if c not in self.odd_images})
        if len(texts) not in (1, steps):
            raise ValueError(
                f"dataset {spec.name!r} has {len(texts)} sentences in {spec.language_key!r} for {steps} steps "
                f"({example.place}); expected one for each step, or one for the episode"
            )
        instructions = tuple(texts * steps if len(texts) == 1 else texts)
        for camera, frames in ranges.items():
            if len(frames) != steps and camera not in self.odd_images:
                raise ValueError(
                    f"dataset {spec.name!r} has {len(frames)} images of camera {camera!r} for {steps} steps "
                    f"({example.place})"
                )
        needs_state = self.use_state or spec.map_episode is not None
        state = None
        if spec.state_key and needs_state:
            state = _floats(example, spec, spec.state_key, (steps, spec.robot.proprio_dim), self.finite)
        action = _floats(example, spec, spec.action_key, (steps, spec.robot.action_dim), self.finite)
        if spec.map_episode is not None:
            action, kept = spec.map_episode(action, state)
            state = None if state is None else state[kept]
            ranges = {camera: frames[kept] for camera, frames in ranges.items()}
            instructions = instructions[kept]
        return Episode(
            split=split_of(example.path),
            instructions=instructions,
            state=state if self.use_state else None,
            action=action,
            image_ranges=ranges,
            shard=shard,
            shards=self.shards,
        )

    def _images(self, example: Example, camera: str, key: str) -> np.ndarray:
        """Where the pictures of a camera are; notes the first that cannot be decoded, which matters if it is wanted."""
        try:
            frames = example.byte_ranges(key)
        except WrongKind as error:
            self.odd_images.setdefault(camera, f"{error}: pictures stored as tensors. {_STORE_IMAGES}")
            return np.zeros((0, 2), np.int64)
        if camera not in self.odd_images:
            for step, (start, end) in enumerate(frames.tolist()):
                found = example.data[start : min(start + SIGNATURE_BYTES, end)]
                if not is_decodable(found):
                    self.odd_images[camera] = (
                        f"{key!r} holds {image_format(found)} at step {step} ({example.place}), where JPEG or PNG is "
                        f"expected. {_STORE_IMAGES}"
                    )
                    break
        return frames

    def _texts(self, example: Example) -> list[str]:
        """The stored sentences, stripped of blanks and of zero bytes, with which some writers pad text."""
        _require(example, self.spec, self.spec.language_key)
        try:
            texts = [text.strip("\0").strip() for text in example.texts(self.spec.language_key)]
        except WrongKind as error:
            raise ValueError(f"dataset {self.spec.name!r}: {error}; expected text") from None
        return [self._sentences.setdefault(text, text) for text in texts]

    def _steps(self, example: Example, texts: list[str], pictures: Mapping[str, int]) -> int:
        """T: what the number of action values says, unless all that is stored once per step says otherwise."""
        spec = self.spec
        _require(example, spec, spec.action_key)
        values, width = len(_values(example, spec, spec.action_key)), spec.robot.action_dim
        counts = {*pictures.values(), *([len(texts)] if len(texts) != 1 else [])}
        (count,) = counts if len(counts) == 1 else (0,)
        if values % width or (count and values % count == 0):
            return count or max(counts, default=1)
        return values // width


_STORE_IMAGES = "Write the dataset with tfds.features.Image(encoding_format='jpeg' or 'png')"
_STORE_FLOATS = {
    "integers": "Write the dataset with dtype=np.float32 for it",
    "byte strings": "Write the dataset without `encoding` for it (tfds.features.Tensor(..., dtype=np.float32))",
}


def _require(example: Example, spec: DatasetSpec, key: str) -> None:
    if key not in example:
        raise ValueError(
            f"dataset {spec.name!r} lacks {key!r}; {example.path.name} has {', '.join(sorted(example.features))}. "
            f"Correct the dataset's catalogue entry{_without_state(spec, key)}"
        )


def _without_state(spec: DatasetSpec, key: str) -> str:
    return ", or train with --use_proprio False, which does not read it" if key == spec.state_key else ""


def _floats(example: Example, spec: DatasetSpec, key: str, shape: tuple[int, int], finite: bool) -> np.ndarray:
    _require(example, spec, key)
    steps, width = shape
    remedy = _without_state(spec, key)
    values = _values(example, spec, key)
    if len(values) != steps * width:
        raise ValueError(
            f"{key!r} of dataset {spec.name!r} has {len(values) / max(steps, 1):g} values per step, but robot "
            f"{spec.robot.name!r} needs {width} ({example.path.name}, {steps} steps). Correct the catalogue entry"
            f"{remedy}"
        )
    values = values.reshape(shape)
    if finite and (odd := ~np.isfinite(values).all(1)).any():
        raise ValueError(
            f"{key!r} of dataset {spec.name!r} holds NaN or infinity at step {odd.argmax()} ({example.place}). Write "
            f"the episode again without that step{remedy}"
        )
    return values


def _values(example: Example, spec: DatasetSpec, key: str) -> np.ndarray:
    try:
        return example.floats(key)
    except WrongKind as error:
        remedy = f"{_STORE_FLOATS.get(error.found, '')}{_without_state(spec, key)}"
        raise ValueError(f"dataset {spec.name!r}: {error}. {remedy}") from None
