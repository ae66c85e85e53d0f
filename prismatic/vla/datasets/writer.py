"""Episodes -> RLDS shards as tensorflow-datasets writes them, without TensorFlow.

What a robot's layout in the catalogue names becomes a feature; beside it stand the ones that RLDS asks of every step
(`discount`, `reward`, `is_first`, `is_last`, `is_terminal`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from prismatic.atomic_files import sync
from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.crc32c import masked_crc32c

VERSION = "1.0.0"
SHARD_BYTES = 256 << 20

_PYTHON = "tensorflow_datasets.core.features."
_STEPS = "steps/"


@dataclass(frozen=True)
class NewEpisode:
    """One episode of T steps, to be written.

    Attributes:
        pictures: camera -> T pictures, the bytes of a JPEG file each.
        state: (T, proprio_dim).
        action: (T, action_dim), as they are to be stored.
        instruction: the sentence.
        source: where it came from, stored as `file_path`.
        success: whether the last step is rewarded.
    """

    pictures: Mapping[str, Sequence[bytes]]
    state: NDArray[Any]
    action: NDArray[Any]
    instruction: str
    source: str = ""
    success: bool = True


@dataclass
class _Split:
    """Shards of a split that are written so far: their files, and how many episodes and bytes each holds."""

    files: list[Path] = field(default_factory=list)
    episodes: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    stream: BinaryIO | None = None


class RldsWriter:
    """Writes `<root>/<name>/1.0.0`, which appears when the block has ended without an error, in place of an older one.

        with RldsWriter(root, spec, sizes) as writer:
            writer.add(episode, "train")

    Args:
        root: folder of datasets.
        spec: name, robot and features.
        sizes: camera -> (height, width) of its pictures; which cameras are written.
        description: a sentence stored with the dataset.
        shard_bytes: a shard that has so many is followed by another.

    Raises:
        ValueError: for a name that tensorflow-datasets does not take.
    """

    def __init__(
        self,
        root: Path,
        spec: DatasetSpec,
        sizes: Mapping[str, tuple[int, int]],
        description: str = "",
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        check_name(spec.name)
        self._root, self._spec, self._sizes = root, spec, dict(sizes)
        self._description, self._shard_bytes = description or spec.name, shard_bytes
        self._splits: dict[str, _Split] = {}
        self._stack = ExitStack()

    def __enter__(self) -> RldsWriter:
        self._root.mkdir(parents=True, exist_ok=True)
        prefix = f".{self._spec.name}-incomplete-"
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(dir=self._root, prefix=prefix)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._stack:
            for split in self._splits.values():
                if split.stream is not None:
                    split.stream.close()
            if kind is None and self._splits:
                self._publish()

    @property
    def directory(self) -> Path:
        """Where the dataset comes to lie."""
        return self._root / self._spec.name / VERSION

    def add(self, episode: NewEpisode, split: str = "train") -> None:
        """Write one episode."""
        record = _framed(_example(_features(episode, self._spec, self._sizes)))
        shards = self._splits.setdefault(split, _Split())
        if shards.stream is None or shards.num_bytes[-1] >= self._shard_bytes:
            if shards.stream is not None:
                shards.stream.close()
            shards.files.append(self._folder / f"{split}-{len(shards.files)}")
            shards.stream = shards.files[-1].open("wb")
            shards.episodes.append(0)
            shards.num_bytes.append(0)
        shards.stream.write(record)
        shards.episodes[-1] += 1
        shards.num_bytes[-1] += len(record)

    def _publish(self) -> None:
        name = self._spec.name
        made = self._folder / VERSION
        made.mkdir()
        for split, shards in self._splits.items():
            for number, file in enumerate(shards.files):
                sync(file)
                file.rename(made / f"{name}-{split}.tfrecord-{number:05d}-of-{len(shards.files):05d}")
        (made / "features.json").write_text(json.dumps(_features_json(self._spec, self._sizes), indent=4))
        info = {
            "description": self._description,
            "fileFormat": "tfrecord",
            "moduleName": __name__,
            "name": name,
            "splits": [
                {
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "name": split,
                    "numBytes": str(sum(shards.num_bytes)),
                    "shardLengths": list(map(str, shards.episodes)),
                }
                for split, shards in self._splits.items()
            ],
            "version": VERSION,
        }
        (made / "dataset_info.json").write_text(json.dumps(info, indent=2))
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.parent.mkdir(exist_ok=True)
        os.replace(made, self.directory)
        sync(self.directory.parent)


def check_name(name: str) -> None:
    """Raises ValueError for a dataset's name that tensorflow-datasets does not take."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(
            f"{name!r} cannot name a dataset; use lower case words and digits joined by underscores, like 'kitchen_1'"
        )


