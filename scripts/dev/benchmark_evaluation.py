"""The same evaluation three ways: as the research code runs it, serially, and with simulator processes.

    python scripts/dev/benchmark_evaluation.py --output_dir /tmp/benchmark -- \
        --pretrained_checkpoint demo/runs/small --task_suite_name libero_goal --task_ids 1,4 --initial_states 30-49 \
        --wide_starts_m 0.06 --env_img_res 128 --renderer fast

What follows `--` are the flags of `run_libero_eval.py`. `as the reference` draws both cameras at every step in one
process; the other two draw only what the policy is shown. All three run one after the other, so nothing else should
run beside them; the actions of all three must be equal, hash by hash. Then follows what the measured times mean for
more cores and GPUs, as plain arithmetic. Ends with 0, with 1 where actions differ, or as the evaluation that failed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.robot.libero.results.results import Results
from prismatic.command_status import UNWANTED, print_error

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "robot" / "libero" / "run_libero_eval.py"


@dataclass(frozen=True)
class Way:
    """A way to run the evaluation, and the flags that make it so."""

    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What one rollout costs on average.

    Attributes:
        simulation_s: seconds of one core, drawing included, the policy not.
        policy_s: seconds inside the policy.
        queries: calls of the policy.
    """

    simulation_s: float
    policy_s: float
    queries: float


def ways(num_envs: int) -> list[Way]:
    return [
        Way("as the reference", ("--num_envs", "1", "--render_every_step", "True")),
        Way("one process", ("--num_envs", "1")),
        Way(f"{num_envs} simulators", ("--num_envs", str(num_envs))),
    ]


def evaluate(way: Way, flags: list[str], folder: Path) -> Results:
    """Run the command, and read what it found. Raises CalledProcessError where it does not end with 0."""
    command = [sys.executable, str(SCRIPT), *flags, *way.flags, "--output_dir", str(folder)]
    subprocess.run(command, check=True)
    return Results.load(folder)


def same_rollouts(first: Results, second: Results) -> bool:
    """Whether both did the same on the same episodes: every action to the last bit, tokens kept, and how it ended."""
    return first.outcome()["episodes"] == second.outcome()["episodes"]


def cost_per_rollout(serial: Results) -> Cost:
    """From an evaluation in one process, where the time of a rollout is simulation plus policy."""
    policy = [sum(episode.latency_ms) / 1000 for episode in serial.episodes]
    wall = [episode.wall_seconds for episode in serial.episodes]
    queries = [len(episode.latency_ms) for episode in serial.episodes]
    return Cost(float(np.mean(wall) - np.mean(policy)), float(np.mean(policy)), float(np.mean(queries)))


def rollouts_per_hour(cost: Cost, cores: int, policies: int, query_ms: float | None = None) -> float:
    """Whichever is the bottleneck: simulators on `cores`, or `policies` that take one policy query after the other.

    Args:
        query_ms: of one policy query; None: as measured here. A policy on a CPU takes its cores from the simulators.
    """
    if query_ms is None:
        return 3600 * cores / (cost.simulation_s + cost.policy_s)
    return 3600 * min(cores / cost.simulation_s, policies / (cost.queries * query_ms / 1000))


def time_table(results: dict[str, Results]) -> Table:
    table = Table(title="the same rollouts, three ways")
    for heading in ("way", "seconds", "per rollout", "speed-up", "solved", "same actions"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    first = next(iter(results.values()))
    for name, found in results.items():
        seconds, summary = found.run["seconds"], found.summary()["all"]
        table.add_row(
            name,
            f"{seconds:.1f}",
            f"{seconds / len(found.episodes):.2f}",
            f"{first.run['seconds'] / seconds:.2f}",
            f"{summary['successes']}/{summary['trials']}",
            "yes" if same_rollouts(first, found) else "NO",
        )
    return table


def projection_table(cost: Cost, query_ms: float) -> Table:
    table = Table(title=f"rollouts per hour, by arithmetic (GPU: {query_ms:g} ms per policy query, one at a time)")
    for heading in ("machine", "this policy on the CPU", "policy on 1 GPU", "policies on 8 GPUs"):
        table.add_column(heading, justify="left" if heading == "machine" else "right")
    for cores in (2, 16, 64):
        cells = (
            rollouts_per_hour(cost, cores, 1),
            rollouts_per_hour(cost, cores, 1, query_ms),
            rollouts_per_hour(cost, cores, 8, query_ms),
        )
        table.add_row(f"{cores} cores", *(f"{cell:,.0f}" for cell in cells))
    return table


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's own flags, and those of the evaluation."""
    own, flags = list(arguments), []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder for the three evaluations")
    parser.add_argument("--num_envs", type=int, default=2, help="simulator processes of the third way")
    about = "assumed time of one policy query on a GPU, for the table"
    parser.add_argument("--query_ms", type=float, default=20.0, help=about)
    given = parser.parse_args(own)
    if not flags:
        parser.error("give the flags of run_libero_eval.py after --")
    return given, flags


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    given, flags = parse(arguments)
    console = Console()
    results = {}
    for way in ways(given.num_envs):
        console.rule(way.name)
        try:
            results[way.name] = evaluate(way, flags, given.output_dir / way.name.replace(" ", "_"))
        except subprocess.CalledProcessError as failed:
            print_error(f"the evaluation '{way.name}' ended with status {failed.returncode}")
            return failed.returncode if failed.returncode > 0 else 128 - failed.returncode
    cost = cost_per_rollout(results["one process"])
    console.print(time_table(results))
    queries = f"{cost.queries:.1f} policy queries"
    shares = f"{cost.simulation_s:.2f} s of simulation, {cost.policy_s:.2f} s of policy in {queries}"
    console.print(f"one rollout: {shares}")
    console.print(projection_table(cost, given.query_ms))
    figures = {name: {"seconds": found.run["seconds"], **found.summary()["all"]} for name, found in results.items()}
    (given.output_dir / "benchmark.json").write_text(json.dumps({"ways": figures, "cost": vars(cost)}, indent=1))
    first, *others = results.values()
    return 0 if all(same_rollouts(first, other) for other in others) else UNWANTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
