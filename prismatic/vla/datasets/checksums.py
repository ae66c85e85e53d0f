"""What the checksums of a dataset's records say: whether its shards are whole, and which data they are."""

import hashlib
import json
import logging
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from prismatic.atomic_files import write_atomically
from prismatic.vla.datasets.shards import ShardFiles
from prismatic.vla.datasets.tfrecord import Record, read_records

logger = logging.getLogger(__name__)

CACHE_FILE = "shards_compared.json"
_VERSION = b"1"  # of the fingerprint's computation
_RECORD = struct.Struct("<QI")
_PROGRESS_BAR_BYTES = 1 << 30  # fewer are compared within two seconds
_MOST_THREADS = 8  # what one disk or network feeds; each holds three copies of a record

Stamp = list[int]
"""Size and time of modification (nanoseconds) of a shard, by which a changed one is known."""


class Fingerprint:
    """`sha256:...` over the shards in order: name without folder, then length and stored checksum of every record.

    The checksum stands for the content, so no pictures are read; where a record has none (0), its bytes are hashed.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256(_VERSION)

    def add_shard(self, path: Path) -> None:
        """Begin the next shard."""
        self._digest.update(path.name.encode() + b"\0")

    def add_record(self, record: Record) -> None:
        """Take in the next record of the shard."""
        self._digest.update(_RECORD.pack(len(record), record.checksum))
        if not record.checksum:
            self._digest.update(hashlib.sha256(record.data).digest())

    def __str__(self) -> str:
        return f"sha256:{self._digest.hexdigest()}"


def compare_shards(directory: Path, shards: ShardFiles) -> None:
    """Compare every record with its checksum, once per shard.

    Which shards have passed is kept in `shards_compared.json` beside them, or in this user's cache where that cannot be
    written, by the folder, a shard's name, size and time of modification: a copy elsewhere is compared anew.

    Raises:
        ValueError: a shard is damaged; names it and the byte where the record starts.
    """
    known = _read_cache(directory)
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in shards.paths}
    todo = [number for number, path in enumerate(shards.paths) if known.get(path.name) != stamps[path.name]]
    if not todo:
        return
    total = sum(stamps[shards.paths[number].name][0] for number in todo)
    if large := total >= _PROGRESS_BAR_BYTES:
        logger.info("%s: comparing %.1f GB with their checksums, once", directory, total / 1e9)
    passed = {name: stamp for name, stamp in known.items() if stamps.get(name) == stamp}
    words, threads = TextColumn("comparing with checksums"), min(os.cpu_count() or 1, _MOST_THREADS)
    bar = Progress(words, BarColumn(), DownloadColumn(), TimeRemainingColumn(), transient=True, disable=not large)
    try:
        with bar, ThreadPoolExecutor(threads) as pool:
            task = bar.add_task("", total=total)
            for number in todo:
                path = shards.paths[number]
                records = list(read_records(shards.bytes_of(number), path))
                for record, _ in zip(records, pool.map(Record.compare, records), strict=True):
                    bar.advance(task, len(record))
                passed[path.name] = stamps[path.name]
                shards.let_go()
    finally:  # also where one is damaged: the others need not be read again
        _write_cache(directory, passed)


def _places(directory: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [directory / CACHE_FILE, home / "lightvla" / CACHE_FILE]


def _stored(place: Path) -> dict[str, Any]:
    """Folder -> name of shard -> stamp; empty where the file is not there, or not what we write."""
    try:
        content = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_cache(directory: Path) -> dict[str, Stamp]:
    found = [_stored(place).get(str(directory.resolve())) for place in _places(directory)]
    return {name: stamp for known in found if isinstance(known, dict) for name, stamp in known.items()}


def _write_cache(directory: Path, passed: dict[str, Stamp]) -> None:
    for place in _places(directory):
        content = _stored(place) | {str(directory.resolve()): passed}
        try:
            write_atomically(place, json.dumps(content) + "\n")
        except OSError as error:
            reason = error
            continue
        return
    logger.warning("%s: cannot keep which shards were compared (%s): comparing at every start", directory, reason)
