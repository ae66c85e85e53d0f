import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.robot.libero.results.journal import read_journals
from experiments.robot.libero.results.measures import latency_text
from experiments.robot.libero.results.provenance import collect_versions, git_commit
from experiments.robot.libero.results.results import (
    FILE_NAME,
    SCHEMA_VERSION,
    EpisodeRecord,
    Results,
    count_successes,
    summarize,
)
from experiments.robot.libero.results.success import success_rows


def record(task: int, trial: int, success: bool | None, **more: object) -> EpisodeRecord:
    invalid = "Traceback: boom" if success is None else None
    base = {"suite": "libero_goal", "task_index": task, "task_name": f"task_{task}", "instruction": "do it"}
    given = {"initial_state": trial, "trial": trial, "seed": 7, "success": success, "invalid": invalid, **more}
    return EpisodeRecord(**{**base, **given})  # type: ignore[arg-type]


def test_invalid_rollouts_are_neither_successes_nor_failures() -> None:
    summary = summarize([record(1, 0, True), record(1, 1, None), record(1, 2, False), record(8, 0, None)])
    assert summary["all"]["successes"] == 1 and summary["all"]["trials"] == 2 and summary["all"]["invalid"] == 2
    first, second = summary["tasks"]
    assert (first["task_index"], first["trials"], first["invalid"]) == (1, 2, 1)
    assert (second["task_index"], second["trials"], second["rate"], second["invalid"]) == (8, 0, None, 1)


def test_counts_carry_the_wilson_interval() -> None:
    expected = stats.binomtest(3, 4).proportion_ci(0.95, method="wilson")
    counts = count_successes([True, True, None, True, False])
    assert counts["interval_95"] == pytest.approx([expected.low, expected.high], abs=1e-4)


def test_tokens_and_latency_are_taken_over_queries() -> None:
    episodes = [
        record(1, 0, True, tokens_kept=[4, 6], num_visual_tokens=98, latency_ms=[12.0, 8.0]),
        record(1, 1, True, tokens_kept=[11], num_visual_tokens=98, latency_ms=[10.0]),
    ]
    summary = summarize(episodes)
    assert summary["tokens_kept"] == {"mean": 7.0, "min": 4, "max": 11, "of": 98, "fraction": 7 / 98}
    assert summary["latency_ms"]["queries"] == 3 and summary["latency_ms"]["median"] == 10.0
    assert summary["latency_ms"]["p95"] == pytest.approx(np.percentile([12.0, 8.0, 10.0], 95))
    assert summarize([])["tokens_kept"] is None and summarize([])["latency_ms"] is None


def test_the_policy_s_own_time_is_told_from_waiting() -> None:
    timed = record(1, 0, True, latency_ms=[30.0, 20.0, 12.5], policy_ms=[12.0, 12.0, 12.5], call_queries=[2, 2, 1])
    old = record(1, 1, True, latency_ms=[900.0])
    assert timed.waiting_ms == [18.0, 8.0, 0.0] and old.waiting_ms == []
    found = summarize([timed, old])["latency_ms"]  # two kinds of figures are not mixed
    assert (found["median"], found["queries"], found["includes_waiting"]) == (12.0, 3, False)
    assert (found["waiting_median"], found["largest_call"]) == (8.0, 2)
    assert latency_text(found) == "12.0 ms" and latency_text(None) == ""
    found = summarize([old])["latency_ms"]
    assert (found["median"], found["includes_waiting"], found["waiting_median"]) == (900.0, True, None)
    assert latency_text(found) == "900.0 ms including waiting"


def test_invalid_rollouts_count_in_no_figure() -> None:
    """They would double every one of these."""
    figures = {"num_visual_tokens": 98, "steps": 40, "jerk": 2.0, "progress": 0.5, "call_queries": [1]}
    good = record(1, 0, True, tokens_kept=[4], latency_ms=[12.0], policy_ms=[10.0], **figures)
    bad = {**figures, "num_visual_tokens": 512, "steps": 120, "jerk": 6.0, "progress": 1.0}
    broken = record(1, 1, None, tokens_kept=[20], latency_ms=[60.0], policy_ms=[50.0], **bad)
    without, whole = summarize([good]), summarize([good, broken])
    for summary, count in ((whole, 1), (without, 0)):
        for part in (summary["all"], summary["suites"][0], summary["tasks"][0]):
            assert part.pop("invalid") == count
    assert whole == without
    assert summarize([broken])["tokens_kept"] is None and summarize([broken])["latency_ms"] is None


