"""A study from one definition: collect, train, evaluate, compare, report; `lightvla study`.

    lightvla study --preset quick              # under an hour on two cores
    lightvla study goal3 --list True           # what it would do, and for how long
    lightvla study goal3 --report_only True    # its report from the results that are kept

Each step is one of the project's ordinary commands, printed before it runs.
"""

import argparse
import signal
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightvla.study.arm_flags import check_arms
from lightvla.study.definition import Study, read_study
from lightvla.study.places import Places
from lightvla.study.progress import Progress, units_done, wall_seconds
from lightvla.study.records import check_unchanged, load_all
from lightvla.study.running import StepFailed, held, run_steps
from lightvla.study.steps import Step
from lightvla.study.telling.report import write_reports
from prismatic.command_status import STOPPED, UNUSABLE, UNWANTED, print_error
from prismatic.report.data import duration


def main(options: argparse.Namespace, console: Console) -> int:
    """Returns the exit status. Raises ValueError for what cannot be used, `StepFailed` for a step that failed."""
    study, places = _read(options)
    if options.list:
        _show_plan(study, places, options.only, options.num_processes, console)
        return 0
    check_unchanged(study, places, options.force)
    if options.report_only:
        if not load_all(study, places)[0]:
            raise ValueError(f"{places.results} holds no results yet; run lightvla study {places.root.name} first")
    else:
        with held(places):
            progress = Progress(study, places)
            steps = progress.left(options.only)
            if steps:
                run_steps(progress, steps, options.num_processes, console)
            else:
                console.print(
                    f"everything is done already: its results are in {places.results}, and the report is made anew. To "
                    f"run it yourself, copy {places.definition} to another folder and name that by --studies_dir",
                    soft_wrap=True, markup=False,
                )  # fmt: skip
    for path in write_reports(study, places):
        console.print(f"report: {path}", soft_wrap=True, markup=False)
    return 0


def _read(options: argparse.Namespace) -> tuple[Study, Places]:
    """Raises ValueError for flags or a definition that cannot be used."""
    if (options.name is None) == (options.preset is None):
        raise ValueError("name one study: lightvla study NAME, or lightvla study --preset quick")
    if options.num_processes < 1:
        raise ValueError(f"--num_processes {options.num_processes}: expected 1 or more")
    places = Places(options.studies_dir / (options.name or options.preset))
    study = read_study(places.definition)
    check_arms(study)
    if options.only is not None:
        try:
            study.arm(options.only)
        except ValueError as error:
            raise ValueError(f"--only {options.only}: {error}") from error
    return study, places


def _show_plan(study: Study, places: Places, arm: str | None, processes: int, console: Console) -> None:
    progress = Progress(study, places)
    seconds, left = progress.estimates(), progress.left(arm)
    names = {step.name for step in left}
    console.print(f"study {places.root.name}: {study.question}\n", markup=False)
    arms = _table("arm", "kind", "flags")
    for each in study.arms:
        arms.add_row(escape(each.name), each.kind, escape(each.flags))
    console.print(arms, "")
    table = _table("step", "time", "state")
    for step in progress.steps.values():
        if step.name not in names:
            record = progress.record(step)
            state, time = (
                ("done" if progress.is_done(step) else "not needed"),
                (duration(record.seconds) if record is not None and record.done else ""),
            )
        else:
            share = min(1.0, units_done(step) / step.units)
            state, time = f"{100 * share:.0f} % done" if share else "to do", f"about {duration(seconds[step.name])}"
        table.add_row(escape(step.name), time, state)
    console.print(table)
    count = f"left: {len(left)} of {len(progress.steps)} steps"
    if left:
        total = duration(wall_seconds(left, seconds, processes))
        beside = "one evaluation at a time" if processes == 1 else f"{processes} evaluations at a time"
        count += f", about {total}, {beside}, {_basis(left, progress.measured())}"
    console.print(count, soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _basis(left: Sequence[Step], measured: set[str]) -> str:
    """What the times of steps are taken from."""
    kinds = {step.kind for step in left}
    here, demo = "by this machine's finished steps", "by the demo's times on two free cores"
    if kinds <= measured:
        return here
    return f"{here}, else {demo}" if kinds & measured else demo


def command(options: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs so
    try:
        return main(options, console)
    except (ValueError, OSError) as error:
        print_error(error)
        return UNUSABLE
    except StepFailed as error:
        print_error(error)
        return UNWANTED
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on where it was")
        return STOPPED
