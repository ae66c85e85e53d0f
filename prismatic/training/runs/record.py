"""`run.json`: what a run is, and every start of it."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prismatic.atomic_files import write_atomically
from prismatic.stored_files import read_json
from prismatic.training.config import FinetuneConfig
from prismatic.training.runs.folder import RUN_FILE
from prismatic.training.runs.identity import Change, plain_flags
from prismatic.training.runs.saving import Facts

SCHEMA = 1
_PACKAGES = ("lightvla", "torch", "transformers", "timm", "peft", "numpy")


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a tree that is not installed
            continue
    return found


def record_start(
    config: FinetuneConfig, facts: Facts, step: int, processes: int, device: str, changes: Sequence[Change]
) -> Path:
    """Write `run.json`, or add this start to the one that is there. The main process only.

    Keys: `schema`, `run_id`, `flags` (of its beginning), `facts` (base model, data, samples per step) and `starts`,
    each with `time` (UTC), `step` (finished before), `processes`, `device`, `versions` and `changes` of flags.
    """
    file = config.run_dir / RUN_FILE
    start: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "processes": processes,
        "device": device,
        "versions": versions(),
        "changes": [asdict(change) for change in changes],
    }
    known = read_json(file) if file.is_file() else {}
    content = {
        "schema": SCHEMA,
        "run_id": config.run_id,
        "flags": known["flags"] if step > 0 and known else plain_flags(config),
        "facts": asdict(facts),
        "starts": [*known.get("starts", []), start],
    }
    return write_atomically(file, json.dumps(content, indent=1))
