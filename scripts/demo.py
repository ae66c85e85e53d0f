"""From nothing to a small LightVLA that acts in the LIBERO simulator, and a report: what `make demo` runs.

    python scripts/demo.py                      # all stages; those already done are skipped
    python scripts/demo.py --stage evaluate     # one stage alone

The demo adds only data and settings. Each stage is one of the project's ordinary commands, printed before it runs, so
that the same can be done with a 7B checkpoint.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import draccus
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `scripts` is no installed package
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not take the cores from other processes

from scripts.demo_report import write_report  # noqa: E402
from scripts.demo_settings import STAGES, TASKS, DemoConfig, Paths, evaluations, stage_commands  # noqa: E402

POLL_SECONDS = 1.0

console = Console()


def run_stage(config: DemoConfig, stage: str, force: bool) -> None:
    """Run one stage and record its time, unless it was done with the same commands before."""
    record = Paths(config.output_dir, config.suffix).stage(stage)
    commands = stage_commands(config, stage)
    done = json.loads(record.read_text()) if record.is_file() else None
    if done and done["commands"] == commands and not force and stage != "report":
        console.print(f"[bold]{stage}[/]: already done ({done['seconds']:.0f} s); remove {record} to do it again")
        return
    console.rule(f"[bold]{stage}[/]")
    for command in commands:
        console.print(f"[dim]$ {shlex.join(command)}[/]", soft_wrap=True)
    began = time.perf_counter()
    if stage == "evaluate":
        _run_evaluations(config, commands)
    elif stage == "report":
        _report(config)
    else:
        for command in commands:
            _check(_start(command).wait(), command)
    seconds = time.perf_counter() - began
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"commands": commands, "seconds": seconds}, indent=1))
    console.print(f"[bold]{stage}[/]: {seconds:.0f} s")


def _start(command: list[str], log: Path | None = None) -> subprocess.Popen:
    """Start one of the project's commands with this interpreter; output goes to `log`, else to the terminal."""
    interpreter = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if log is not None:
        environment["OMP_NUM_THREADS"] = "1"  # as many evaluations run beside each other as there are cores
        log.parent.mkdir(parents=True, exist_ok=True)
    output = None if log is None else log.open("w")
    return subprocess.Popen(
        [*interpreter[command[0]], *command[1:]],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
    )


def _check(returncode: int, command: list[str], log: Path | None = None) -> None:
    if returncode != 0:
        where = f"; its output is in {log}" if log else ""
        sys.exit(f"this command ended with status {returncode}{where}:\n{shlex.join(command)}")


def _run_evaluations(config: DemoConfig, commands: list[list[str]]) -> None:
    """Run the evaluations, `num_processes` at a time, under one progress bar each."""
    paths = Paths(config.output_dir, config.suffix)
    waiting = list(zip(evaluations(config), commands, strict=True))
    first, last = map(int, config.held_out_states.split("-"))
    trials = len(TASKS.split(",")) * (last - first + 1)
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
                    evaluation, command = waiting.pop(0)
                    log = paths.evaluation(evaluation.name).with_suffix(".log")
                    running[evaluation.name] = (_start(command, log), command, log)
                    progress.start_task(bars[evaluation.name])
                time.sleep(POLL_SECONDS)
                for name, (process, command, log) in list(running.items()):
                    _show(progress, bars[name], paths.evaluation(name))
                    if process.poll() is not None:
                        del running[name]
                        _check(process.returncode, command, log)
        finally:
            for process, _, _ in running.values():
                process.terminate()


def _show(progress: Progress, bar: TaskID, directory: Path) -> None:
    try:
        results = json.loads((directory / "results.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return
    episodes = results["episodes"]
    solved = sum(bool(episode["success"]) for episode in episodes)
    progress.update(bar, completed=len(episodes), solved=solved)


def _report(config: DemoConfig) -> None:
    path = write_report(config)
    console.print(f"open [bold]{path.resolve()}[/] in a browser")


def main() -> None:
    config = draccus.parse(DemoConfig)
    if config.stage not in ("all", *STAGES):
        sys.exit(f"unknown stage {config.stage!r}; known: all, {', '.join(STAGES)}")
    os.chdir(ROOT)
    chosen = STAGES if config.stage == "all" else (config.stage,)
    for stage in chosen:
        run_stage(config, stage, force=config.stage != "all")


if __name__ == "__main__":
    main()
