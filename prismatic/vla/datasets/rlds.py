"""RLDS shards as a frame index: one walk notes where every frame's pictures lie in their memory-mapped shard.

Each record of a shard is one episode. States, actions and instructions are small and kept in memory; images stay in
the file until a frame is asked for, so a global shuffle costs nothing.
"""

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from prismatic.vla.datasets.catalog import DatasetSpec, get_dataset_spec
from prismatic.vla.datasets.checksums import Fingerprint, compare_shards
from prismatic.vla.datasets.shards import ShardFiles, find_shards, find_version, split_of, versions
from prismatic.vla.datasets.stored.episode import Episode, UnreadableImage
from prismatic.vla.datasets.stored.index import DatasetIndex, tell_about_instructions
from prismatic.vla.datasets.tfrecord import Example, WrongKind, read_examples
from prismatic.vla.images import SIGNATURE_BYTES, decode_image, image_format, is_decodable

logger = logging.getLogger(__name__)

_PROGRESS_BAR_BYTES = 1 << 30  # smaller datasets are indexed within two seconds


@dataclass(frozen=True)
class RldsEpisode(Episode):
    """One episode of T steps, a record of a shard.

    Attributes:
        image_ranges: camera name -> (T, 2) int64, first byte and the byte after the last in the shard.
        shard: number of the shard among `shards`.
        shards: those of the dataset.
    """

    image_ranges: Mapping[str, np.ndarray] = field(repr=False)
    shard: int
    shards: ShardFiles = field(repr=False)

    @property
    def cameras(self) -> Set[str]:
        return self.image_ranges.keys()

    def encoded_sizes(self, camera: str) -> np.ndarray:
        return np.diff(self.image_ranges[camera], axis=1)[:, 0]

    def image_bytes(self, camera: str, step: int) -> bytes:
        start, stop = self.image_ranges[camera][step]
        return self.shards.read(self.shard, int(start), int(stop))

    def decoded(self, camera: str, step: int) -> np.ndarray:
        try:
            return decode_image(self.image_bytes(camera, step))
        except ValueError as error:
            raise UnreadableImage(
                f"image of camera {camera!r} at byte {self.image_ranges[camera][step][0]} of shard "
                f"{self.shards.paths[self.shard]} (step {step} of its episode): {error}"
            ) from error


@dataclass(frozen=True)
class RldsIndex(DatasetIndex):
    """All episodes of one dataset, `train` shards and others, in the order of shard names.

    Its fingerprint is of the shards' names and contents, wherever they lie (`Fingerprint`).
    """

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
        episodes: list[RldsEpisode] = []
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
            reader.shards.let_go()
        if compare:  # behind all that is said at once
            compare_shards(directory, reader.shards)
        if not read:
            raise ValueError(f"the shards of {directory} hold no episodes: collect or download the dataset again")
        if not episodes:
            raise ValueError(f"none of the {read} episodes of {directory} has an instruction in {spec.language_key!r}")
        if not as_stored:
            tell_about_instructions(name, episodes, read)
        size = (total / 1e9, len(numbers), directory)
        logger.info("%s: %d episodes, %.2f GB in %d shards of %s", name, len(episodes), *size)
        return cls(
            spec, directory, episodes, reader.feature_names, str(fingerprint), reader.odd_images, reader.shards.paths
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

    def checked_episode(self, example: Example, shard: int) -> RldsEpisode:
        """As `episode`; a record that is refused is first compared with its checksum, since damage explains more."""
        try:
            return self.episode(example, shard)
        except ValueError:
            example.record.compare()
            raise

    def episode(self, example: Example, shard: int) -> RldsEpisode:
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
        return RldsEpisode(
            split=split_of(example.path),
            instructions=instructions,
            state=state if self.use_state else None,
            action=action,
            image_ranges=ranges,
            shard=shard,
            shards=self.shards,
            turns=spec.turns,
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