def test_what_a_success_takes() -> None:
    episodes = [
        record(1, 0, True, steps=100, jerk=3.0, progress=1.0),
        record(1, 1, True, steps=60, jerk=5.0, progress=1.0),
        record(1, 2, False, steps=300, jerk=90.0, progress=0.5),
        record(1, 3, True, steps=140),  # of before jerk was recorded
    ]
    found = summarize(episodes)["all"]
    assert (found["mean_steps_to_success"], found["mean_seconds_to_success"]) == (100.0, 5.0)  # 20 steps a second
    assert found["mean_jerk"] == 4.0 and found["mean_progress"] == pytest.approx(2.5 / 3)
    none = summarize([record(1, 0, False, steps=300)])["all"]
    assert [none[f"mean_{name}"] for name in ("steps_to_success", "seconds_to_success", "jerk", "progress")] == [
        None
    ] * 4


def test_swapped_instructions_count_the_other_goal() -> None:
    episodes = [record(1, t, False, other_task=8, other_success=t > 0) for t in range(3)]
    summary = summarize(episodes)
    assert summary["all"]["successes"] == 0
    assert (summary["all"]["other_goal"]["successes"], summary["all"]["other_goal"]["trials"]) == (2, 3)
    assert "other_goal" not in summarize([record(1, 0, True)])["all"]
    assert Results(episodes=episodes).counts() == {"task 1": (0, 3)}
    assert Results(episodes=episodes).counts(other_goal=True) == {"task 1": (2, 3)}


def test_what_was_measured_at_loading_is_no_outcome() -> None:
    runs = [Results(policy={"pruner": "none", "dtype_reason": reason, "engine": {"name": reason}}) for reason in "ab"]
    assert runs[0].outcome() == runs[1].outcome() != Results(policy={"pruner": "lightvla"}).outcome()


def test_saved_results_load_again(tmp_path: Path) -> None:
    results = Results(
        run={"command": ["x"], "seed": 7},
        config={"control": "none"},
        policy={"assumptions": []},
        versions=collect_versions(),
        episodes=[record(1, 0, True, tokens_kept=[3], displacement={"radius_m": 0.06}), record(1, 1, None)],
    )
    path = tmp_path / "run" / FILE_NAME
    results.save(path)
    assert Results.load(path) == results
    assert Results.load(path.parent) == results
    content = json.loads(path.read_text())
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["summary"] == json.loads(json.dumps(results.summary()))
    assert [entry.name for entry in path.parent.iterdir()] == [FILE_NAME]


def test_results_of_schema_version_2_are_read(tmp_path: Path) -> None:
    """Its summary names the number of policy queries otherwise."""
    results = Results(run={"seed": 7}, episodes=[record(1, 0, True, latency_ms=[12.0, 8.0])])
    path = tmp_path / FILE_NAME
    results.save(path)
    content = json.loads(path.read_text())
    latency = content["summary"]["latency_ms"]
    latency["looks"] = latency.pop("queries")
    path.write_text(json.dumps({**content, "schema_version": 2}))
    assert Results.load(path) == results and results.summary()["latency_ms"]["queries"] == 2


def test_foreign_results_are_refused(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with pytest.raises(FileNotFoundError, match="no results"):
        Results.load(path)
    path.write_text('{"schema_version": 99}')
    with pytest.raises(ValueError, match="schema version 99"):
        Results.load(path)
    Results(episodes=[record(1, 0, True)]).save(path)
    content = json.loads(path.read_text())
    content["episodes"][0]["colour"] = "red"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="colour"):
        Results.load(path)


WHOLE = {"schema_version": SCHEMA_VERSION, "run": {}, "config": {}, "policy": {}, "versions": {}, "episodes": []}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no results file .Expecting"),
        ("\udcff", "no results file .*decode"),
        ([], "no results file .it holds a list"),
        (None, "no results file .it holds a NoneType"),
        ({"schema_version": SCHEMA_VERSION}, "no results file .'run' is null, expected a dict"),
        ({**WHOLE, "run": None}, "no results file .'run' is null, expected a dict"),
        ({**WHOLE, "config": None}, "no results file .'config' is null, expected a dict"),
        ({**WHOLE, "versions": 3}, "no results file .'versions' is 3, expected a dict"),
        ({**WHOLE, "episodes": {}}, "no results file .'episodes' is {}, expected a list"),
        ({**WHOLE, "episodes": [7]}, "an episode is a int"),
        (
            {**WHOLE, "episodes": [{"suite": "libero_goal", "trial": 4}]},
            "episode 4 lacks .'initial_state', 'instruction'",
        ),
    ],
)
def test_what_is_no_results_file_is_named_with_a_remedy(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "some.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=words) as error:
        Results.load(path)
    assert str(path) in str(error.value) and "evaluate again" in str(error.value)
    assert not isinstance(error.value, json.JSONDecodeError | UnicodeDecodeError)


def test_what_json_cannot_say_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Results(episodes=[record(1, 0, True)]).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="results.json is not written: it would hold a NaN"):
        Results(policy={"server_metadata": {"loss": float("nan")}}).save(path)
    assert path.read_bytes() == before


def test_versions_name_what_can_change_a_result() -> None:
    assert {"python", "mujoco", "robosuite", "torch", "transformers", "timm"} <= set(collect_versions())


