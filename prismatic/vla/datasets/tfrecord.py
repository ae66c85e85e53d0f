"""TFRecord files of `tf.train.Example` messages, read in place and without TensorFlow.

A file is a chain of records (length, checksum of the length, data, checksum of the data). Only the framing and the
fields that are asked for are looked at, a few bytes per image; `Record.compare` reads all of a record.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.crc32c import masked_crc32c

_HEADER = struct.Struct("<QI")
_FOOTER_BYTES = 4
_FIXED_BYTES = {1: 8, 5: 4}  # protobuf wire type -> size of a value
_BYTES_LIST, _FLOAT_LIST, _INT_LIST = 1, 2, 3  # field numbers of tf.train.Feature
_KINDS = {_BYTES_LIST: "byte strings", _FLOAT_LIST: "floats", _INT_LIST: "integers"}
_GZIP = b"\x1f\x8b"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""So begins what git leaves in place of a large file where git-lfs is not installed."""


class WrongKind(ValueError):
    """A feature holds values of another kind than asked for.

    Attributes:
        found: `byte strings`, `floats` or `integers`.
    """

    def __init__(self, message: str, found: str):
        super().__init__(message)
        self.found = found


class _WireError(Exception):
    """Bytes that are not the expected protobuf message."""


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        file: the bytes of the whole file.
        path: its name, for messages.
        start: first byte of the record.
        first: first byte of its data.
        last: the byte after the last of its data, where their checksum begins.
    """

    file: mmap.mmap = field(repr=False)
    path: Path
    start: int
    first: int
    last: int

    def __len__(self) -> int:
        """Bytes of data."""
        return self.last - self.first

    @property
    def data(self) -> memoryview:
        """The data; read when they are used."""
        return memoryview(self.file)[self.first : self.last]

    @property
    def checksum(self) -> int:
        """That of the data as it is stored; zero stands for none."""
        return int.from_bytes(self.file[self.last : self.last + _FOOTER_BYTES], "little")

    def compare(self) -> None:
        """Raises ValueError where the data differ from their checksum, naming shard and byte; reads every byte."""
        if self.checksum and masked_crc32c(self.data) != self.checksum:
            raise ValueError(
                f"shard {self.path} is damaged: the record at byte {self.start} ({len(self)} bytes) differs from its "
                "checksum. Copy the shard again"
            )


@dataclass(frozen=True)
class Example:
    """One record, with the place of every feature's values.

    Attributes:
        record: where it lies.
        number: of the record in its file, from 0.
        features: feature name -> first byte and the byte after the last of its serialised value list.
    """

    record: Record
    number: int
    features: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def data(self) -> mmap.mmap:
        """The whole file."""
        return self.record.file

    @property
    def path(self) -> Path:
        """The file's name."""
        return self.record.path

    @property
    def place(self) -> str:
        """Where the record is, for messages."""
        return f"episode {self.number} of {self.path}, at byte {self.record.start}"

    def __contains__(self, key: str) -> bool:
        return key in self.features

    def byte_ranges(self, key: str) -> np.ndarray:
        """(N, 2) int64: first byte and the byte after the last of each of N byte strings."""
        return np.array(self._values(key, _BYTES_LIST), np.int64).reshape(-1, 2)

    def texts(self, key: str) -> list[str]:
        """Every string of a list. Raises ValueError for one that is not UTF-8, naming the file."""
        try:
            return [self.data[start:end].decode() for start, end in self.byte_ranges(key).tolist()]
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{key!r} is not written in UTF-8 ({self.place}): {error.object!r}. Write the dataset with UTF-8 text"
            ) from None

    def floats(self, key: str) -> np.ndarray:
        """(N,) float32."""
        parts = [np.frombuffer(self.data[start:end], "<f4") for start, end in self._values(key, _FLOAT_LIST)]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _values(self, key: str, kind: int) -> list[tuple[int, int]]:
        try:
            lists = list(_fields(self.data, *self.features[key]))
            for number, _, _ in lists:
                if number != kind:
                    found = _KINDS.get(number, "unknown values")
                    raise WrongKind(f"{key!r} holds {found}, not {_KINDS[kind]} ({self.place})", found)
            return [(first, last) for _, start, end in lists for _, first, last in _fields(self.data, start, end)]
        except _WireError:
            raise _damaged(self.record) from None


def read_examples(data: mmap.mmap, path: Path) -> Iterator[Example]:
    """All records of a file. Their data are not compared with their checksums (`Record.compare`).

    Args:
        data: the file's bytes.
        path: its name, for messages.

    Raises:
        ValueError: the file is cut off or damaged; names it and the byte where the record starts.
    """
    for number, record in enumerate(read_records(data, path)):
        try:
            yield Example(record, number, _features(data, record.first, record.last))
        except (_WireError, UnicodeDecodeError):
            raise _damaged(record) from None


def _damaged(record: Record) -> ValueError:
    return ValueError(
        f"shard {record.path} is damaged: the record at byte {record.start} is no tf.train.Example. Copy the shard "
        "again"
    )


def read_records(data: mmap.mmap, path: Path) -> Iterator[Record]:
    """The chain of records; only their framing is read. Arguments and errors as of `read_examples`."""
    start, size = 0, len(data)
    while start < size:
        first = start + _HEADER.size
        end = size + 1  # an incomplete header is a cut as well
        if first <= size:
            length, checksum = _HEADER.unpack_from(data, start)
            if masked_crc32c(data[start : start + 8]) != checksum:
                if data[start : start + len(_GZIP)] == _GZIP:
                    raise ValueError(f"shard {path} is compressed by gzip; decompress it (gzip -d) and keep its name")
                raise ValueError(f"shard {path} is damaged: no TFRecord starts at byte {start}. Copy the shard again")
            end = first + length + _FOOTER_BYTES
        if end > size:
            raise ValueError(
                f"shard {path} is cut off: the record that starts at byte {start} goes on past the file's end at "
                f"byte {size}. Copy the shard again"
            )
        yield Record(data, path, start, first, end - _FOOTER_BYTES)
        start = end


def _features(data: mmap.mmap, start: int, end: int) -> dict[str, tuple[int, int]]:
    features = {}
    for _, features_start, features_end in _fields(data, start, end):
        for _, entry_start, entry_end in _fields(data, features_start, features_end):
            entry = {number: (first, last) for number, first, last in _fields(data, entry_start, entry_end)}
            if 1 not in entry or 2 not in entry:
                raise _WireError
            features[data[slice(*entry[1])].decode()] = entry[2]
    return features


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field number, first byte and the byte after the last of every field that is not a varint."""
    while position < end:
        tag, position = _varint(data, position, end)
        wire_type = tag & 7
        if wire_type == 0:
            _, position = _varint(data, position, end)
            continue
        if wire_type == 2:
            length, position = _varint(data, position, end)
        elif wire_type in _FIXED_BYTES:
            length = _FIXED_BYTES[wire_type]
        else:
            raise _WireError
        if position + length > end:
            raise _WireError
        yield tag >> 3, position, position + length
        position += length


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise _WireError
