"""Which weights a checkpoint holds, whatever it is called and wherever it lies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from prismatic.atomic_files import write_atomically
from prismatic.checkpoints.files import STATISTICS_FILE
from prismatic.checkpoints.weight_files import fingerprint

_BLOCK_BYTES = 1 << 24


def checkpoint_fingerprint(folder: Path, cache: Path | None = None) -> str:
    """`sha256:` and 64 hexadecimal digits that stand for everything trained in a folder.

    That is the model's tensors, however they are split into files, the `.pt` files beside them, by component, and the
    statistics that scale actions. Copies have the same one. It is kept for as long as the files keep their sizes,
    times and inodes, since 15 GB take a while to read.

    Args:
        folder: a checkpoint.
        cache: folder of what was computed before; None: `lightvla` in the user's cache folder.

    Raises:
        ValueError: as `read_header`.
    """
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt"), *folder.glob(STATISTICS_FILE)])
    state = [[file.name, *_state(file)] for file in files]
    own = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    kept = (cache or _user_cache()) / "fingerprints" / f"{own}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(kept.read_text())
        if known["files"] == state:
            return str(known["fingerprint"])
    found = _compute(files)
    with contextlib.suppress(OSError):  # no place to keep it: it is computed again next time
        write_atomically(kept, json.dumps({"files": state, "fingerprint": found}))
    return found


def _state(file: Path) -> list[int]:
    """What changes whenever the file does. The time of change cannot be set, unlike that of modification."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _compute(files: list[Path]) -> str:
    lines = []
    if tensors := [file for file in files if file.suffix == ".safetensors"]:
        lines.append(f"tensors {fingerprint(tensors, 'the weights')}")
    for file in files:
        if file.suffix != ".safetensors":
            # `action_head--5000_checkpoint.pt`: the step is part of the name only.
            lines.append(f"{file.name.partition('--')[0]} {_sha256(file)}")
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lightvla"
