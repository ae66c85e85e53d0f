"""Make the report of evaluations or of training runs: a page that opens offline.

    lightvla report experiments/logs/RUN
    lightvla report demo/evaluation/wide demo/evaluation/blank --output_dir compared
    lightvla report runs/RUN
    lightvla report runs/ONE runs/OTHER --output_dir compared

Of evaluations it reads `results.json` and the videos and pictures beside it, and writes `report.html` and `report.md`;
of training runs, which may still go on, `metrics.jsonl` and `run.json`, and writes `report.html`. Nothing is evaluated
or trained again. Ends with 0, or 2 when there is nothing that can be read.
"""

import argparse
import math
import os
from pathlib import Path

from experiments.robot.libero.reports.page import write_reports
from lightvla.flags import report_parser
from prismatic.command_status import UNUSABLE, print_error
from prismatic.training.telling.compare import write_comparison
from prismatic.training.telling.folder import is_run
from prismatic.training.telling.page import write_page


def main(arguments: list[str]) -> int:
    """Parse, write, say where; returns the exit status."""
    return command(report_parser().parse_args(arguments))


def command(given: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    try:
        pages = write(given.results, given.output_dir, given.max_embedded_mb)
    except ValueError as error:
        print_error(error)
        return UNUSABLE
    except OSError as error:
        # One that cannot be written to its end (a full disk) names no file.
        unwritten = error.filename is None and error.strerror
        print_error(_unwritten(given, error.strerror) if unwritten else error)
        return UNUSABLE
    page, *others = pages
    print("\n".join([f"{page} ({page.stat().st_size / 1e6:.1f} MB)", *map(str, others)]))
    return 0


def _unwritten(given: argparse.Namespace, why: str | None) -> str:
    folder = given.output_dir or given.results[0]
    return f"the report could not be written to {folder}: {why}; make room, or give another folder with --output_dir"


def write(paths: list[Path], output_dir: Path | None, max_embedded_mb: float) -> tuple[Path, ...]:
    """Write the pages; returns their paths. Raises ValueError and OSError for what cannot be read."""
    runs = [path for path in paths if is_run(path) and not (path / "results.json").is_file()]
    if not runs:
        return write_reports(paths, output_dir, max_embedded_mb)
    if len(runs) < len(paths):
        other = next(path for path in paths if path not in runs)
        raise ValueError(f"{runs[0]} is a training run and {other} is none; make one report of each kind")
    if not (math.isfinite(max_embedded_mb) and max_embedded_mb >= 0):
        raise ValueError(f"max_embedded_mb is {max_embedded_mb}; give 0 (embed nothing) or more, a finite number")
    if len(runs) == 1:
        return (write_page(runs[0], output_dir, max_embedded_mb),)
    folder = output_dir or Path(os.path.commonpath([run.resolve() for run in runs]))
    return (write_comparison(runs, folder),)
