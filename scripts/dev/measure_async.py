"""Asynchronous action chunks against synchronous ones, with latency added to every policy query.

    python scripts/dev/measure_async.py --checkpoint demo/runs/small --output async.jsonl

The simulator is the robot and its time the clock: an answer comes so many milliseconds of simulated time after its
request, whatever the policy really takes. Synchronously the robot holds meanwhile; asynchronously it executes the
chunk that it has. Without latency both are the same, action for action, and are run once. Everything is repeatable. A
rollout is a line of the output file; those in it are not run again.
"""

import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `scripts` is no installed package

from experiments.robot.libero.driving.loop import drive
from experiments.robot.libero.settings.suite_names import STEP_CAPS
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.command_line import parse_or_exit
from prismatic.policy import Policy
from prismatic.serving.asking import InSimulatedTime
from prismatic.serving.executed import Action
from prismatic.serving.runner import ChunkRunner, RunnerSettings
from prismatic.significance import PairedCounts, mcnemar_exact, wilson_interval


@dataclass
class AsyncConfig:
    """What to roll out."""

    checkpoint: Path  # folder of a policy
    output: Path  # file of results, a line per rollout; it goes on where it stopped
    task_suite_name: str = "libero_goal"  # whose step cap holds
    task_ids: str = "1,4,8"  # tasks of the suite
    initial_states: str = "30-41"  # of each task, first and last
    latencies_ms: str = "0,100,300"  # added to every policy query, in simulated time
    env_img_res: int = 128  # side of the pictures in pixels
    seed: int = 7  # of the simulator's resets
    num_threads: int = 1  # of torch


Key = tuple[int, bool, int, int]
"""Latency in milliseconds, whether asynchronous, task, initial state."""


def modes_of(latency_ms: int) -> tuple[bool, ...]:
    """Synchronous and asynchronous, where that makes a difference."""
    return (False, True) if latency_ms else (False,)


def key_of(line: dict[str, Any]) -> Key:
    return line["latency_ms"], line["asynchronous"], line["task"], line["initial_state"]


def roll_out(policy: Policy, environment: LiberoEnvironment, key: Key, seed: int) -> dict[str, Any]:
    """One line of the output."""
    latency_ms, asynchronous, task, state = key
    rate = policy.robot.control_rate_hz
    steps = Counter[str]()

    def clock() -> float:
        return steps["taken"] / rate

    environment.reset(state, seed=seed)
    asker = InSimulatedTime(policy, latency_ms / 1000, clock)
    runner = ChunkRunner(asker, policy.robot, RunnerSettings(asynchronous=asynchronous), clock=clock)
    runner.begin(environment.task.language)
    driven = drive(
        environment,
        runner,
        STEP_CAPS[environment.task.suite],
        on_step=lambda *_: steps.update(taken=1),
    )
    ages = [record.age_s for record in runner.log if isinstance(record, Action)]
    return {
        "latency_ms": latency_ms,
        "asynchronous": asynchronous,
        "task": task,
        "initial_state": state,
        **asdict(driven),
        "oldest_action_s": round(max(ages), 3),
        "stopped": len(runner.watchdog.history),
    }


def main() -> None:
    config = parse_or_exit(AsyncConfig)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(config.num_threads)
    first, _, last = config.initial_states.partition("-")
    latencies = [int(word) for word in config.latencies_ms.split(",")]
    cells = [(latency, mode) for latency in latencies for mode in modes_of(latency)]
    lines = [json.loads(line) for line in config.output.read_text().splitlines()] if config.output.exists() else []
    done = {key_of(line) for line in lines}
    policy = Policy.from_pretrained(config.checkpoint, device="cpu", dtype=torch.float32)
    for task in map(int, config.task_ids.split(",")):
        environment = LiberoEnvironment(
            load_task(config.task_suite_name, task), config.env_img_res, renderer="fast", seed=config.seed
        )
        with environment, config.output.open("a") as file:
            for state, cell in itertools.product(range(int(first), int(last or first) + 1), cells):
                if (key := (*cell, task, state)) in done:
                    continue
                line = roll_out(policy, environment, key, config.seed)
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                console.print(f"{key}: {'solved' if line['success'] else 'failed'} in {line['steps']} control steps")
    show(console, lines, latencies, policy.robot.control_rate_hz)


def all_solved(rows: Sequence[dict[str, Any]]) -> bool:
    return all(row["success"] for row in rows)


def p_of(ones: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> float:
    """McNemar's exact test on the same initial states."""
    paired = PairedCounts.of([[(one["success"], other["success"])] for one, other in zip(ones, others, strict=True)])
    return mcnemar_exact(int(paired.only_first), int(paired.only_second))


def show(console: Console, lines: list[dict[str, Any]], latencies: list[int], rate: float) -> None:
    """One row per latency and mode."""
    by_key = {key_of(line): line for line in lines}
    table = Table("latency", "chunks", "solved", "95 %", "actions/s", "steps to success*", "p", caption=(
        "* mean over initial states that both modes solved at this latency; p: McNemar's exact test between both"
    ))  # fmt: skip
    for latency in latencies:
        modes = modes_of(latency)
        starts = sorted({key[2:] for key in by_key if all((latency, mode, *key[2:]) in by_key for mode in modes)})
        rows = {mode: [by_key[(latency, mode, *start)] for start in starts] for mode in modes}
        if not starts:
            continue
        for mode, own in rows.items():
            solved = sum(row["success"] for row in own)
            low, high = wilson_interval(solved, len(own))
            both = [row["steps"] for row, *pair in zip(own, *rows.values(), strict=True) if all_solved(pair)]
            table.add_row(
                f"{latency} ms",
                ("asynchronous" if mode else "synchronous") if latency else "either",
                f"{solved} of {len(own)}",
                f"{100 * low:.0f}-{100 * high:.0f} %",
                f"{rate * sum(row['actions'] for row in own) / sum(row['steps'] for row in own):.1f}",
                f"{mean(both):.0f} ({mean(both) / rate:.1f} s, n={len(both)})" if both else "",
                f"{p_of(rows[False], own):.2f}" if mode else "",
            )
    console.print(table)


if __name__ == "__main__":
    main()
