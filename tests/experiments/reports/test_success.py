"""The report's tables and comparisons of several evaluations."""

import shlex
from pathlib import Path

import pytest
from report_results import data_of, digest, episode, save, tables, texts
from scipy import stats

from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.reports.evaluation import load_evaluations
from experiments.robot.libero.reports.groups import group_evaluations
from experiments.robot.libero.results.results import Results
from lightvla.commands.compare import main as compare_command
from prismatic.report.charts import RateBars
from prismatic.report.data import CodeBlock, Table


def test_evaluations_on_the_same_starts_are_compared_and_the_command_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = save(tmp_path / "the better", [episode(1, trial, True) for trial in range(9)])
    worse = save(tmp_path / "worse", [episode(1, trial, trial == 0) for trial in range(9)])
    elsewhere = save(tmp_path / "elsewhere", [episode(4, 0, True)], policy={"checkpoint": "runs/other"})
    blocks = [b for s in data_of(better, worse, elsewhere).sections for b in s.blocks if isinstance(b, CodeBlock)]
    difference, other = blocks[:2]
    assert difference.title == "The difference between the better and worse"
    p_value = stats.binomtest(0, 8).pvalue  # McNemar: eight starts differ, all in one direction
    assert difference.note.startswith("the better is better than worse: +88.9 points")
    assert f"p = {p_value:.3f}" in difference.note
    words = shlex.split(difference.code)
    assert words[:2] == ["python", "scripts/compare_results.py"]
    assert compare_command(words[2:]) == 0 and "88.9" in capsys.readouterr().out
    assert other.note.startswith("Not compared: ") and "elsewhere" in other.code
    assert not any("compare_results" in b.code for s in data_of(worse).sections for b in s.blocks if b.kind == "code")


def test_a_difference_in_mujoco_stands_beside_the_difference(tmp_path: Path) -> None:
    folders = [save(tmp_path / name, [episode(1, trial, True) for trial in range(9)]) for name in ("older", "newer")]
    for folder, version in zip(folders, ("3.2.3", "3.2.7"), strict=True):
        found = Results.load(folder)
        found.versions["mujoco"] = version
        found.save(folder / "results.json")
    blocks = [b for s in data_of(*folders).sections for b in s.blocks if isinstance(b, CodeBlock)]
    assert "Mind: not the same protocol: mujoco 3.2.3 for older; 3.2.7 for newer." in blocks[0].note


def suite_run(folder: Path, suite: str, seed: int, solved: int, states: int = 4, **parts: dict) -> Path:
    """An evaluation of one task that solves the first so many initial states."""
    records = [
        episode(1, state, state < solved, suite=suite, seed=seed, actions_sha256=digest(f"{folder.name} {state}"))
        for state in range(states)
    ]
    return save(folder, records, config={"task_suite_name": suite, "seed": seed}, **parts)


def test_suites_and_seeds_of_a_policy_are_one_column_and_one_comparison(tmp_path: Path) -> None:
    """Two policies, two suites, three seeds: twelve evaluations, one block that compares."""
    solved = {"libero_goal": (4, 3, 2), "libero_10": (2, 2, 2)}
    folders = [
        suite_run(tmp_path / f"{name}-{suite}-{seed}", suite, seed, max(0, own - worse), policy={"checkpoint": name})
        for name, worse in (("runs/mine", 0), ("runs/theirs", 2))
        for suite, counts in solved.items()
        for seed, own in zip((7, 8, 9), counts, strict=True)
    ]
    data = data_of(*folders)
    (success,) = (section for section in data.sections if section.title == "Success")
    means, chart, *rest = success.blocks
    assert isinstance(means, Table) and isinstance(chart, RateBars)
    assert [row[:4] for row in texts(means)] == [["mine", "75.0", "50.0", "62.5"], ["theirs", "25.0", "0.0", "12.5"]]
    # A seed is no trial: four initial states, of which three, two and one seeds solve three, two and one.
    assert chart.names == ["libero_goal", "libero_10"]
    assert chart.series == {"mine": [(3.0, 4), (2, 4)], "theirs": [(pytest.approx(1.0), 4), (0, 4)]}
    *of_tasks, difference = rest
    assert [table.title for table in of_tasks] == ["Tasks of libero_goal", "Tasks of libero_10"]
    assert isinstance(difference, CodeBlock) and len(shlex.split(difference.code)) == 2 + 6 + 1 + 6 + 3
    verdict = compare(*([Results.load(f) for f in folders[n : n + 6]] for n in (0, 6)), ("mine", "theirs")).verdict
    assert difference.note.startswith(verdict)
    assert [headline.value for headline in data.headlines] == ["15 of 24", "3 of 24"]
    assert "12 evaluations of mine" in data.summary[0] and "4 initial states" not in data.headlines[0].label
    assert "8 initial states, with several seeds" in data.headlines[0].label
    (protocol,) = (table for title, table in tables(data).items() if title == "What was done")
    facts = {row[0]: row[1] for row in texts(protocol)}
    assert list(protocol.columns) == ["setting", "mine", "theirs"]
    assert facts["suite"] == "libero_goal; libero_10"


def test_the_same_rollouts_twice_stay_apart(tmp_path: Path) -> None:
    """One policy on the same episodes under what nobody recorded: two columns, and their difference."""
    first, again = (suite_run(tmp_path / name, "libero_goal", 7, solved) for name, solved in (("a", 4), ("b", 1)))
    other = suite_run(tmp_path / "c", "libero_goal", 8, 2)
    groups = group_evaluations(load_evaluations([first, again, other]))
    assert [[part.name for part in group.parts] for group in groups] == [["a", "c"], ["b"]]
    assert [group.name for group in groups] == ["small", "b"] and groups[0].paths == [str(first), str(other)]


def test_seeds_that_repeat_each_other_count_once_and_it_is_said(tmp_path: Path) -> None:
    folders = [tmp_path / f"seed{seed}" for seed in (7, 8)]
    for folder, seed in zip(folders, (7, 8), strict=True):
        records = [
            episode(1, state, state > 0, seed=seed, actions_sha256=digest(f"same {state}")) for state in range(3)
        ]
        save(folder, records, config={"seed": seed})
    data = data_of(*folders)
    assert any("3 of 6 rollouts only repeat" in alert for alert in data.alerts)
    assert data.headlines[0].value == "2 of 3"
