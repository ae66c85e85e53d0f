"""What the demo's report says of its aims."""

from pathlib import Path

import pytest
from report_results import episode, save

from experiments.robot.libero.results.results import Results
from lightvla.demo.report import success_rows


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
    names = ("standard", "wide", "blank", "swapped", "random")
    standard, *_ = success_rows(dict.fromkeys(names, results))
    assert (standard.expected, standard.met) == told
