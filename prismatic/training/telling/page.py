"""The report of a training run: a page that loads nothing from elsewhere, and renews itself while the run goes on."""

from __future__ import annotations

import time
from pathlib import Path

from prismatic.report.data import Headline, Live, ReportData
from prismatic.report.html import write_report
from prismatic.report.media import MediaFiles
from prismatic.training.runs.files import REPORT_FILE
from prismatic.training.telling import sections
from prismatic.training.telling.folder import RunRecord, Standing, moment


def write_page(run: Path, output_dir: Path | None = None, max_embedded_mb: float = 0.0, remember: bool = False) -> Path:
    """Write `report.html` of a run's folder, atomically; returns its path.

    Args:
        run: the run's folder.
        output_dir: where the page goes; None: into the run's folder.
        max_embedded_mb: pictures and videos beyond it are linked relatively, not embedded.
        remember: keep what was read of the metrics in the run's folder; see `History.remembered`.

    Raises:
        FileNotFoundError: where the folder has no metrics yet.
        ValueError: for metrics or a `run.json` that cannot be read.
    """
    folder = output_dir or run
    files = MediaFiles(folder, round(max_embedded_mb * 1e6))
    return write_report(report_data(RunRecord.read(run, remember), files), folder / REPORT_FILE)


def report_data(run: RunRecord, files: MediaFiles) -> ReportData:
    """Everything in the report of one run."""
    standing = run.standing()
    parts = [
        sections.learning(run),
        sections.by_dimension(run),
        sections.pictures(run, files),
        sections.rollouts(run, files),
        sections.checkpoints(run, files),
        sections.speed(run),
        sections.health(run),
        sections.what_it_is(run),
    ]
    now = time.time()
    return ReportData(
        title=f"Training run {run.name}",
        alerts=_alerts(run, standing),
        summary=[standing_text(run, standing), *sections.media_note(run, files)],
        headlines=_headlines(run, standing),
        sections=parts,
        footer=f"Written at {moment(now)} from {run.path.resolve()}",
        live=Live(now, 60 * run.report_minutes) if standing.how == "running" else None,
    )


def standing_text(run: RunRecord, standing: Standing) -> str:
    """How the run stands, in a sentence or three."""
    of = "" if run.max_steps is None else f" of {run.max_steps}"
    place = f"step {run.step}{of}"
    if standing.how == "running":
        again = f", start {len(run.starts)}, from step {run.starts[-1]['step']}" if len(run.starts) > 1 else ""
        return f"Running since {moment(standing.since)}{again}. {place.capitalize()} is done{_pace(run)}."
    ends = {
        "finished": f"Finished at {moment(standing.since)}, after {place}",
        "preempted": f"Preempted ({standing.words}) at {moment(standing.since)}, after {place}: saved, and the same "
                     "command goes on",
        "error": f"Stopped by an error at {moment(standing.since)}, after {place}",
        "unsaid": f"It is not running, and did not say how it ended; its last line of metrics is of {place}, "
                  f"{moment(standing.since)}",
    }  # fmt: skip
    return f"{ends.get(standing.how, f'{standing.how}, after {place}')}."


def _pace(run: RunRecord) -> str:
    seconds = run.seconds_per_step()
    if not seconds:
        return ""
    rate = f", {seconds:.2f} s each of late" if seconds >= 1 else f", {1 / seconds:.1f} per second of late"
    if run.max_steps is None:
        return rate
    return f"{rate}; about {_about((run.max_steps - run.step) * seconds)} left, without validating and saving"


def _about(seconds: float) -> str:
    """`42 s`, `35 min`, `7.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _alerts(run: RunRecord, standing: Standing) -> list[str]:
    found = [f"Stopped by an error: {standing.words}"] if standing.how == "error" else []
    collapsed = [event for event in run.history.events if "collapsed" in event.what]
    if collapsed:
        found.append(
            f"The pruner had collapsed at step {collapsed[-1].step}: it kept fewer than four tokens for twenty lines."
        )
    return found


def _headlines(run: RunRecord, standing: Standing) -> list[Headline]:
    last, found = run.history.last, []
    if run.max_steps:
        found.append(Headline(f"{100 * run.step / run.max_steps:.0f} %", f"step {run.step} of {run.max_steps}"))
    else:
        found.append(Headline(str(run.step), "steps"))
    if isinstance(last.get("loss"), float):
        found.append(Headline(f"{last['loss']:.4g}", "training loss"))
    if run.history.best is not None:
        loss, step = run.history.best
        now = f", now {last['val_loss']:.4g}" if last.get("val_loss") != loss else ""
        found.append(Headline(f"{loss:.4g}", f"lowest validation loss (step {step}{now})"))
    if isinstance(last.get("tokens_kept"), float):
        pruned = run.flags.get("pruner") != "none"
        label = "visual tokens kept per sample (training batch, with noise)" if pruned else "visual tokens per sample"
        found.append(Headline(f"{last['tokens_kept']:.1f}", label))
    if isinstance(last.get("samples_per_s"), float):
        waited = 100 * last.get("data_wait_s", 0.0) / last["step_time_s"] if last.get("step_time_s") else 0.0
        found.append(Headline(f"{last['samples_per_s']:.3g}", f"samples per second ({waited:.0f} % waiting for data)"))
    if "device_peak_gb" in last or "host_peak_gb" in last:
        where = "device" if "device_peak_gb" in last else "host"
        found.append(Headline(f"{last[f'{where}_peak_gb']:.2f} GB", f"most memory held ({where})"))
    if standing.how == "running" and run.max_steps and (seconds := run.seconds_per_step()):
        found.append(Headline(_about((run.max_steps - run.step) * seconds), "left, about"))
    return found
