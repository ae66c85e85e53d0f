"""Several suites in one evaluation, parts of one, and one that grows."""

import itertools
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.comparison.caveats import protocol_differences
from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.evaluation.command import main
from experiments.robot.libero.evaluation.evaluate import evaluate
from experiments.robot.libero.evaluation.plan import Plan, make_plan
from experiments.robot.libero.evaluation.resume import check_resumable
from experiments.robot.libero.policies.checkpoint import load_policy, scaling_warnings
from experiments.robot.libero.policies.choice import make_agent
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.settings.flags import EvaluationConfig, parse_shard
from experiments.robot.libero.settings.suite_names import suites_of
from prismatic.vla.robots import LIBERO

FOUR = ["libero_spatial", "libero_object", "libero_goal", "libero_10"]
CAPS = [220, 280, 300, 520]


def blind(**flags: Any) -> EvaluationConfig:
    """Nothing is rendered."""
    return EvaluationConfig(**{"pretrained_checkpoint": "x", "control": "blank_images", **flags})


def test_names_of_several_suites() -> None:
    assert suites_of("libero_4") == FOUR and suites_of("all") == [*FOUR, "libero_90"]
    assert suites_of("libero_goal, libero_10") == ["libero_goal", "libero_10"]
    given = blind(task_suite_name="libero_4", perturbation="object")
    assert given.task_suite_name == ",".join(f"{suite}_object" for suite in FOUR)
    for names, words in (
        ("libero_goal,libero_goals", "unknown LIBERO suite 'libero_goals'.*several: libero_4"),
        ("libero_4,libero_goal", "names libero_goal twice"),
    ):
        with pytest.raises(ValueError, match=words):
            check_flags(blind(task_suite_name=names))


def test_every_suite_has_its_own_cap(tmp_path: Path) -> None:
    plan = make_plan(
        blind(task_suite_name="libero_4", task_ids="0,3", initial_states="5-6", local_log_dir=str(tmp_path))
    )
    assert [(starts[0].task.suite, starts[0].task.index) for starts in plan.starts] == [
        (suite, index) for suite in FOUR for index in (0, 3)
    ]
    assert [starts[0].max_steps for starts in plan.starts[::2]] == CAPS and plan.max_steps == 520
    assert plan.output_dir.name.startswith("EVAL-libero_spatial+libero_object+libero_goal+libero_10-")
    with pytest.raises(ValueError, match="libero_spatial has no task 10"):
        make_plan(blind(task_suite_name="libero_4", task_ids="10"))


@pytest.mark.parametrize("text", ["0/4", "5/4", "2", "a/b", "2/4/8", "-1/4"])
def test_a_shard_is_a_part_of_so_many(text: str) -> None:
    with pytest.raises(ValueError, match=f"--shard '{text}': expected a part and how many there are"):
        check_flags(blind(shard=text))


def test_shards_are_the_plan_dealt_out_one_by_one() -> None:
    def keys(**flags: Any) -> list[Any]:
        given = {"task_suite_name": "libero_goal,libero_object", "task_ids": "1,8", "initial_states": "0-4", **flags}
        return [start.key for start in itertools.chain(*make_plan(blind(**given)).starts)]

    whole = keys()
    shards = [keys(shard=f"{part}/3") for part in (1, 2, 3)]
    assert parse_shard("3/3") == (3, 3) and len(whole) == 20
    assert shards == [whole[part::3] for part in range(3)]


@pytest.fixture
def checkpoint_of_four(untrained_checkpoint: Path, tmp_path: Path) -> Path:
    """A policy with statistics of each suite, scaled by 1, 2, 3 and 4."""
    folder = shutil.copytree(untrained_checkpoint, tmp_path / "four")
    file = folder / "dataset_statistics.json"
    [own] = json.loads(file.read_text()).values()
    scaled = {}
    for factor, suite in enumerate(FOUR, start=1):
        parts = own["action"].items()
        action = {name: [factor * v for v in value] if name in ("q01", "q99") else value for name, value in parts}
        scaled[f"{suite}_no_noops"] = {**own, "action": action}
    file.write_text(json.dumps(scaled))
    return folder


