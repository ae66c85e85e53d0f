"""From nothing to a small LightVLA that acts in the LIBERO simulator, and a report: what `make demo` runs.

    lightvla demo                      # all stages; those already done are skipped
    lightvla demo --stage evaluate     # one stage alone

The demo adds only data and settings. Each stage is one of the project's ordinary commands, printed before it runs, so
that the same can be done with a 7B checkpoint.
"""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments.robot.libero.results.results import is_complete
from experiments.robot.libero.settings.flags import parse_indices
from lightvla.demo.checks import check_flags
from lightvla.demo.report import write_report
from lightvla.demo.settings import STAGES, TASKS, DemoConfig, Paths, evaluations, stage_commands
from lightvla.processes import end, evaluation_progress, start
from prismatic.atomic_files import write_atomically
from prismatic.command_status import STOPPED, UNUSABLE, print_error

POLL_SECONDS = 1.0

console = Console()


def run_stage(config: DemoConfig, stage: str, force: bool) -> None:
    """Run one stage and record its time, unless it was done with the same commands before.

    A stage that was interrupted goes on where it stopped; one whose commands changed, or that is forced, starts anew,
    and what was made from its outcome counts as not done any more.
    """
    paths = Paths(config.output_dir, config.suffix)
    record = paths.stage(stage)
    commands = stage_commands(config, stage)
    known = json.loads(record.read_text()) if record.is_file() else {}
    same = known.get("commands") == commands
    if same and known["done"] and not force and stage != "report":
        console.print(f"[bold]{stage}[/]: already done ({known['seconds']:.0f} s); remove {record} to do it again")
        return
    goes_on = same and not known["done"]
    if not goes_on:
        _discard(paths, stage)
    seconds = known.get("seconds", 0.0) if goes_on else 0.0
    write_atomically(record, json.dumps({"commands": commands, "done": False, "seconds": seconds}, indent=1))
    console.rule(f"[bold]{stage}[/]")
    for command in commands:
        console.print(f"[dim]$ {shlex.join(command)}[/]", soft_wrap=True)
    began = time.perf_counter()
    try:
        _run_commands(config, stage, commands)
        done = True
    except BaseException:
        done = False
        raise
    finally:
        seconds += time.perf_counter() - began
        write_atomically(record, json.dumps({"commands": commands, "done": done, "seconds": seconds}, indent=1))
    console.print(f"[bold]{stage}[/]: {seconds:.0f} s")


def _run_commands(config: DemoConfig, stage: str, commands: list[list[str]]) -> None:
    if stage == "evaluate":
        _run_evaluations(config, commands)
    elif stage == "report":
        transformers.utils.logging.disable_progress_bar()  # of loading weights, a moment here
        console.print(f"open [bold]{write_report(config).resolve()}[/] in a browser")
    else:
        for command in commands:
            process = start(command)
            try:
                _check(process.wait(), command)
            finally:
                end(process)


def _discard(paths: Paths, stage: str) -> None:
    """Forget what a stage made and that later stages are done. Collection decides itself what it can keep."""
    made = {
        "build": [paths.base],
        "finetune": [paths.unpruned_run, paths.run, paths.baseline_run],
        "evaluate": [paths.evaluation("wide").parent],
    }
    for folder in made.get(stage, []):
        shutil.rmtree(folder, ignore_errors=True)
    for later in STAGES[STAGES.index(stage) :]:
        paths.stage(later).unlink(missing_ok=True)
        if stage == "collect":  # all training seeds share the data
            for record in paths.stage(later).parent.glob(f"{later}*.json"):
                record.unlink()


def _check(returncode: int, command: list[str], log: Path | None = None) -> None:
    if returncode != 0:
        where = f"; its output is in {log}" if log else ""
        sys.exit(f"this command ended with status {returncode}{where}:\n{shlex.join(command)}")


def _run_evaluations(config: DemoConfig, commands: list[list[str]]) -> None:
    """Run the evaluations, `num_processes` at a time, under one progress bar each."""
    paths = Paths(config.output_dir, config.suffix)
    waiting = [
        (evaluation, command)
        for evaluation, command in zip(evaluations(config), commands, strict=True)
        if not is_complete(paths.evaluation(evaluation.name))
    ]
    trials = len(TASKS.split(",")) * len(parse_indices(config.held_out_states, "held_out_states"))
    running: dict[str, tuple[subprocess.Popen, list[str], Path]] = {}
    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("solved {task.fields[solved]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {e.name: progress.add_task(e.title, total=trials, solved=0, start=False) for e, _ in waiting}
        try:
            while waiting or running:
                while waiting and len(running) < config.num_processes:
                    evaluation, command = waiting.pop()  # controls first: they fail, so they last longest
                    log = paths.evaluation(evaluation.name).with_suffix(".log")
                    running[evaluation.name] = (start(command, log), command, log)
                    progress.start_task(bars[evaluation.name])
                time.sleep(POLL_SECONDS)
                for name, (process, command, log) in list(running.items()):
                    _show(progress, bars[name], paths.evaluation(name))
                    if process.poll() is not None:
                        del running[name]
                        _check(process.returncode, command, log)
        finally:
            end(*(process for process, _, _ in running.values()))


def _show(progress: Progress, bar: TaskID, directory: Path) -> None:
    done, solved = evaluation_progress(directory)
    progress.update(bar, completed=done, solved=solved)


def command(config: DemoConfig) -> int:
    """What the command line runs; returns the exit status."""
    try:
        check_flags(config)
    except ValueError as error:
        print_error(error)
        return UNUSABLE
    chosen = STAGES if config.stage == "all" else (config.stage,)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs so
    try:
        for stage in chosen:
            run_stage(config, stage, force=config.stage != "all")
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on where it was")
        return STOPPED
    return 0