def _features(episode: NewEpisode, spec: DatasetSpec, cameras: Mapping[str, Any]) -> dict[str, Any]:
    """Feature name -> its values: byte strings, float32 or int64, of all steps in a row."""
    steps = len(episode.action)
    numbers = np.arange(steps)
    values: dict[str, Any] = {spec.image_keys[camera]: list(episode.pictures[camera]) for camera in cameras}
    if spec.state_key is not None:
        values[spec.state_key] = np.asarray(episode.state, np.float32)
    values[spec.action_key] = np.asarray(episode.action, np.float32)
    values[spec.language_key] = [episode.instruction.encode()] * steps
    last = (numbers == steps - 1).astype(np.int64)
    return values | {
        f"{_STEPS}discount": np.ones(steps, np.float32),
        f"{_STEPS}reward": (last * episode.success).astype(np.float32),
        f"{_STEPS}is_first": (numbers == 0).astype(np.int64),
        f"{_STEPS}is_last": last,
        f"{_STEPS}is_terminal": last,
        "episode_metadata/file_path": [episode.source.encode()],
    }


def _features_json(spec: DatasetSpec, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What tensorflow-datasets needs to read the shards."""
    leaves = {
        spec.action_key: _tensor("float32", spec.robot.action_dim),
        spec.language_key: _leaf("text_feature.Text", text={}),
        f"{_STEPS}discount": _tensor("float32"),
        f"{_STEPS}reward": _tensor("float32"),
        **{f"{_STEPS}{name}": _tensor("bool") for name in ("is_first", "is_last", "is_terminal")},
    }
    for camera, (height, width) in sizes.items():
        shape = {"dimensions": [str(height), str(width), "3"]}
        image = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": shape}
        leaves[spec.image_keys[camera]] = _leaf("image_feature.Image", image=image)
    if spec.state_key is not None:
        leaves[spec.state_key] = _tensor("float32", spec.robot.proprio_dim)
    steps = _dictionary({key.removeprefix(_STEPS): leaf for key, leaf in leaves.items()})
    sequence = {"feature": steps, "length": "-1"}
    return _dictionary(
        {
            "steps": _leaf("dataset_feature.Dataset", sequence=sequence),
            "episode_metadata/file_path": _leaf("text_feature.Text", text={}),
        }
    )


def _leaf(python: str, **content: Any) -> dict[str, Any]:
    return {"pythonClassName": _PYTHON + python, **content}


def _tensor(dtype: str, *dimensions: int) -> dict[str, Any]:
    shape = {"dimensions": list(map(str, dimensions))} if dimensions else {}
    kind = "tensor_feature.Tensor" if dimensions else "scalar.Scalar"
    return _leaf(kind, tensor={"dtype": dtype, "encoding": "none", "shape": shape})


def _dictionary(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Features by names with slashes -> nested dictionaries of features."""
    groups: dict[str, Any] = {}
    for key, leaf in leaves.items():
        head, _, rest = key.partition("/")
        if rest:
            groups.setdefault(head, {})[rest] = leaf
        else:
            groups[head] = leaf
    nested = {
        head: _dictionary(content) if "pythonClassName" not in content else content for head, content in groups.items()
    }
    return _leaf("features_dict.FeaturesDict", featuresDict={"features": nested})


def _framed(data: bytes) -> bytes:
    """A record of a TFRecord file: length and data, each with its checksum."""
    length = struct.pack("<Q", len(data))
    checksums = struct.pack("<I", masked_crc32c(length)), struct.pack("<I", masked_crc32c(data))
    return b"".join((length, checksums[0], data, checksums[1]))


def _example(features: Mapping[str, Any]) -> bytes:
    """A `tf.train.Example`; its map of features in the order of their names."""
    entries = [_field(1, _field(1, key.encode()) + _field(2, _value(features[key]))) for key in sorted(features)]
    return _field(1, b"".join(entries))


def _value(values: Any) -> bytes:
    """A `tf.train.Feature`: field 1 byte strings, 2 floats, 3 integers from 0 on, the numbers packed."""
    if isinstance(values, list):
        return _field(1, b"".join(_field(1, value) for value in values))
    if values.dtype == np.float32:
        return _field(2, _field(1, values.astype("<f4").tobytes()))
    return _field(3, _field(1, b"".join(_varint(int(value)) for value in values)))


def _field(number: int, content: bytes) -> bytes:
    return b"".join((_varint(number << 3 | 2), _varint(len(content)), content))


def _varint(value: int) -> bytes:
    return bytes(_varints(value))


def _varints(value: int) -> Iterator[int]:
    while value > 127:
        yield value & 127 | 128
        value >>= 7
    yield value
