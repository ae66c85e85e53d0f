import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.robot.libero.results.provenance import collect_versions, git_commit
from experiments.robot.libero.results.results import (
    FILE_NAME,
    SCHEMA_VERSION,
    EpisodeRecord,
    Results,
    count_successes,
    summarize,
)


def record(task: int, trial: int, success: bool | None, **more: object) -> EpisodeRecord:
    invalid = "Traceback: boom" if success is None else None
    base = {"suite": "libero_goal", "task_index": task, "task_name": f"task_{task}", "instruction": "do it"}
    given = {"initial_state": trial, "trial": trial, "seed": 7, "success": success, "invalid": invalid, **more}
    return EpisodeRecord(**base, **given)  # type: ignore[arg-type]


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


def test_swapped_instructions_count_the_other_goal() -> None:
    episodes = [record(1, t, False, other_task=8, other_success=t > 0) for t in range(3)]
    summary = summarize(episodes)
    assert summary["all"]["successes"] == 0
    assert (summary["all"]["other_goal"]["successes"], summary["all"]["other_goal"]["trials"]) == (2, 3)
    assert "other_goal" not in summarize([record(1, 0, True)])["all"]
    assert Results(episodes=episodes).counts() == {"task 1": (0, 3)}
    assert Results(episodes=episodes).counts(other_goal=True) == {"task 1": (2, 3)}


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
