"""Tables read back: every number against one counted from the episodes."""

import csv
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.comparison.policies_table import policies_table
from experiments.robot.libero.comparison.table_formats import Table, latex_escaped, to_csv, to_latex, to_markdown
from experiments.robot.libero.comparison.tables import comparison_table, result_table
from experiments.robot.libero.results.results import EpisodeRecord, Results
from experiments.robot.libero.settings.suite_names import SUITES
from experiments.robot.libero.simulator.tasks import get_suite

SPECIAL = r"a_b & 50% $x$ #1 {y} ~z ^w \n <1> ±2 [q] *s*"


def results(solved: dict[int, list[bool | None]], suite: str = "libero_goal", seed: int = 7, **config) -> Results:
    episodes = [
        EpisodeRecord(
            suite, task, f"do_task_{task}", "do", state, state, seed, success=success,
            invalid="Traceback" if success is None else None,
            tokens_kept=[10 + task, 20 + state], num_visual_tokens=98, latency_ms=[90.0, 10.0 + state],
            bddl_sha256=f"{suite} {task}", init_states_sha256=f"states of {suite} {task}",
        )
        for task, outcomes in solved.items()
        for state, success in enumerate(outcomes)
    ]  # fmt: skip
    return Results({"complete": True}, config, {}, {}, episodes)


