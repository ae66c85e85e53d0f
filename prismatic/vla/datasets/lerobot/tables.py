"""The values of a LeRobot dataset's frames, out of its Parquet files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.vla.datasets.lerobot.layout import EpisodeEntry, Layout
from prismatic.vla.datasets.lerobot.libraries import import_parquet

_NUMBERS = ("episode_index", "frame_index", "timestamp", "task_index")


@dataclass(frozen=True)
class EpisodeValues:
    """The rows of one episode.

    Attributes:
        entry: the episode.
        first_row: number of its first row, counted over all files in their order.
        columns: feature -> (T, ...) values.
    """

    entry: EpisodeEntry
    first_row: int
    columns: dict[str, np.ndarray]


def tables_of(entries: Sequence[EpisodeEntry]) -> list[Path]:
    """The Parquet files, in the order of the episodes."""
    return list(dict.fromkeys(entry.table for entry in entries))


def read_values(layout: Layout, entries: Sequence[EpisodeEntry], features: Sequence[str]) -> Iterator[EpisodeValues]:
    """The values of each episode, in their order.

    Raises:
        FileNotFoundError: a Parquet file is missing.
        ValueError: one is damaged, lacks a column, or has other rows than `meta` says; names it.
    """
    names = ["episode_index", "frame_index", "timestamp", *features]
    first = 0
    entries_of: dict[Path, list[EpisodeEntry]] = {}
    for entry in entries:
        entries_of.setdefault(entry.table, []).append(entry)
    for path, inside in entries_of.items():
        columns = _read(path, names)
        number = columns["episode_index"]
        if others := sorted({*number.tolist()} - {entry.number for entry in inside}):
            raise ValueError(f"{path} holds episode {others[0]}, which meta has elsewhere or not. Download it again")
        for entry in inside:
            rows = np.flatnonzero(number == entry.number)
            _check(entry, rows, columns, path, layout.fps)
            yield EpisodeValues(entry, first + int(rows[0]), {name: columns[name][rows] for name in names})
        first += len(number)


def _check(entry: EpisodeEntry, rows: np.ndarray, columns: dict[str, np.ndarray], path: Path, fps: float) -> None:
    if len(rows) != entry.length or not len(rows):
        raise ValueError(
            f"episode {entry.number} has {len(rows)} rows in {path}, and meta says {entry.length}: the copy is "
            "incomplete, or the recording broke off. Download the dataset again, or take the episode out"
        )
    if not np.array_equal(rows, rows[0] + np.arange(len(rows))) or not np.array_equal(
        columns["frame_index"][rows], np.arange(len(rows))
    ):
        raise ValueError(f"the rows of episode {entry.number} in {path} are not frames 0 to {len(rows) - 1} in order")
    off = np.abs(columns["timestamp"][rows] - np.arange(len(rows)) / fps)
    if not off.max() <= 0.5 / fps:  # NaN is not either
        raise ValueError(
            f"frame {int(off.argmax())} of episode {entry.number} in {path} is at "
            f"{float(columns['timestamp'][rows][off.argmax()]):.4f} s, where {fps:g} frames per second have it at "
            f"{off.argmax() / fps:.4f} s: rows lack, or fps in meta/info.json is another"
        )


def _read(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    parquet = import_parquet()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the copy is incomplete. Download the dataset again")
    try:
        with parquet.ParquetFile(path) as file:
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                has = ", ".join(file.schema_arrow.names)
                raise ValueError(f"it lacks the columns {', '.join(missing)}; it has {has}")
            table = file.read(columns=list(names))
            columns = {name: _array(table.column(name).combine_chunks(), name) for name in names}
            return columns | {name: _one_each(columns[name], name) for name in _NUMBERS if name in columns}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download the dataset again") from error


def _one_each(values: np.ndarray, name: str) -> np.ndarray:
    """(T,) numbers of (T,) or (T, 1)."""
    if values.dtype.kind not in "fiu" or values.size != len(values):
        raise ValueError(f"{name} holds no number for each frame")
    return values.reshape(-1)


def _array(column: Any, name: str) -> np.ndarray:
    """(T,) or (T, D) of an Arrow column; text as objects."""
    if column.null_count:
        raise ValueError(f"{name} has no value in {column.null_count} rows")
    if hasattr(column, "flatten") and hasattr(column.type, "value_type"):
        inside = column.flatten()
        if hasattr(inside.type, "value_type"):
            raise ValueError(f"{name} holds tables; expected a number or a list of numbers for each frame")
        if len(column) and len(inside) % len(column):
            raise ValueError(f"{name} holds lists of different lengths")
        values: np.ndarray = inside.to_numpy(zero_copy_only=False)
        return values.reshape(len(column), len(inside) // max(len(column), 1))
    values = column.to_numpy(zero_copy_only=False)
    return values
