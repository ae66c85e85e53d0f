"""The steps of a study, run: one that uses all cores at a time, evaluations beside each other, one view of all."""

import fcntl
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as View

from lightvla.processes import end, evaluation_progress, start
from lightvla.study.places import Places
from lightvla.study.progress import Progress, units_done, wall_seconds
from lightvla.study.records import fix
from lightvla.study.steps import Step, filled_in
from prismatic.report.data import duration

POLL_SECONDS = 1.0


class StepFailed(Exception):
    """The command of a step ended with an error; says which, and where its output is."""


@dataclass
class _Running:
    step: Step
    process: subprocess.Popen
    before: float
    began: float
    bar: TaskID

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began


@contextmanager
def held(places: Places) -> Iterator[None]:
    """Raises ValueError where another process runs the same study."""
    places.work.mkdir(parents=True, exist_ok=True)
    with (places.work / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{places.root} is being run by another process; wait for it, or end it") from error
        yield


def run_steps(progress: Progress, steps: Sequence[Step], num_processes: int, console: Console) -> None:
    """Run what is left, each step as soon as what it needs is done. Interrupted, it leaves nothing running.

    Raises:
        StepFailed: when a command ends with an error; steps beside it are ended, and go on where they were next time.
        KeyboardInterrupt: when it is told to stop, likewise.
    """
    waiting, running = list(steps), list[_Running]()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[said]}"))
    with View(*columns, TimeElapsedColumn(), console=console) as view:
        seconds = progress.estimates()
        total = wall_seconds(steps, seconds, num_processes)
        whole = view.add_task("the study", total=max(total, 1e-9), said=f"about {duration(total)}")
        try:
            while waiting or running:
                while (step := _next(waiting, running, num_processes)) is not None:
                    waiting.remove(step)
                    running.append(_start(progress, step, num_processes, view, console))
                time.sleep(POLL_SECONDS)
                for each in list(running):
                    _show(view, each)
                    if each.process.poll() is not None:
                        running.remove(each)
                        _finish(progress, each, view, console)
                left = wall_seconds(waiting, progress.estimates(), num_processes)
                shares = sum(
                    wall_seconds([each.step], progress.estimates(), num_processes) * (1 - _share(each.step))
                    for each in running
                )
                ahead = left + shares
                view.update(whole, completed=max(0.0, total - ahead), said=f"about {duration(ahead)} left")
        finally:
            end(*(each.process for each in running))
            for each in running:
                progress.end(each.step, each.seconds, done=False)


def _next(waiting: Sequence[Step], running: Sequence[_Running], num_processes: int) -> Step | None:
    """A step that can begin now: evaluations beside each other, anything else alone."""
    unfinished = {step.name for step in waiting} | {each.step.name for each in running}
    ready = [step for step in waiting if not unfinished & set(step.needs)]
    evaluations = [step for step in ready if step.kind == "evaluate"]
    others = [step for step in ready if step.kind != "evaluate"]
    if running:
        beside = len(running) < num_processes and all(each.step.kind == "evaluate" for each in running)
        return evaluations[0] if beside and evaluations else None
    # As many evaluations as there are processes, or nothing else to do: else a core would idle.
    if others and len(evaluations) < num_processes:
        return others[0]
    return next(iter(evaluations or others), None)


def _start(progress: Progress, step: Step, num_processes: int, view: View, console: Console) -> _Running:
    places = progress.places
    if step.arm:
        fix(progress.study, places)
    command = filled_in(step, num_processes, progress.count_for(step))
    before = progress.begin(step)
    log = places.log(step.name)
    console.print(f"[bold]{step.name}[/] [dim](log: {log})[/]\n[dim]$ {shlex.join(command)}[/]", soft_wrap=True)
    process = start(command, log, append=True, one_thread=step.kind == "evaluate" and num_processes > 1)
    bar = view.add_task(step.name, total=step.units, said="")
    return _Running(step, process, before, time.perf_counter(), bar)


def _finish(progress: Progress, each: _Running, view: View, console: Console) -> None:
    step, status = each.step, each.process.returncode
    view.remove_task(each.bar)
    progress.end(step, each.seconds, done=status == 0)
    if status != 0:
        log = progress.places.log(step.name)
        command = shlex.join(map(str, each.process.args[1:]))  # type: ignore[union-attr,index,arg-type]
        raise StepFailed(f"{step.name} ended with status {status}; its output is in {log}\npython {command}")
    console.print(f"[bold]{step.name}[/]: {duration(each.seconds)}")


def _share(step: Step) -> float:
    return min(1.0, units_done(step) / step.units)


def _show(view: View, each: _Running) -> None:
    said = f"solved {evaluation_progress(each.step.makes)[1]}" if each.step.kind == "evaluate" else ""
    view.update(each.bar, completed=units_done(each.step), said=said)