def read(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def wilson(successes: int, trials: int) -> list[float]:
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return [interval.low, interval.high]


def test_one_result_per_task() -> None:
    table = result_table(results({8: [True, False, None], 1: [True, True, True, False]}))
    assert [row[:5] for row in table.rows] == [
        ("do task 1", "3/4", "75.0 %", "30.1 to 95.4", "0"),
        ("do task 8", "1/2", "50.0 %", "9.5 to 90.5", "1"),
        ("all", "4/6", "66.7 %", "30.0 to 90.3", "1"),
    ]
    for row, (successes, trials) in zip(read(table), ((3, 4), (1, 2), (4, 6)), strict=True):
        assert [int(row["successes"]), int(row["trials"])] == [successes, trials]
        assert [float(row["rate_low"]), float(row["rate_high"])] == pytest.approx(wilson(successes, trials))
    rows = read(table)
    assert float(rows[0]["tokens_kept_mean"]) == np.mean([11, 20, 11, 21, 11, 22, 11, 23])
    assert float(rows[2]["tokens_kept_mean"]) == np.mean([11, 20, 11, 21, 11, 22, 11, 23, 18, 20, 18, 21])
    assert table.rows[0][5] == "16.2 of 98" and table.totals == 1
    assert table.headings[6:] == ("latency including waiting", "steps to success")  # the policy's own is not recorded
    assert table.rows[0][6] == f"{np.median([90, 10, 90, 11, 90, 12, 90, 13]):.1f} ms"


def test_time_and_motion_stand_beside_success() -> None:
    """Two policies that solve the same: one takes half as long again, and shakes."""
    quick, slow = results({0: [True, True, False]}), results({0: [True, True, False]})
    for side, steps, jerk in ((quick, 80, 2.0), (slow, 120, 9.0)):
        for episode in side.episodes:
            episode.steps, episode.jerk, episode.progress = (
                steps + episode.trial,
                jerk,
                1.0 if episode.success else 0.5,
            )
            episode.policy_ms, episode.call_queries = [8.0, 8.0 + episode.trial], [1, 1]
    table = policies_table({"quick": [quick], "slow": [slow], "old": [results({0: [True]})]})
    assert table.headings[-4:] == ("latency", "steps to success", "jerk", "progress")
    assert [row[-4:] for row in table.rows] == [
        ("8.0 ms", "80 (4.0 s)", "2.0", "83 %"),
        ("8.0 ms", "120 (6.0 s)", "9.0", "83 %"),
        ("50.0 ms including waiting", "0 (0.0 s)", "", ""),
    ]
    row = read(result_table(slow))[-1]
    assert (row["latency_includes_waiting"], float(row["waiting_ms_median"])) == (
        "False",
        np.median([82, 82, 82, 2, 2, 2]),
    )
    assert (float(row["mean_steps_to_success"]), float(row["mean_jerk"])) == (120.5, 9.0)


def test_a_task_without_valid_rollouts_has_no_rate() -> None:
    table = result_table(results({1: [None, None], 8: [True]}))
    assert table.rows[0][1:5] == ("0/0", "", "0.0 to 100.0", "2")
    assert read(table)[0]["rate"] == ""


def test_swapped_instructions_show_the_other_goal() -> None:
    swapped = results({1: [False, False]})
    for episode in swapped.episodes:
        episode.other_task, episode.other_success = 8, episode.trial == 0
    table = result_table(swapped)
    assert table.headings[4] == "other task's goal" and table.rows[0][4] == "1/2" and table.rows[-1][4] == "1/2"
    assert read(table)[0]["other_goal_successes"] == "1"


def test_policies_by_suites() -> None:
    ours = [
        results({0: [True] * 3 + [False], 1: [True] * 4}, "libero_10"),
        results({0: [True] * 2 + [False] * 2}, "libero_spatial"),
    ]
    theirs = [results({0: [True, False, False, None]}, "libero_10")]
    table = policies_table({"ours": ours, "theirs": theirs})
    assert table.headings[:4] == ("policy", "Spatial (1 of 10 tasks)", "Long (2 of 10 tasks)", "Average")
    assert table.rows[0][:4] == ("ours", "50.0 (15.0 to 85.0)", "87.5 (52.9 to 97.8)", "68.8")
    assert table.rows[1][:4] == ("theirs", "", "33.3 (6.1 to 79.2)", "")
    rows = read(table)
    assert [(row["policy"], row["suite"]) for row in rows] == [
        ("ours", "libero_spatial"),
        ("ours", "libero_10"),
        ("ours", "average of suites"),
        ("theirs", "libero_10"),
    ]
    assert float(rows[2]["rate"]) == (0.5 + 0.875) / 2
    assert [float(rows[3]["rate_low"]), float(rows[3]["rate_high"])] == pytest.approx(wilson(1, 3))
    assert rows[3]["invalid"] == "1" and "deviation" not in table.notes[0]
    assert table.notes[2:] == ("Mind: not all policies were tried on the same tasks: Long (2 of 10 tasks).",)


@pytest.mark.parametrize("told", [False, True], ids=["by their starts", "by their checkpoints"])
def test_several_training_runs_give_mean_and_spread(told: bool) -> None:
    shares = {"libero_spatial": (4, 3, 2), "libero_goal": (1, 3, 2)}
    files = [
        results({0: [True] * solved + [False] * (4 - solved)}, suite, seed=7 + number * told)
        for suite, numbers in shares.items()
        for number, solved in enumerate(numbers)
    ]
    for place, found in enumerate(files):
        found.policy = {"checkpoint": f"runs/{place}"} if told else {}
    table = policies_table({"ours": files})
    spatial, goal = (np.array(shares[suite]) / 4 for suite in shares)
    means = [spatial, goal, (spatial + goal) / 2]
    assert table.rows[0][1:4] == tuple(f"{100 * x.mean():.1f} ± {100 * x.std(ddof=1):.1f}" for x in means)
    assert [float(row["rate_standard_deviation"]) for row in read(table)] == pytest.approx(
        [x.std(ddof=1) for x in means]
    )
    assert [row["runs"] for row in read(table)] == ["3", "3", "3"] and "standard deviation" in table.notes[0]


def counting_up(seed: int, outcomes: list[bool]) -> Results:
    """As `--protocol lerobot` evaluates: each rollout of a task has the seed of the evaluation and its number."""
    found = results(dict.fromkeys(range(10), outcomes), seed=0)
    for episode in found.episodes:
        episode.seed = seed + episode.trial
    found.config["seed"] = seed
    return found


def test_seeds_that_count_up_are_one_run() -> None:
    table = policies_table({"ours": [counting_up(1000, [True] * 6 + [False] * 4)]})
    [row] = read(table)
    assert (row["runs"], row["successes"], row["trials"]) == ("1", "60", "100")
    assert [float(row["rate_low"]), float(row["rate_high"])] == pytest.approx(wilson(60, 100))
    assert "±" not in table.rows[0][1] and "standard deviation" not in table.notes[0]
    # Evaluations with seeds of their own are of one policy, though some rollouts of both have one seed.
    [row] = read(policies_table({"ours": [counting_up(1000, [True] * 10), counting_up(1001, [False] * 10)]}))
    assert (row["runs"], row["trials"], row["initial_states"], row["rate"]) == ("1", "200", "100", "0.5")
    assert [float(row["rate_low"]), float(row["rate_high"])] == pytest.approx(wilson(50, 100))


def test_tasks_in_several_files_are_one_run() -> None:
    files = [results({task: [True, False]}) for task in (0, 1)]
    [row] = read(policies_table({"ours": files}))
    assert (row["runs"], row["successes"], row["trials"]) == ("1", "2", "4")


def test_wide_starts_are_a_column_of_their_own_and_not_averaged() -> None:
    tasks = range(10)
    files = [
        results({task: [True, True] for task in tasks}),
        results({task: [True, False] for task in tasks}, wide_starts_m=0.06),
    ]
    table = policies_table({"ours": files})
    assert table.headings[1:3] == ("Goal", "Goal, wide starts 6 cm") and "Average" not in table.headings
    assert [cell.split()[0] for cell in table.rows[0][1:3]] == ["100.0", "50.0"]


def test_standard_and_perturbed_suites_are_not_averaged() -> None:
    whole = {task: [True, False] for task in range(10)}
    table = policies_table({"ours": [results(whole), results({3: [True]}, "libero_goal_swap")]})
    assert table.headings[1:3] == ("Goal", "libero_goal_swap (1 of 10 tasks)") and "Average" not in table.headings
    assert result_table(results({3: [True]}, "libero_goal_swap")).title.endswith("libero_goal_swap (1 of 10 tasks)")
    perturbed = [results({3: [True]}, suite) for suite in ("libero_object_swap", "libero_goal_swap")]
    assert "Average" in policies_table({"ours": perturbed}).headings


def test_numbers_of_tasks_are_the_benchmarks() -> None:
    for suite in SUITES:
        count = get_suite(suite).get_num_tasks()
        [title] = [result_table(results({0: [True]}, suite)).title]
        assert title.endswith(f"(1 of {count} tasks)"), suite
        assert "tasks)" not in result_table(results({task: [True] for task in range(count)}, suite)).title


def test_notes_say_what_doubts_there_are() -> None:
    sides = {name: results({1: [True, False]}) for name in ("ours", "theirs", "old")}
    for found in sides.values():
        found.run["protocol"], found.versions["mujoco"] = {"max_steps": 300}, "3.2.3"
    policies = {name: [found] for name, found in sides.items()}
    assert not any(note.startswith("Mind:") for note in policies_table(policies).notes)
    sides["theirs"].run |= {"complete": False, "protocol": {"max_steps": 400}}
    sides["theirs"].config["control"], sides["old"].versions["mujoco"] = "blank_images", "3.3.0"
    assert policies_table(policies).notes[2:] == (
        "Mind: not the same protocol: control none for ours and old; blank_images for theirs.",
        "Mind: not the same protocol: mujoco 3.2.3 for ours and theirs; 3.3.0 for old.",
        "Mind: not the same protocol: protocol max_steps 300 for ours and old; 400 for theirs.",
        "Mind: theirs: 1 of 1 evaluations did not get to the end.",
    )
    assert len(result_table(sides["ours"]).notes) == 2
    sides["theirs"].run["warnings"] = ["mujoco 3.3.0 is installed"]
    assert policies_table(policies).notes[-1] == "Mind: theirs: mujoco 3.3.0 is installed."
    assert result_table(sides["theirs"]).notes[2:] == (
        "Mind: the evaluation did not get to its end; 2 rollouts are here.",
        "Mind: this is the control blank_images.",
        "Mind: mujoco 3.3.0 is installed.",
    )


@pytest.mark.parametrize("part", ["bddl_sha256", "init_states_sha256"])
def test_other_tasks_under_the_same_number_are_told(part: str) -> None:
    first, other = (results({1: [True, False], 2: [True, True]}) for _ in range(2))
    for episode in other.episodes[2:]:
        setattr(episode, part, "0" * 64)
    words = {"bddl_sha256": "BDDL files", "init_states_sha256": "initial states"}[part]
    digest = "libero_goal " if part == "bddl_sha256" else "states of li"
    told = f"Mind: not the same task: libero_goal task 2 had different {words}, SHA-256 {digest}"
    assert policies_table({"A": [first], "B": [other]}).notes[2:] == (f"{told} for A; {'0' * 12} for B.",)
    assert policies_table({"A": [first, other]}).notes[2:] == (f"{told} and {'0' * 12} for A.",)
    setattr(other.episodes[0], part, None)
    assert (
        policies_table({"A": [first], "B": [other]})
        .notes[2]
        .endswith("libero_goal; tasks are put together by their number.")
    )


def test_a_copy_is_no_second_run() -> None:
    first, repeated, further = (results({1: [True, False, None]}) for _ in range(3))
    for number, found in enumerate((first, repeated, further)):
        for episode in found.episodes:
            episode.actions_sha256 = None if episode.invalid else f"{number == 2} {episode.trial}"
            episode.wall_seconds = 7.0 + (number == 2)
    table = policies_table({"A": [first, repeated]})
    [row] = read(table)
    assert (row["runs"], row["successes"], row["trials"], row["invalid"]) == ("1", "1", "2", "1")
    assert table.rows == policies_table({"A": [first]}).rows and "±" not in table.rows[0][1]
    assert table.notes[-1] == "Mind: A: 3 rollouts were given twice (equal episodes, seeds and actions) and count once."
    [row] = read(policies_table({"A": [first, further]}))
    assert (row["runs"], row["trials"], row["invalid"]) == ("2", "4", "2"), "as of another training run"


def test_suites_of_one_policy_may_have_protocols_of_their_own() -> None:
    """Step caps go with the suite."""
    files = [results({1: [True]}, suite) for suite in ("libero_goal", "libero_10")]
    for found, cap in zip(files, (300, 520), strict=True):
        found.run["protocol"] = {"max_steps": cap}
    assert not any("protocol" in note for note in policies_table({"ours": files}).notes)


def test_a_comparison_as_a_table() -> None:
    first = results({1: [True, True, True, False], 8: [True, True, False, None]})
    second = results({1: [True, False, False, False], 8: [False, True, True, True]}, control="blank_images")
    comparison = compare([first], [second], ("ours", "theirs"))
    table = comparison_table(comparison)
    assert [(row[0], *row[3:7]) for row in table.rows] == [
        ("do task 1", "1", "2", "0", "1"),
        ("do task 8", "1", "1", "1", "0"),
        ("all", "2", "3", "1", "1"),
    ]
    assert [row[1].split()[0] for row in table.rows] == ["75.0", "66.7", "70.8"]
    assert table.rows[0][7].startswith("+50.0 (") and table.totals == 1
    assert table.notes[0] == comparison.verdict
    assert "7 counted of 8 in both; 1 invalid in ours, 0 in theirs; 0 in ours only, 0 in theirs only" in table.notes[1]
    assert table.notes[-1] == "Mind: not the same protocol: control none for ours; blank_images for theirs."
    rows = read(table)
    assert [float(row["p"]) for row in rows] == pytest.approx(
        [stats.binomtest(*n, 0.5).pvalue for n in ((2, 2), (1, 2), (3, 4))]
    )
    assert [row["p_holm"] for row in rows] == ["1.0", "1.0", ""]
    assert float(rows[2]["difference"]) == pytest.approx((0.5 + 0.0) / 2) and rows[0]["second"] == "theirs"


def test_a_comparison_of_several_suites_has_an_average() -> None:
    sides = [[results({1: [True, ours]}), results({1: [True, True]}, "libero_object")] for ours in (True, False)]
    table = comparison_table(compare(*sides, ("ours", "theirs")))
    names = [row[0] for row in table.rows]
    assert names == [
        "libero_goal: do task 1",
        "libero_object: do task 1",
        "libero_goal",
        "libero_object",
        "average of suites",
    ]
    assert [row["level"] for row in read(table)] == ["task", "task", "suite", "suite", "average"] and table.totals == 3


def special_table() -> Table:
    rows = ((SPECIAL, "50.0 (-10.0 to +20.0)"), ("[first of a row]", "-5"), ("* starred", "1"), ("all", "2 ± 3"))
    return Table(
        SPECIAL, ("policy", "rate, %"), rows, ({"policy": 'comma, "quote"', "rate": 0.5},), (SPECIAL,), totals=1
    )


def test_markdown_has_as_many_cells_as_columns() -> None:
    body = [line for line in to_markdown(special_table()).splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in body] == [3] * 6
    assert body[-1] == "| **all** | **2 ± 3** |" and body[1] == "| --- | ---: |"
    piped = Table("t", ("a", "b"), (("x|y", "`_"),), ())
    assert r"| x\|y | \`\_ |" in to_markdown(piped)
    broken = Table("a\nb", ("a", "b"), (("two\nlines", "~~x~~ &amp;"),), (), ("note\n\n# no heading",))
    lines = to_markdown(broken).splitlines()
    assert lines[0] == "**a b**" and lines[-1] == "note # no heading"
    assert lines[4] == r"| two lines | \~\~x\~\~ \&amp; |"


def test_csv_quotes() -> None:
    assert read(special_table()) == [{"policy": 'comma, "quote"', "rate": "0.5"}]


def test_latex_escapes_what_it_would_read_as_commands() -> None:
    assert latex_escaped("50 % of a_b & $c") == r"50 \% of a\_b \& \$c"
    assert latex_escaped("\\") == r"\textbackslash{}" and latex_escaped("~^") == r"\textasciitilde{}\textasciicircum{}"
    assert latex_escaped("-8.8 to +37.4, p < 0.001") == "$-$8.8 to +37.4, p $<$ 0.001"
    assert latex_escaped("co-training, 3-4") == "co-training, 3-4"
    assert latex_escaped("[a] *") == "{[}a] {*}"


def test_latex_has_rules_and_balanced_rows() -> None:
    text = to_latex(special_table())
    assert [line for line in text.splitlines() if line.endswith("rule")] == [
        r"\toprule", r"\midrule", r"\midrule", r"\bottomrule",
    ]  # fmt: skip
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    rows = [line for line in bare.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 5 and all(row.count("&") == 1 for row in rows)
    assert r"\begin{tabular}{lr}" in text and not any(row.startswith(("[", "*")) for row in rows)


def test_a_caption_is_short() -> None:
    """Title and intervals; verdict, counts and doubts stand below the rows."""
    pair = [results({1: [True, False]}), results({1: [False, False]}, control="blank_images")]
    tables = [
        comparison_table(compare(pair[:1], pair[1:], ("ours", "theirs"))),
        policies_table({"ours": pair[:1], "theirs": pair[1:]}),
        result_table(pair[1]),
    ]
    for table in tables:
        text = to_latex(table)
        [caption] = [line for line in text.splitlines() if line.startswith(r"\caption")]
        assert table.title in caption and "ntervals" in caption and len(caption.split()) < 45
        below = text.partition(r"\end{tabular}")[2]
        assert [latex_escaped(note) in below for note in table.notes].count(False) == 1, "the one about intervals"
        assert "Mind" in below and "Mind" not in caption and table.intervals in table.notes


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX here")
def test_latex_compiles(tmp_path: Path) -> None:
    table = to_latex(special_table())
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{table}\end{{document}}"
    (tmp_path / "table.tex").write_text(document, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:]
