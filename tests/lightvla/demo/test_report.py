"""What the demo's report says of its aims."""

from pathlib import Path

import pytest
from report_results import episode, save

from experiments.robot.libero.results.results import Results
from lightvla.demo.report import against_baseline, success_rows


@pytest.mark.parametrize(
    ("rollouts", "successes", "told"),
    [(36, 30, ("at least 30", True)), (36, 29, ("at least 30", False)), (3, 3, ("", None))],
)
def test_aims_are_of_the_demo_s_own_number_of_rollouts(tmp_path: Path, rollouts: int, successes: int, told) -> None:
    results = Results.load(
        save(
            tmp_path,
            [episode(1, trial, trial < successes, other_task=8, other_success=False) for trial in range(rollouts)],
        )
    )
    names = ("standard", "wide", "baseline", "blank", "swapped", "random")
    standard, *_ = success_rows(dict.fromkeys(names, results))
    assert (standard.expected, standard.met) == told


def test_the_verdict_is_about_pairs_of_the_same_start(tmp_path: Path) -> None:
    """Nine starts: the first five solved by the pruned policy, the last six by the other."""
    pruned, baseline = (
        Results.load(save(tmp_path / name, [episode(1, trial, trial in solved) for trial in range(9)]))
        for name, solved in (("pruned", range(5)), ("baseline", range(3, 9)))
    )
    for number, each in enumerate(baseline.episodes):
        each.actions_sha256 = f"another {number}"
    table = against_baseline(pruned, baseline)
    *_, everything = table.rows
    assert everything[:7] == ("all", "5 of 9", "6 of 9", "2", "3", "4", "0")
    assert everything[7].startswith("-11.1 (") and "Pruned and not pruned are not distinguishable" in table.note
