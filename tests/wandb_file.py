"""What Weights & Biases was told, read back from the files of offline runs."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_BLOCK, _FILE_HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log, behind a header of seven bytes."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content, place, parts = path.read_bytes(), _FILE_HEADER, b""
    while place + 7 <= len(content):
        if _BLOCK - place % _BLOCK < 7:
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = pb.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_files(folder: Path) -> list[Path]:
    """One for each time that a run was begun or gone on with, the oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns)


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, a dictionary per step."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.HasField("history")
    ]
