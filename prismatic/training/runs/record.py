"""`run.json`: what a run is, every start of it, and how that ended."""

import hashlib
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
from prismatic.training.runs.files import RUN_FILE
from prismatic.training.runs.identity import Change, plain_flags
from prismatic.training.runs.saving import Facts
from prismatic.vla.robots import RobotSpec

SCHEMA = 1
_PACKAGES = ("lightvla", "torch", "transformers", "timm", "peft", "numpy")
_CODE = Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a tree that is not installed
            continue
    return found


def code_digest() -> str:
    """Of every source file of the package, whether it was committed or not."""
    digest = hashlib.sha256()
    for file in sorted(_CODE.rglob("*.py")):
        digest.update(f"{file.relative_to(_CODE).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def record_start(
    config: FinetuneConfig,
    facts: Facts,
    robot: RobotSpec,
    step: int,
    processes: int,
    device: str,
    changes: Sequence[Change],
) -> Path:
    """Write `run.json`, or add this start to the one that is there. The main process only.

    Keys: `schema`, `run_id`, `flags` (of its beginning), `facts` (base model, data, samples per step), `robot` (`name`,
    `action_names`) and `starts`, each with `time` (UTC), `step` (finished before), `processes`, `device`, `versions`,
    `changes` of flags, and, once it has ended, `ended` (`record_end`).
    """
    file = config.run_dir / RUN_FILE
    start: dict[str, Any] = {
        "time": _now(),
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
        "robot": {"name": robot.name, "action_names": list(robot.action_names)},
        "starts": [*known.get("starts", []), start],
    }
    return write_atomically(file, json.dumps(content, indent=1))


def record_end(run: Path, step: int, how: str, words: str = "") -> None:
    """Write into `run.json`, where there is one, how its last start ended. The main process only.

    Args:
        run: the run's folder.
        step: finished steps.
        how: `finished`, `preempted` or `error`.
        words: the signal, or what the error says.
    """
    file = run / RUN_FILE
    if not file.is_file():
        return
    content = read_json(file)
    content["starts"][-1]["ended"] = {"time": _now(), "step": step, "how": how, "words": words}
    write_atomically(file, json.dumps(content, indent=1))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