def test_git_commit_outside_of_a_checkout(tmp_path: Path) -> None:
    assert git_commit(tmp_path) == "unknown"


WRONG = [
    ("episodes", "steps", "12", 'steps is "12", expected a whole number'),
    ("episodes", "steps", True, "steps is true, expected a whole number"),
    ("episodes", "success", 1, "success is 1, expected true or false or null"),
    ("episodes", "task_name", None, "task_name is null, expected text"),
    ("episodes", "tokens_kept", [3, 4.5], r"tokens_kept is \[3, 4.5\], expected a list, each a whole number"),
    ("episodes", "latency_ms", [math.nan], r"latency_ms is \[NaN\], expected a list, each a finite number"),
    (
        "episodes",
        "stage_ms",
        {"llm": 3.0},
        "stage_ms is .*, expected an object, each value a list, each a finite number",
    ),
    ("episodes", "displacement", [], r"displacement is \[\], expected an object or null"),
    ("episodes", "actions_sha256", "5eed", 'actions_sha256 is "5eed", expected 64 hexadecimal digits'),
    ("episodes", "bddl_sha256", "A" * 64, "bddl_sha256 is .*, expected 64 hexadecimal digits"),
    ("run", "complete", "yes", 'complete is "yes", expected true or false'),
    ("run", "warnings", "one", 'warnings is "one", expected a list, each text'),
    ("run", "seed", 7.5, "seed is 7.5, expected a whole number"),
    ("config", "env_img_res", "256", 'env_img_res is "256", expected a whole number'),
    ("versions", "mujoco", 3.2, r"versions is .*, expected an object, each value text"),
]


@pytest.mark.parametrize(("part", "name", "value", "words"), WRONG, ids=[f"{part} {name}" for part, name, *_ in WRONG])
def test_fields_of_another_type_are_named(tmp_path: Path, part: str, name: str, value: object, words: str) -> None:
    path = tmp_path / FILE_NAME
    hashes = dict.fromkeys(("actions_sha256", "bddl_sha256", "init_states_sha256"), "5eed" * 16)
    Results(
        {"complete": True, "seed": 7}, {"env_img_res": 256}, {}, {"mujoco": "3"}, [record(1, 0, True, **hashes)]
    ).save(path)
    Results.load(path)
    content = json.loads(path.read_text())
    (content[part][0] if part == "episodes" else content[part])[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        Results.load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    if part == "episodes":
        assert "the rollout of libero_goal task 1, initial state 0" in str(error.value)


def test_a_journal_with_fields_of_another_type_is_named(tmp_path: Path) -> None:
    line = json.dumps(asdict(record(1, 0, True)) | {"wall_seconds": "long"})
    (tmp_path / "episodes.rank0.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match='rank0.jsonl, line 1: .* wall_seconds is "long", expected a finite number'):
        read_journals(tmp_path)


def test_suites_have_their_own_sums_and_one_mean() -> None:
    episodes = [record(1, t, t < 3, suite="libero_goal") for t in range(4)]
    episodes += [record(1, t, t < 1, suite="libero_10") for t in range(2)]
    summary = summarize(episodes)
    assert [(s["suite"], s["successes"], s["trials"]) for s in summary["suites"]] == [
        ("libero_10", 1, 2),
        ("libero_goal", 3, 4),
    ]
    assert summary["mean_of_suites"] == (0.5 + 0.75) / 2 and summary["all"]["successes"] == 4
    rows = success_rows(episodes)
    assert [(row.name, row.solved) for row in rows] == [
        ("task 1", "3/4"),
        ("task 1", "1/2"),
        ("libero_goal", "3/4"),
        ("libero_10", "1/2"),
        ("mean of suites", "4/6"),
    ]
    assert rows[-1].rate == 0.625 and rows[-1].interval.low < 0.625 < rows[-1].interval.high
    assert summarize([*episodes, record(2, 0, None, suite="libero_object")])["mean_of_suites"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda episodes: episodes + episodes[:1], "holds the rollout of .* task 1, initial state 0 twice"),
        (lambda episodes: [{**episodes[0], "invalid": "it fell"}], "has success True and invalid 'it fell'"),
        (lambda episodes: [{**episodes[0], "steps": -5}], "'steps': -5.*expected 0 or more"),
        (lambda episodes: [{**episodes[0], "steps": 10**400}], "steps is 1000"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(tmp_path, change, message) -> None:
    file = tmp_path / "results.json"
    Results(episodes=[record(1, 0, True, steps=9)]).save(file)
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "episodes": change(content["episodes"])}))
    with pytest.raises(ValueError, match=message):
        Results.load(file)


def test_a_policy_without_a_name_and_a_nest_are_refused(tmp_path) -> None:
    file = tmp_path / "results.json"
    Results(episodes=[record(1, 0, True)]).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), "policy": {"checkpoint": 5}}))
    with pytest.raises(ValueError, match="checkpoint is 5"):
        Results.load(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no results file"):
        Results.load(file)
