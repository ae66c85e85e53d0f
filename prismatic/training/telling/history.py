"""What a run's metrics say, in bounded memory however long the run: lines are averaged in ever wider groups.

A run that goes on adds only the lines that are new since the last time, which `History.remembered` holds between pages.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismatic.atomic_files import write_atomically
from prismatic.training.runs.files import METRICS_FILE

MOST = 600
"""Groups of lines that are kept; there are half as many or more, once there are so many lines."""
EVENTS = 100
"""Newest events that are kept."""
MEMORY_FILE = ".report.json"

_COUNTS = {
    "skipped_steps": "steps left out: loss or gradient not finite",
    "rollbacks": "returns to a checkpoint: loss or gradient not finite",
    "bad_samples": "pictures that cannot be decoded",
}
"""Numbers that count up since a start -> what one is."""
_ONCE = {"loss_spike": "loss spike", "collapsed": "the pruner has collapsed"}
"""Marks, 1 in the line that they are of -> what they say."""
_LISTS = ("tokens_kept_per_image", "val_l1_dimensions", "val_l1_current_dimensions")
"""Names of lists of numbers; the others are of numbers."""
_SCHEMA = 2


@dataclass
class Thinned:
    """Records with a `step`, grouped: means of numbers, the extremes of what is named so, the last of what counts.

    Attributes:
        records: the groups, with the step of their last record, the oldest first.
        size: records in each group; the last may have fewer.
        filled: records in the last group.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    size: int = 1
    filled: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in the next one."""
        if self.records and self.filled < self.size:
            self.records[-1] = _merged(self.records[-1], record, self.filled, 1)
            self.filled += 1
            return
        if len(self.records) == MOST:
            pairs = zip(self.records[::2], self.records[1::2], strict=True)
            self.records = [_merged(one, other, 1, 1) for one, other in pairs]
            self.size *= 2
        self.records.append(dict(record))
        self.filled = 1


def _merged(one: Mapping[str, Any], other: Mapping[str, Any], weight: int, weight_other: int) -> dict[str, Any]:
    merged = {**one, **other}
    for name in one.keys() & other.keys():
        merged[name] = _merge(name, one[name], other[name], weight / (weight + weight_other))
    return merged


def _merge(name: str, one: Any, other: Any, share: float) -> Any:
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [_merge(name, a, b, share) for a, b in zip(one, other, strict=True)]
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if not numbers or name == "step" or name in _COUNTS:
        return other
    if name.endswith("_min"):
        return min(one, other)
    if name.endswith("_max") or name.endswith("_peak_gb") or name in _ONCE:
        return max(one, other)
    return share * one + (1 - share) * other


@dataclass
class Event:
    """Something that happened at a step."""

    step: int
    what: str


@dataclass
class History:
    """The lines of a run's `metrics.jsonl`.

    Attributes:
        lines: of training.
        validations: what validations said, with names that begin with `val_`.
        last: of each name what the last line said that had it.
        best: the lowest validation loss, with its step.
        events: the newest ones, the oldest first.
        num_events: of each kind.
        count: lines that were read.
    """

    lines: Thinned = field(default_factory=Thinned)
    validations: Thinned = field(default_factory=Thinned)
    last: dict[str, Any] = field(default_factory=dict)
    best: tuple[float, int] | None = None
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS))
    num_events: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in the next line. A value that is not what its name says (null, text) is left out."""
        self.count += 1
        is_validation = any(name.startswith("val_") for name in line)
        line = {name: value for name, value in line.items() if _fits(name, value)}
        if is_validation:
            self.validations.add(line)
            loss = line.get("val_loss")
            if loss is not None and math.isfinite(loss) and (self.best is None or loss < self.best[0]):
                self.best = (loss, line["step"])
        else:
            self._note_events(line)
            self.lines.add(line)
        self.last.update(line)

    def _note_events(self, line: Mapping[str, Any]) -> None:
        for name, what in _COUNTS.items():
            # A new start counts from 0 again.
            new = line.get(name, 0) - (before if (before := self.last.get(name, 0)) <= line.get(name, 0) else 0)
            if new > 0:
                self._note(line["step"], what, round(new))
        for name, what in _ONCE.items():
            if line.get(name):
                self._note(line["step"], what, 1)

    def _note(self, step: int, what: str, times: int) -> None:
        self.events.append(Event(step, what if times == 1 else f"{what} ({times})"))
        self.num_events[what] = self.num_events.get(what, 0) + times

    @classmethod
    def read(cls, run: Path) -> History:
        """Of all lines that a run's folder has now; a line that is not whole yet is left for the next time.

        Raises:
            FileNotFoundError: where there are no metrics.
            ValueError: for a line that is none; names file and line.
        """
        history = cls()
        history._read_on(run / METRICS_FILE, 0)
        return history

    @classmethod
    def remembered(cls, run: Path) -> History:
        """As `read`, but where lines have only been added since the last time, only those are read.

        What was read is kept in the run's folder, in `.report.json`. Raises as `read`.
        """
        path, memory = run / METRICS_FILE, run / MEMORY_FILE
        history, place = cls(), 0
        if memory.is_file() and (found := _recall(memory, path)) is not None:
            history, place = found
        place = history._read_on(path, place)
        write_atomically(memory, json.dumps({"schema": _SCHEMA, **_mark(path, place), "history": history._to_json()}))
        return history

    def _read_on(self, path: Path, place: int) -> int:
        """Take in the whole lines from a byte on; returns where the next one begins."""
        with path.open("rb") as file:
            file.seek(place)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                place += len(raw)
                if not raw.strip():
                    continue
                try:
                    line = json.loads(raw)
                    step = line["step"]
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ValueError(
                        f"{path}, line {self.count + 1}: no JSON object with a `step` ({error}); remove that line"
                    ) from error
                if not _is_finite(step):
                    raise ValueError(f"{path}, line {self.count + 1}: step {step!r}; expected a number, finite")
                self.add(line)
        return place

    def _to_json(self) -> dict[str, Any]:
        return {
            "lines": vars(self.lines), "validations": vars(self.validations), "last": self.last, "best": self.best,
            "events": [vars(event) for event in self.events], "num_events": self.num_events, "count": self.count,
        }  # fmt: skip

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> History:
        return cls(
            Thinned(**data["lines"]), Thinned(**data["validations"]), data["last"],
            tuple(data["best"]) if data["best"] else None,  # type: ignore[arg-type]
            deque((Event(**event) for event in data["events"]), maxlen=EVENTS), data["num_events"], data["count"],
        )  # fmt: skip


def _fits(name: str, value: Any) -> bool:
    """Whether a value is of the kind that its name stands for. A loss may be NaN; a count and a list may not."""
    if name in _LISTS:
        return isinstance(value, list) and all(map(_is_finite, value))
    return _is_finite(value) or (isinstance(value, float) and name not in _COUNTS)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _mark(path: Path, place: int) -> dict[str, Any]:
    """By what a file is known again that has only grown behind `place`: which one it is, and what stands before."""
    with path.open("rb") as file:
        file.seek(max(0, place - 64))
        before = file.read(min(64, place))
        return {"file": os.fstat(file.fileno()).st_ino, "place": place, "before": before.hex()}


def _recall(memory: Path, path: Path) -> tuple[History, int] | None:
    """What was read, and up to where; None where it is of another file, or another version's."""
    try:
        known = json.loads(memory.read_text())
        if known.pop("schema") != _SCHEMA:
            return None
        history = History._from_json(known.pop("history"))
        return (history, known["place"]) if known == _mark(path, known["place"]) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
