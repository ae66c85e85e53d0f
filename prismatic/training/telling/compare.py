"""Several runs in one page: curves over each other, the flags that differ, the last values."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prismatic.report.data import Cell, ReportData, Row, Section, Table, counted
from prismatic.report.figures import COLOURS, Curve
from prismatic.report.html import write_report
from prismatic.training.runs.files import REPORT_FILE
from prismatic.training.telling.folder import RunRecord, moment
from prismatic.training.telling.page import standing_text

_LONGEST_LABEL = 28
_FACTS = {"base": "base model", "base_fingerprint": "its weights", "samples_per_step": "samples of a step"}
"""Names in `run.json` -> what a run's own page calls them."""
_OVERLAID = (
    ("Training loss", "loss", "loss", False),
    ("Validation loss", "val_loss", "loss", False),
    ("Visual tokens kept", "tokens_kept", "tokens", False),
    ("Visual tokens kept, held out", "val_tokens_kept", "tokens", False),
    ("Learning rate", "learning_rate", "rate", False),
    ("Norm of the gradient", "grad_norm", "norm", True),
    ("Speed", "samples_per_s", "samples per second", False),
    ("Waiting for data", "data_wait_s", "seconds per step", False),
    ("Most memory held, device", "device_peak_gb", "GB", False),
)
"""Title, name in the metrics, unit, whether on a logarithmic scale."""


def write_comparison(runs: Sequence[Path], output_dir: Path) -> Path:
    """Write `report.html` on several runs' folders into `output_dir`; returns its path.

    Raises FileNotFoundError and ValueError as `page.write_page`, and ValueError for one run given twice, or for more
    than there are colours.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"a run is given twice: {', '.join(map(str, runs))}")
    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} runs; one page tells at most {len(COLOURS)} apart. Give fewer")
    return write_report(comparison([RunRecord.read(run) for run in runs]), output_dir / REPORT_FILE)


def comparison(runs: Sequence[RunRecord]) -> ReportData:
    """Everything in a report of several runs."""
    named = dict(zip(labels([run.name for run in runs]), runs, strict=True))
    curves = [_overlaid(named, *chart) for chart in _OVERLAID]
    return ReportData(
        title=f"{counted(len(runs), 'training run')} compared",
        summary=[f"{label}: {standing_text(run, run.standing())}" for label, run in named.items()],
        sections=[
            Section("Last values", [_last_values(named)]),
            Section("What differs", _differences(named)),
            Section("Over the steps", [curve for curve in curves if curve.series], columns=2),
            Section("Validation by action dimension", _dimensions(named)),
        ],
        footer=f"Written at {moment(time.time())} from {', '.join(str(run.path.resolve()) for run in runs)}",
    )


def labels(names: Sequence[str]) -> list[str]:
    """Short names that tell the runs apart: their own, else letters."""
    if len(set(names)) == len(names) and max(map(len, names)) <= _LONGEST_LABEL:
        return list(names)
    return [f"run {chr(ord('A') + number)}" for number in range(len(names))]


def _overlaid(runs: Mapping[str, RunRecord], title: str, name: str, unit: str, log_scale: bool) -> Curve:
    # Numbered, since a label may be the name of anything.
    keys = {label: f"run {number}" for number, label in enumerate(runs)}
    lines = [
        {"step": line["step"], keys[label]: line[name]}
        for label, run in runs.items()
        for line in (*run.history.lines.records, *run.history.validations.records)
        if name in line
    ]
    return Curve(title, keys, lines, unit, log_scale)


def _last_values(runs: Mapping[str, RunRecord]) -> Table:
    def of(name: str, digits: int) -> Callable[[RunRecord], str | Cell]:
        def cell(run: RunRecord) -> str | Cell:
            value = run.history.last.get(name)
            return Cell(f"{value:.{digits}f}", sort=value) if isinstance(value, int | float) else Cell("–", sort=-1.0)

        return cell

    def best(run: RunRecord) -> str | Cell:
        if run.history.best is None:
            return Cell("–", sort=-1.0)
        loss, step = run.history.best
        return Cell(f"{loss:.4f}", sort=loss, note=f"step {step}")

    def step(run: RunRecord) -> str | Cell:
        return Cell(str(run.step), sort=run.step, note=f"of {run.max_steps}" if run.max_steps else "")

    columns: dict[str, Callable[[RunRecord], str | Cell]] = {
        "step": step,
        "loss": of("loss", 4),
        "validation loss": of("val_loss", 4),
        "lowest": best,
        "tokens kept": of("tokens_kept", 1),
        "samples/s": of("samples_per_s", 2),
        "host GB": of("host_peak_gb", 2),
        "device GB": of("device_peak_gb", 2),
    }
    shown = {title: cell for title, cell in columns.items() if any(_text(cell(run)) != "–" for run in runs.values())}
    rows: list[Row] = [
        (Cell(label, note=run.name if run.name != label else ""), *(cell(run) for cell in shown.values()))
        for label, run in runs.items()
    ]
    return Table("", ("run", *shown), rows, sortable=True)


def _text(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def _differences(runs: Mapping[str, RunRecord]) -> list[Table]:
    tables = []
    facts = {label: _facts(run) for label, run in runs.items()}
    versions = {label: (run.starts[-1]["versions"] if run.starts else {}) for label, run in runs.items()}
    flags = {
        label: {f"--{name}": value for name, value in run.flags.items() if name != "run_id_override"}
        for label, run in runs.items()
    }
    for title, given in (("Flags", flags), ("Base and data", facts), ("Versions", versions)):
        names = dict.fromkeys(name for values in given.values() for name in values)
        rows: list[Row] = [
            (name, *(_shown(_words(values, name)) for values in given.values()))
            for name in names
            if len({_words(values, name) for values in given.values()}) > 1
        ]
        if rows:
            tables.append(Table(title, ("", *runs), rows, numeric=False))
    return tables or [Table("", ("", *runs), [("flags, data, versions", *("the same" for _ in runs))], numeric=False)]


def _facts(run: RunRecord) -> dict[str, Any]:
    facts = run.content["facts"]
    data = {f"data: {name}": value for name, value in facts.get("data", {}).items()}
    own = {_FACTS.get(name, name): value for name, value in facts.items() if not isinstance(value, dict)}
    return {**own, **data}


def _words(values: Mapping[str, Any], name: str) -> str:
    """`–` also for what a run did not record."""
    value = values.get(name)
    return "–" if value is None else str(value)


def _shown(words: str) -> str:
    """A hash by its first digits: a column of a narrow window has no room for all."""
    return re.sub(r"^(sha256:[0-9a-f]{12})[0-9a-f]+$", r"\1", words)


def _dimensions(runs: Mapping[str, RunRecord]) -> list[Table]:
    known = {label: run for label, run in runs.items() if "val_l1_dimensions" in run.history.last}
    if not known:
        return []
    names = max((run.action_names for run in known.values()), key=len)
    values = {label: run.history.last["val_l1_dimensions"] for label, run in known.items()}
    rows: list[Row] = [
        (name, *(f"{found[place]:.4f}" if place < len(found) else "–" for found in values.values()))
        for place, name in enumerate(names)
    ]
    return [Table("", ("L1 on held-out frames, last", *known), rows)]