def test_every_suite_is_scaled_by_its_own_statistics(
    checkpoint_of_four: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EvaluationConfig(
        pretrained_checkpoint=str(checkpoint_of_four), task_suite_name="libero_4", dtype="float32"
    )
    with caplog.at_level("INFO"):
        agent = make_agent(config)
    assert caplog.text.count("running in float32") == 1, "one model load"
    rng = np.random.default_rng(0)
    pictures = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in agent.cameras}
    queries = [PolicyQuery({**pictures, "state": np.zeros(8)}, "put it", 3, suite) for suite in [*FOUR, FOUR[1]]]
    chunks = [chunk.actions for chunk in agent.query(queries)]
    for suite, chunk in zip(FOUR, chunks, strict=False):
        alone = load_policy(replace(config, task_suite_name=suite))
        assert alone.unnorm_key == f"{suite}_no_noops"
        np.testing.assert_allclose(chunk, alone.act(queries[0].observation, "put it"), rtol=1e-5, atol=1e-6)
    assert not np.allclose(chunks[0], chunks[3]) and np.allclose(chunks[1], chunks[4], atol=1e-6)
    described = agent.description()
    assert described["unnorm_keys"] == {suite: f"{suite}_no_noops" for suite in FOUR}
    assert scaling_warnings(described, FOUR) == []
    described["unnorm_keys"]["libero_goal"] = "libero_10_no_noops"
    [warning] = scaling_warnings(described, FOUR)
    assert "statistics of libero_10_no_noops, not of libero_goal" in warning


class Sways:
    """Small motions that depend on the seed of the policy query."""

    robot = LIBERO
    cameras = ("full_image", "wrist_image")
    center_crop = False

    def description(self) -> dict[str, Any]:
        return {"checkpoint": "sways", "assumptions": [], "device_name": "cpu"}

    def close(self) -> None:
        pass

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        return [ActionChunk(np.random.default_rng(query.seed).uniform(-0.5, 0.5, (8, 7))) for query in queries]


def growing(folder: Path, states: str, **flags: Any) -> Plan:
    given = {"task_suite_name": "libero_goal", "task_ids": "1", "num_steps_wait": 0, "num_envs": 1, **flags}
    return replace(make_plan(blind(initial_states=states, output_dir=str(folder), **given)), max_steps=8)


def test_a_finished_evaluation_grows_by_more_initial_states(tmp_path: Path) -> None:
    first = evaluate(growing(tmp_path, "30-31"), Sways(), ["eval"])
    assert first.run["complete"] and first.run["policy"] == "sways"
    check_resumable(more := growing(tmp_path, "29-32", resume=True))
    found = evaluate(more, Sways(), ["eval"])
    assert [e.initial_state for e in found.episodes] == [29, 30, 31, 32] and found.run["complete"]
    assert found.episodes[1:3] == first.episodes, "not rolled out again"
    assert found.config["initial_states"] == "29-32"
    with pytest.raises(
        ValueError, match="holds a rollout of libero_goal task 1, initial state 29, which these flags do"
    ):
        check_resumable(growing(tmp_path, "30-40", resume=True))
    with pytest.raises(ValueError, match="another --shard"):
        check_resumable(growing(tmp_path, "29-32", resume=True, shard="1/1"))


@pytest.mark.slow
def test_four_suites_in_one_command(checkpoint_of_four: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One model load, one results.json, one report."""
    config = EvaluationConfig(
        pretrained_checkpoint=str(checkpoint_of_four), task_suite_name="libero_4", task_ids="0", initial_states="0-1",
        renderer="fast", env_img_res=128, num_steps_wait=0, num_envs=2, output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    with caplog.at_level("INFO"):
        assert main(config, ["eval"]) == 0
    assert len(re.findall(r"running in \w+ on cpu", caplog.text)) == 1
    results = Results.load(tmp_path / "run")
    assert [(e.suite, e.initial_state) for e in results.episodes] == [
        (suite, state) for suite in FOUR for state in (0, 1)
    ]
    assert all(e.steps <= cap for e, cap in zip(results.episodes, np.repeat(CAPS, 2), strict=True))
    assert max(e.steps for e in results.episodes) == 520, "an untrained policy does not solve libero_10"
    summary = results.summary()
    rates = [np.mean([bool(e.success) for e in results.episodes if e.suite == suite]) for suite in FOUR]
    assert {s["suite"]: s["rate"] for s in summary["suites"]} == dict(zip(FOUR, rates, strict=True))
    assert summary["mean_of_suites"] == np.mean(rates)
    [report] = (tmp_path / "run").glob("*.md")
    text = report.read_text()
    assert all(suite in text for suite in FOUR)
    alone = replace(results, run={**results.run, "protocol": {"max_steps": 220, "suite": "libero_spatial"}})
    told = protocol_differences([("A", [results]), ("B", [alone])], {"libero_spatial"})
    assert not any("max_steps" in line or "protocol suite" in line for line in told)
