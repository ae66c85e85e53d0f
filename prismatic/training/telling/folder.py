"""A run's folder as its report reads it: what it is, how it stands, what it has left. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import re
import time
from calendar import timegm
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismatic.checkpoints.manifest import read_manifest
from prismatic.checkpoints.places import BEST, CHECKPOINTS, LATEST
from prismatic.stored_files import read_json
from prismatic.training.runs.files import METRICS_FILE, PICTURES, ROLLOUTS_FILE, RUN_FILE, is_held
from prismatic.training.telling.history import History

_TIME = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(frozen=True)
class Standing:
    """Whether a run goes on.

    Attributes:
        how: `running`, `finished`, `preempted`, `error`, or `unsaid` for one that ended without a word.
        since: when its last start began, or it ended (seconds, UTC); None where nothing says it.
        words: the signal, or what the error said.
    """

    how: str
    since: float | None = None
    words: str = ""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint in the run's folder.

    Attributes:
        step: finished steps.
        path: of its folder.
        validation_loss: None where it was saved without.
        size: bytes; None where it lists no files.
        pointers: names of the pointers that lead to it (`latest`, `best`).
    """

    step: int
    path: Path
    validation_loss: float | None
    size: int | None
    pointers: tuple[str, ...]


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells it.

    Attributes:
        path: of the folder.
        content: of `run.json`, with `starts`, `flags`, `facts` and `robot`; these are empty where nothing says them.
        history: of its metrics.
    """

    path: Path
    content: Mapping[str, Any]
    history: History

    @classmethod
    def read(cls, path: Path, remember: bool = False) -> RunRecord:
        """Of a run's folder; `remember` as `History.remembered`.

        Raises FileNotFoundError and ValueError as `History.read`, and ValueError for a `run.json` that is none.
        """
        content = read_json(path / RUN_FILE) if (path / RUN_FILE).is_file() else {}
        return cls(path, _sound(content), History.remembered(path) if remember else History.read(path))

    @property
    def name(self) -> str:
        """Of the run."""
        return str(self.content.get("run_id") or self.path.resolve().name)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Every start, the first one first."""
        return list(self.content["starts"])

    @property
    def flags(self) -> dict[str, Any]:
        """As they are by now: those of the run's beginning, with what later starts changed."""
        changes = {change["flag"]: change["now"] for start in self.starts for change in start["changes"]}
        return {**self.content["flags"], **changes}

    @property
    def step(self) -> int:
        """The last step that was told of."""
        return int(self.history.last.get("step", 0))

    @property
    def max_steps(self) -> int | None:
        """Where the run ends; None where nothing says it."""
        steps = self.flags.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def report_minutes(self) -> float:
        """How often the run writes its page."""
        minutes = self.flags.get("report_minutes")
        return minutes if isinstance(minutes, int | float) and 0 < minutes < math.inf else 2.0

    @property
    def action_names(self) -> list[str]:
        """Of the dimensions of an action; their numbers in a run that did not record them."""
        names = self.content["robot"].get("action_names")
        count = len(self.history.last.get("val_l1_dimensions", ()))
        fit = isinstance(names, list) and len(names) == count
        return [str(name) for name in names] if fit else [f"action {number}" for number in range(count)]

    def standing(self) -> Standing:
        """How it stands now."""
        last = self.starts[-1] if self.starts else {}
        if ended := last.get("ended"):
            return Standing(ended["how"], seconds_of(ended["time"]), ended["words"])
        if is_held(self.path):
            return Standing("running", seconds_of(last.get("time")))
        if self.max_steps is not None and self.step >= self.max_steps:  # of a version that did not record its end
            return Standing("finished", (self.path / METRICS_FILE).stat().st_mtime)
        return Standing("unsaid", (self.path / METRICS_FILE).stat().st_mtime)

    def seconds_per_step(self) -> float | None:
        """Of late; without validating and saving."""
        times = [line["step_time_s"] for line in self.history.lines.records[-5:] if "step_time_s" in line]
        return sum(times) / len(times) if times else None

    def checkpoints(self) -> list[StoredCheckpoint]:
        """Those in the folder, the oldest first."""
        found = []
        pointed = {name: (self.path / CHECKPOINTS / name).resolve().name for name in (LATEST, BEST)}
        for path in (self.path / CHECKPOINTS).glob("*_chkpt"):
            if not (match := re.fullmatch(r".+--(\d+)_chkpt", path.name)):
                continue
            try:
                manifest = read_manifest(path)
            except (ValueError, OSError):  # it is being removed, or was damaged: inspect-checkpoint says more
                manifest = None
            loss = manifest.facts.get("validation_loss") if manifest else None
            loss = loss if isinstance(loss, int | float) else None
            size = sum(manifest.files.values()) if manifest else None
            pointers = tuple(name for name, target in pointed.items() if target == path.name)
            found.append(StoredCheckpoint(int(match.group(1)), path, loss, size, pointers))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def pictures(self) -> list[dict[str, Any]]:
        """`pictures.json`: dictionaries with `step`, `file` (below `pictures/`) and `tokens_kept` (for each
        frame a number per image), by step."""
        try:
            found = json.loads((self.path / PICTURES / "pictures.json").read_text())
        except (OSError, ValueError):
            return []
        listed = found if isinstance(found, list) else []
        return sorted((item for item in listed if _has_step(item) and "file" in item), key=lambda item: item["step"])

    def rollouts(self) -> list[dict[str, Any]]:
        """`rollouts.jsonl`: dictionaries with `step`, `task`, `instruction`, `initial_state`, `success`, `steps` and
        `video` (below the run's folder)."""
        found = []
        try:
            lines = (self.path / ROLLOUTS_FILE).read_text().splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                item = json.loads(line)
            except ValueError:  # half written
                continue
            found += [item] if _has_step(item) else []
        return found


def _sound(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `run.json` says, without what is of another kind than `record_start` and `record_end` write."""
    facts = _mapping(content.get("facts"))
    facts |= {name: _mapping(facts[name]) for name in ("data", "computing") if name in facts}
    starts = [_sound_start(start) for start in _mappings(content.get("starts"))]
    known = {name: _mapping(content.get(name)) for name in ("flags", "robot")}
    return {**content, **known, "facts": facts, "starts": starts}


def _sound_start(start: Mapping[str, Any]) -> dict[str, Any]:
    changes = [
        change
        for change in _mappings(start.get("changes"))
        if change.keys() >= {"flag", "was", "now"} and isinstance(change["flag"], str)
    ]
    ended = _mapping(start.get("ended"))
    if ended:
        how, words = (str(ended.get(name) or missing) for name, missing in (("how", "ended"), ("words", "")))
        ended = {"how": how, "step": ended.get("step", "?"), "time": ended.get("time"), "words": words}
    versions = {name: str(value) for name, value in _mapping(start.get("versions")).items()}
    return {**start, "step": start.get("step", "?"), "changes": changes, "ended": ended, "versions": versions}


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _has_step(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("step"), int)


def is_run(path: Path) -> bool:
    """Whether a folder is a training run's."""
    return path.is_dir() and ((path / METRICS_FILE).is_file() or (path / RUN_FILE).is_file())


def seconds_of(text: Any) -> float | None:
    """Seconds since 1970 of a time as `run.json` writes it."""
    try:
        return float(timegm(time.strptime(str(text), _TIME)))
    except ValueError:
        return None


def moment(seconds: float | None) -> str:
    """`2026-01-31 07:05 UTC`."""
    return "an unknown time" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
