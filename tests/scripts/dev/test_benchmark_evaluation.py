"""The benchmark's arithmetic by hand-worked numbers, what it calls the same actions, and how it ends."""

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.robot.libero.results.results import EpisodeRecord, Results
from scripts.dev.benchmark_evaluation import Cost, cost_per_rollout, main, rollouts_per_hour, same_rollouts, time_table


def evaluated(*rollouts: tuple[float, list[float]], seconds: float = 40.0, version: str = "1") -> Results:
    """Rollouts of so many seconds in all, with so many milliseconds per policy query."""
    episodes = [
        EpisodeRecord(
            "libero_goal", 1, "do", "do", trial, trial, 7, success=trial > 0, wall_seconds=wall, latency_ms=queries,
            actions_sha256=f"{trial:064x}",
        )
        for trial, (wall, queries) in enumerate(rollouts)
    ]  # fmt: skip
    return Results({"seconds": seconds}, {}, {}, {"numpy": version}, episodes)


def test_cost_of_a_rollout_by_hand() -> None:
    # 4 s with 1 s of policy and 8 s with 2 s: on average 6 s, 1.5 s of it policy, in 2 and 4 queries.
    cost = cost_per_rollout(evaluated((4.0, [400.0, 600.0]), (8.0, [500.0] * 4)))
    assert cost == Cost(simulation_s=4.5, policy_s=1.5, queries=3.0)


@pytest.mark.parametrize(
    ("cores", "policies", "query_ms", "expected"),
    [
        (2, 1, None, 1200.0),  # two cores, a rollout of 6 s each
        (2, 1, 100.0, 1600.0),  # two simulators of 4.5 s; the policy could do 12000
        (64, 1, 100.0, 12000.0),  # one policy that takes 3 queries in 0.3 s; the simulators could do 51200
        (64, 8, 100.0, 51200.0),
    ],
)
def test_rollouts_per_hour_by_hand(cores: int, policies: int, query_ms: float | None, expected: float) -> None:
    assert rollouts_per_hour(Cost(4.5, 1.5, 3.0), cores, policies, query_ms) == pytest.approx(expected)


def test_the_same_actions_are_those_of_the_rollouts() -> None:
    first = evaluated((4.0, [400.0]), (8.0, [500.0]), seconds=20.0)
    slower = evaluated((9.0, [900.0]), (9.0, [900.0]), seconds=40.0, version="2")
    slower.policy["device"] = "cuda"
    assert same_rollouts(first, slower), "neither times nor versions are actions"
    moved = replace(slower, episodes=[slower.episodes[0], replace(slower.episodes[1], actions_sha256="f" * 64)])
    failed = replace(slower, episodes=[slower.episodes[0], replace(slower.episodes[1], success=False)])
    assert not same_rollouts(first, moved) and not same_rollouts(first, failed)
    assert not same_rollouts(first, replace(slower, episodes=slower.episodes[:1]))
    table = time_table({"a": first, "b": slower, "c": moved})
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["same actions"] == ["yes", "yes", "NO"]
    assert cells["speed-up"] == ["1.00", "0.50", "0.50"] and cells["per rollout"] == ["10.00", "20.00", "20.00"]
    assert cells["solved"] == ["1/2"] * 3


def test_an_evaluation_that_fails_ends_it_with_its_status(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--pretrained_checkpoint", "x", "--task_suite_name", "kitchen"]
    assert main(["--output_dir", str(tmp_path), "--", *flags]) == 2
    said = capfd.readouterr()
    assert said.err.splitlines()[-1] == "error: the evaluation 'as the reference' ended with status 2"
    assert "unknown LIBERO suite" in said.err and "Traceback" not in said.out + said.err
    assert not (tmp_path / "benchmark.json").exists()
