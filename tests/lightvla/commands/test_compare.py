"""The script as people run it: a process of its own on results files."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.robot.libero.comparison.compare import compare, span
from experiments.robot.libero.comparison.table_formats import to_csv, to_latex, to_markdown
from experiments.robot.libero.comparison.tables import comparison_table, result_table
from experiments.robot.libero.results.naming import policy_names
from experiments.robot.libero.results.results import EpisodeRecord, Results

ROOT = Path(__file__).resolve().parents[3]

Outcomes = dict[int, list[bool | None]]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compare_results.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


def evaluated(
    folder: Path,
    outcomes: Outcomes,
    checkpoint: str | None = "runs/ours",
    seed: int = 7,
    policy: dict[str, str] | None = None,
    mujoco: str = "3.2.3",
    **config: object,
) -> Path:
    """A results.json in its folder; returns the folder."""
    episodes = [
        EpisodeRecord(
            "libero_goal", task, f"put_the_bowl_{task}", "put", state, state, seed, success=success,
            invalid="Traceback" if success is None else None, tokens_kept=[17], num_visual_tokens=98,
            latency_ms=[20.0, 18.0], bddl_sha256=f"{task:064x}", init_states_sha256=f"{task:064x}",
        )
        for task, solved in outcomes.items()
        for state, success in enumerate(solved)
    ]  # fmt: skip
    described = {"checkpoint": checkpoint, "pruner": "lightvla:multiplicity=weighted", "robot": {"open_loop_steps": 8}}
    run_facts = {"renderer": "fast", "complete": True}
    Results(run_facts, dict(config), {**described, **(policy or {})}, {"mujoco": mujoco}, episodes).save(
        folder / "results.json"
    )
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    return evaluated(tmp_path / "a", {1: [True] * 9 + [False] * 3, 4: [True] * 10 + [False] * 2})


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return evaluated(tmp_path / "b", {1: [True] + [False] * 11, 4: [True] * 2 + [False] * 10}, "runs/theirs")


def test_the_verdict_is_the_last_line(ours: Path, theirs: Path) -> None:
    done = run(ours, "--against", theirs / "results.json", "--plan", 10)
    assert done.returncode == 0 and done.stderr == ""
    comparison = compare([Results.load(ours)], [Results.load(theirs)], ("ours", "theirs"))
    assert done.stdout.rstrip().endswith(comparison.verdict)
    assert comparison.verdict.startswith("ours is better than theirs: +66.7 points")
    assert "1/8/0/3" in done.stdout and "2/8/0/2" in done.stdout and "3/16/0/5" in done.stdout
    assert all(line in done.stdout for line in comparison.plan(0.1))
    assert "Mind:" not in done.stdout
    # The interval of the last row is the verdict's, in the same words.
    assert done.stdout.count(span(comparison.overall.interval, signed=True)) == 2


def test_names_and_warnings(ours: Path, theirs: Path, tmp_path: Path) -> None:
    other = evaluated(tmp_path / "c", {1: [True] * 3, 4: [False] * 3}, env_img_res=128)
    done = run(ours, "--against", other, "--names", "[bold]A", "B")
    assert done.returncode == 0
    assert "[bold]A and B are not distinguishable" in done.stdout, "names are text, not markup"
    assert (
        "Mind: not the same protocol: side of the pictures in pixels not recorded for [bold]A; 128 for B."
        in done.stdout
    )
    assert "Episodes: 6 counted of 6 in both; 18 in [bold]A only, 0 in B only." in done.stdout


def test_sides_of_several_files(ours: Path, theirs: Path, tmp_path: Path) -> None:
    more = [evaluated(tmp_path / f"{side}8", {1: [side == "a"] * 12}, f"runs/{side}", seed=8) for side in "ab"]
    done = run(ours, more[0], "--against", more[1], theirs, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["level"], row["episodes"]) for row in rows] == [("task", "24"), ("task", "12"), ("suite", "36")]
    assert (rows[0]["only_first"], rows[2]["only_first"]) == ("20", "28")
    assert "is better than" in done.stderr


@pytest.mark.parametrize(("kind", "suffix", "writer"), [
    ("markdown", "md", to_markdown), ("csv", "csv", to_csv), ("latex", "tex", to_latex),
])  # fmt: skip
def test_formats_and_files(ours: Path, theirs: Path, tmp_path: Path, kind, suffix, writer) -> None:
    expected = writer(comparison_table(compare([Results.load(ours)], [Results.load(theirs)], ("ours", "theirs"))))
    done = run(ours, "--against", theirs, "--format", kind)
    assert done.stdout == expected
    assert (done.stdout + done.stderr).count("ours is better than theirs") == 1, "a verdict is said once"
    file = tmp_path / "new folder" / f"table.{suffix}"
    done = run(ours, "--against", theirs, "--output", file)
    assert file.read_text(encoding="utf-8") == expected
    assert "ours is better than theirs" in done.stdout and str(file) in done.stderr


@pytest.mark.parametrize("kind", ["rich", "markdown", "csv", "latex"])
def test_mujocos_of_two_pythons_are_not_paired_without_a_word(ours: Path, tmp_path: Path, kind: str) -> None:
    other = evaluated(tmp_path / "c", {1: [True] * 12}, "runs/theirs", mujoco="3.2.7")
    done = run(ours, "--against", other, *(() if kind == "rich" else ("--format", kind)))
    assert done.returncode == 0
    assert "not the same protocol: mujoco 3.2.3 for ours; 3.2.7 for theirs" in " ".join(
        (done.stdout + done.stderr).split()
    )


def test_one_result_is_told_task_by_task(ours: Path, tmp_path: Path) -> None:
    done = run(ours, "--plan", 5)
    assert done.returncode == 0
    assert "put the bowl 1" in done.stdout and "9/12" in done.stdout and "19/24" in done.stdout
    assert "ours solves 79.2 %; another policy 5 points away" in done.stdout
    assert run(ours, "--format", "markdown").stdout == to_markdown(result_table(Results.load(ours)))
    assert run(ours, "--format", "csv", "--output", tmp_path / "table.dat").returncode == 0
    assert (tmp_path / "table.dat").read_text(encoding="utf-8") == to_csv(result_table(Results.load(ours)))
    file = tmp_path / "table.txt"
    assert run(ours, "--output", file).returncode == 0 and "19/24" in file.read_text(encoding="utf-8")


def test_several_results_are_policies_by_suites(ours: Path, theirs: Path, tmp_path: Path) -> None:
    again = evaluated(tmp_path / "a8", {1: [True] * 12, 4: [False] * 12}, "runs/ours", seed=8)
    done = run(ours, again, theirs, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["policy"], row["trials"], row["initial_states"]) for row in rows] == (
        [("ours", "48", "24"), ("theirs", "24", "24")]
    )
    assert float(rows[0]["rate"]) == pytest.approx((19 / 24 + 12 / 24) / 2)
    named = run(ours, again, theirs, "--names", "x", "y", "y", "--format", "csv")
    assert [(row["policy"], row["runs"]) for row in csv.DictReader(io.StringIO(named.stdout))] == [
        ("x", "1"),
        ("y", "2"),
    ]


def test_controls_and_folders_tell_equal_checkpoints_apart(ours: Path, tmp_path: Path) -> None:
    blank = evaluated(tmp_path / "blank", {1: [False] * 12, 4: [False] * 12}, control="blank_images")
    assert "ours is better than ours (blank images):" in run(ours, "--against", blank).stdout
    again = evaluated(tmp_path / "later", {1: [False] * 12, 4: [False] * 12})
    assert "a is better than later" in run(ours, "--against", again).stdout


def names_of(*policies: tuple[str | None, dict[str, str]], **config: object) -> list[str]:
    found = []
    for checkpoint, policy in policies:
        own = {} if checkpoint is None else {"checkpoint": checkpoint}
        found.append(Results({}, dict(config), {**own, **policy}, {}, []))
    return policy_names(found)


def test_different_policies_have_different_names() -> None:
    assert names_of(("runs/ours", {}), ("runs/ours/", {}), ("runs/theirs", {})) == ["ours", "ours", "theirs"]
    assert names_of(("a/small", {}), ("b/small", {}), ("c/large", {})) == ["a/small", "b/small", "large"]
    urls = ["ws://pc:8000", "ws://pc:8001"]
    assert names_of(*((None, {"policy_url": url}) for url in urls)) == ["pc:8000", "pc:8001"]
    assert names_of(*((None, {"policy_url": f"ws://{host}/pi"}) for host in "ab")) == ["a/pi", "b/pi"]
    # A server that names its checkpoint is that policy, wherever it runs.
    assert names_of(*(("runs/ours", {"policy_url": url}) for url in urls)) == ["ours", "ours"]
    pruners = ["lightvla", "lightvla:multiplicity=set", "lightvla_star:queries=64", "lightvla_star:queries=128", "none"]
    assert names_of(*(("runs/ours", {"pruner": pruner}) for pruner in pruners)) == [
        "ours (lightvla)",
        "ours (lightvla:multiplicity=set)",
        "ours (lightvla_star:queries=64)",
        "ours (lightvla_star:queries=128)",
        "ours (none)",
    ]
    assert names_of(*(("runs/ours", {"action_readout": kind}) for kind in ("aligned", "tail"))) == [
        "ours (aligned read-out)",
        "ours (tail read-out)",
    ]
    found = names_of(*(("runs/ours", {"dtype": dtype}) for dtype in ("float32", "bfloat16")))
    assert found == ["ours (float32)", "ours (bfloat16)"]
    drawn = (("runs/ours", {"pruner": f"random:multiplicity=weighted,seed={seed}"}) for seed in (7, 8))
    assert names_of(*drawn, control="random_tokens") == ["ours (random tokens)"] * 2
    drawn = (("runs/ours", {"pruner": f"random:multiplicity=weighted,seed={seed},draw=added"}) for seed in (7, 8))
    assert names_of(*drawn, control="added_tokens") == ["ours (added tokens)"] * 2


def test_different_policies_are_not_averaged(ours: Path, tmp_path: Path) -> None:
    other = evaluated(tmp_path / "set", {1: [False] * 12}, policy={"pruner": "lightvla:multiplicity=set"})
    rows = list(csv.DictReader(io.StringIO(run(ours, other, "--format", "csv").stdout)))
    assert [(row["policy"], row["runs"]) for row in rows] == [
        ("ours (lightvla:multiplicity=weighted)", "1"),
        ("ours (lightvla:multiplicity=set)", "1"),
    ]
    # Training runs of one policy are averaged when they are given one name.
    again = evaluated(tmp_path / "8", {1: [True] * 12, 4: [False] * 12}, "runs8/ours")
    [row] = csv.DictReader(io.StringIO(run(ours, again, "--names", "x", "x", "--format", "csv").stdout))
    assert (row["policy"], row["runs"]) == ("x", "2")


def test_notes_of_a_csv_table_go_to_the_terminal(ours: Path, tmp_path: Path) -> None:
    other = evaluated(tmp_path / "c", {1: [True] * 3, 4: [False] * 3}, env_img_res=128)
    words = "Mind: not the same protocol: side of the pictures in pixels not recorded for A; 128 for B."
    done = run(ours, "--against", other, "--names", "A", "B", "--format", "csv")
    assert words in done.stderr.splitlines() and "Mind" not in done.stdout
    assert done.stderr.count("A and B are not distinguishable") == 1
    assert words in run(ours, other, "--names", "A", "B", "--format", "csv").stderr.splitlines()
    cut = Results.load(ours)
    cut.run["complete"] = False
    cut.save(tmp_path / "cut" / "results.json")
    done = run(tmp_path / "cut", "--format", "csv")
    assert "Mind: the evaluation did not get to its end; 24 rollouts are here." in done.stderr.splitlines()
    assert "Mind: the evaluation did not get to its end" in run(tmp_path / "cut").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["A", "--against", "missing"], "no results at missing"),
        (["broken.json"], "broken.json is no results file"),
        (["list.json"], "list.json is no results file"),
        (["half.json"], "half.json is no results file"),
        (["old.json"], "old.json has schema version 1"),
        (["A", "--against", "OTHER_SEED"], "share no episode. seed: 7 against 9"),
        (["A", "--against", "A", "--names", "x"], "give two names"),
        (["A", "--names", "x", "y"], "2 names for 1 files"),
        (["A", "--plan", "0"], "--plan 0: expected a difference in percentage points"),
        (["A", "--against", "A"], "the same results were given twice"),
        (["A", "--against", "OTHER_SEED", "A/results.json"], "results.json: the same results were given twice"),
        (["A", "A"], "the same results were given twice"),
        (["A", "--output", "t.xlsx"], "--output t.xlsx: expected a name that ends with one of .md (markdown), .csv"),
        (["missing", "--output", "table"], "--output table: expected a name"),
    ],
)
def test_what_cannot_be_used_ends_with_2(ours: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    other = evaluated(tmp_path / "other", {1: [True] * 12}, seed=9)
    contents = {
        "broken.json": "{",
        "list.json": "[]",
        "half.json": '{"schema_version": 3, "episodes": [{"suite": "x"}]}',
        "old.json": '{"schema_version": 1}',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    known = {
        "A": ours,
        "A/results.json": ours / "results.json",
        "OTHER_SEED": other,
        **{name: tmp_path / name for name in contents},
    }
    done = run(*[known.get(argument, argument) for argument in arguments])
    assert done.returncode == 2 and words in done.stderr and "error:" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
