"""The evaluation's flags, plan and command, on the real simulator and a real (untrained) checkpoint."""

import copy
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.evaluation.command import UNUSABLE, main
from experiments.robot.libero.evaluation.plan import make_plan, scene_of, swap_partners
from experiments.robot.libero.policies.checkpoint import load_policy, statistics_warnings
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.rollouts.record import EpisodeRecording
from experiments.robot.libero.settings.flags import EvaluationConfig, parse_indices
from experiments.robot.libero.settings.protocols import DEFAULT
from experiments.robot.libero.settings.suite_names import SUITES
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.vla.normalization import fit_statistics
from prismatic.vla.robots import LIBERO

TASKS = "1,4,8"  # bowl on the stove, on the cabinet, on the plate: one scene


def config(**flags: Any) -> EvaluationConfig:
    return EvaluationConfig(
        **{"pretrained_checkpoint": "x", "task_suite_name": "libero_goal", "task_ids": TASKS, **flags}
    )


def blind(**flags: Any) -> EvaluationConfig:
    """A plan that needs no rendering, so that making it is quick."""
    return config(control="blank_images", **flags)


@pytest.mark.parametrize(
    ("text", "expected"), [("1,4,8", [1, 4, 8]), ("30-33", [30, 31, 32, 33]), ("7", [7]), ("0-1, 5", [0, 1, 5])]
)
def test_parse_indices(text: str, expected: list[int]) -> None:
    assert parse_indices(text, "task_ids") == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1,1", "0-3,2"])
def test_parse_indices_refuses_nonsense(text: str) -> None:
    with pytest.raises(ValueError, match="--task_ids"):
        parse_indices(text, "task_ids")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pretrained_checkpoint": ""}, "--pretrained_checkpoint is missing"),
        ({"use_diffusion": True}, "exclude each other"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "--load_in_8bit and --load_in_4bit exclude each other"),
        ({"load_in_8bit": True}, "loading in 8bit needs"),
        ({"num_diffusion_steps_train": 0}, "--num_diffusion_steps_train 0: expected at least 1"),
        (
            {"action_head": "tokens"},
            "unknown --action_head 'tokens'; known: auto, l1, diffusion, discrete, auto",
        ),
        ({"use_l1_regression": False, "use_diffusion": True, "action_head": "l1"}, "exclude each other; give one"),
        ({"pruner": "lightvla:min_tokens=--5"}, "min_tokens=--5: expected a whole number, 0 or more"),
        ({"num_diffusion_steps_inference": 0}, "--num_diffusion_steps_inference 0: expected at least 1"),
        ({"task_suite_name": "libero_kitchen"}, "libero_spatial, libero_object"),
        ({"control": "upside_down"}, "none, blank_images"),
        ({"control": "added_tokens", "pruner": "grid:tokens=4"}, "--pruner grid:tokens=4 takes that pruner's place"),
        ({"renderer": "opengl"}, "robosuite, fast"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"num_trials_per_task": 0}, "at least 1"),
        ({"num_open_loop_steps": 0}, "at least 1"),
        ({"wide_starts_m": -0.1}, "negative"),
        ({"seed": -1}, "--seed -1: expected 0 to 2147483647"),
        ({"seed": 2**32}, "expected 0 to 2147483647"),
        ({"env_img_res": 8}, "--env_img_res 8: expected 16 to 4096"),
        ({"worker_timeout_s": 0.0}, "expected 0.1 to 10000000"),
        ({"worker_timeout_s": math.inf}, "--worker_timeout_s inf: expected 0.1 to 10000000"),
        ({"worker_timeout_s": math.nan}, "--worker_timeout_s nan"),
    ],
)
def test_bad_flags_are_named(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_flags(config(**flags))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"task_ids": "3,10"}, "no task 10; expected 0 to 9"),
        ({"initial_states": "48-50"}, "no initial state 50; it has 50"),
        ({"num_trials_per_task": 51}, "has 50 states"),
        ({"wide_starts_m": 0.9}, "at most 0.3"),
    ],
)
def test_a_plan_names_what_does_not_exist(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(blind(**flags))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write into .*/file/run; choose another --output_dir or --local"):
        make_plan(blind(output_dir=str(tmp_path / "file" / "run")))


def test_plan_lays_out_the_starts() -> None:
    plan = make_plan(blind(initial_states="30-41", wide_starts_m=0.06))
    assert plan.max_steps == 300 and not plan.renders
    assert [[start.task.index for start in starts] for starts in plan.starts] == [[1] * 12, [4] * 12, [8] * 12]
    assert [start.initial_state for start in plan.starts[1]] == list(range(30, 42))
    assert [start.trial for start in plan.starts[2]] == list(range(12))
    assert all(start.displacement is not None and start.displacement.trial == 0 for start in plan.starts[0])
    assert plan.starts[0][0].instruction == "put the bowl on the stove"


def test_wide_starts_may_repeat_initial_states() -> None:
    (starts,) = make_plan(blind(task_ids="1", num_trials_per_task=52, wide_starts_m=0.06)).starts
    assert [start.initial_state for start in starts[48:]] == [48, 49, 0, 1]
    assert [start.displacement.trial for start in starts[48:] if start.displacement] == [0, 0, 1, 1]


def test_wide_starts_that_move_nothing_are_told_and_not_repeated() -> None:
    """Turning on the stove names no object: another displacement of nothing is the same rollout."""
    wide = {"task_ids": "1,7", "wide_starts_m": 0.06}
    plan = make_plan(blind(num_trials_per_task=50, **wide))
    assert plan.warnings == [
        "libero_goal task 7: --wide_starts_m moves nothing, since its goal names fixtures alone; its starts are "
        "standard ones"
    ]
    assert len(make_plan(blind(initial_states="30-41", **wide)).starts[1]) == 12
    for more in ({"num_trials_per_task": 51}, {"initial_states": "30-41", "num_trials_per_task": 13}):
        with pytest.raises(ValueError, match="moves nothing in libero_goal task 7 .*ask for at most (50|12), or"):
            make_plan(blind(**more, **wide))


def test_named_states_are_gone_round_for_as_many_trials_as_are_asked_for() -> None:
    (starts,) = make_plan(blind(task_ids="1", initial_states="30-32", num_trials_per_task=8, wide_starts_m=0.06)).starts
    assert [start.initial_state for start in starts] == [30, 31, 32, 30, 31, 32, 30, 31]
    assert [start.displacement.trial for start in starts if start.displacement] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [start.trial for start in starts] == list(range(8)) and len({start.key for start in starts}) == 8
    # A round is a function of the seed: the same for whoever asks, another for another round.
    task, state = starts[0].task, starts[0].task.init_states[30]
    draws = [s.displacement.generator(task, state).random() for s in starts if s.displacement and s.initial_state == 30]
    assert len(set(draws)) == 3
    # The first round is what the states alone have, so the two pair and one goes on with the other.
    (alone,) = make_plan(blind(task_ids="1", initial_states="30-32", wide_starts_m=0.06)).starts
    assert [(s.key, s.seed, s.displacement) for s in alone] == [(s.key, s.seed, s.displacement) for s in starts[:3]]
    (fewer,) = make_plan(blind(task_ids="1", initial_states="30-32", num_trials_per_task=2)).starts
    assert [start.initial_state for start in fewer] == [30, 31]


def test_the_same_rollout_is_not_repeated() -> None:
    words = "--num_trials_per_task 4 with the 3 of --initial_states 30-32 would repeat the same rollouts; name more"
    with pytest.raises(ValueError, match=words):
        make_plan(blind(task_ids="1", initial_states="30-32", num_trials_per_task=4))


def test_states_alone_stay_as_they_were() -> None:
    config = blind(task_ids="1", initial_states="30-32", wide_starts_m=0.06)
    copied = replace(copy.deepcopy(config), task_ids="4")
    for each in (config, copied, pickle.loads(pickle.dumps(config))):
        assert [start.initial_state for start in make_plan(each).starts[0]] == [30, 31, 32]
        assert json.loads(json.dumps(asdict(each)))["num_trials_per_task"] == 50
        assert conventions.describe(each, 300, 8, False)["num_trials_per_task"] is None
    both = replace(config, num_trials_per_task=50)
    assert conventions.describe(both, 300, 8, False)["num_trials_per_task"] == 50
    assert len(make_plan(both).starts[0]) == 50


def test_initial_states_from_a_file(tmp_path: Path) -> None:
    task = load_task("libero_goal", 1)
    path = tmp_path / "states.json"
    with pytest.raises(FileNotFoundError, match="initial_states_path"):
        make_plan(blind(initial_states_path=str(path)))
    entries = {f"demo_{i}": {"success": i != 1, "initial_state": task.init_states[i].tolist()} for i in range(4)}
    path.write_text(json.dumps({"put_the_bowl_on_the_stove": entries}))
    plan = make_plan(blind(task_ids="1", initial_states_path=str(path), num_trials_per_task=3))
    (starts,) = plan.starts
    assert [start.initial_state for start in starts] == [0, 2]
    (warning,) = plan.warnings
    assert warning.startswith("task 1: 2 of 3 trials: ") and warning.endswith("no more successful entries up to demo_2")
    assert starts[1].state is not None and np.array_equal(starts[1].state, task.init_states[2])
    with pytest.raises(ValueError, match="has no task 'put_the_bowl_on_the_plate'"):
        make_plan(blind(task_ids="8", initial_states_path=str(path), num_trials_per_task=1))


def test_swapped_instructions_go_round_the_circle() -> None:
    tasks = [load_task("libero_goal", index) for index in (1, 4, 8)]
    assert len({scene_of(task) for task in tasks}) == 1
    assert [other.index for other in swap_partners(tasks) if other] == [4, 8, 1]
    with pytest.raises(ValueError, match="shares its scene"):
        swap_partners(tasks[:1])
    with pytest.raises(ValueError, match="shares its scene"):
        swap_partners([load_task("libero_object", 0), load_task("libero_object", 1)])


def test_policy_follows_suite_and_flags(untrained_checkpoint: Path) -> None:
    path = str(untrained_checkpoint)
    policy = load_policy(config(pretrained_checkpoint=path, center_crop=False))
    assert policy.unnorm_key == "libero_goal_no_noops" and not policy.transform.center_crop
    random = load_policy(config(pretrained_checkpoint=path, control="random_tokens"))
    assert random.description()["pruner"].startswith("random")
    for control in ("added", "dropped"):
        changed = load_policy(config(pretrained_checkpoint=path, control=f"{control}_tokens", seed=11))
        assert f"draw={control}" in changed.description()["pruner"] and "seed=11" in changed.description()["pruner"]
    with pytest.raises(ValueError, match="was trained with 2"):
        load_policy(config(pretrained_checkpoint=path, num_images_in_input=1))
    with pytest.raises(ValueError, match="a chunk has 8"):
        load_policy(config(pretrained_checkpoint=path, num_open_loop_steps=9))
    with pytest.raises(ValueError, match="libero_goal_no_noops"):
        load_policy(config(pretrained_checkpoint=path, unnorm_key="bridge"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_policy(config(pretrained_checkpoint=path + "-missing"))


def test_an_original_checkpoint_is_evaluated_as_what_it_is(original_directory: Path, tmp_path: Path) -> None:
    """Under the flags that OpenVLA's own command has, and under those that mean discrete tokens to OpenVLA-OFT."""
    path = {"pretrained_checkpoint": str(original_directory), "unnorm_key": "libero_tiny_no_noops"}
    for flags in ({}, {"use_l1_regression": False}, {"action_head": "autoregressive"}):
        assert load_policy(config(**path, **flags)).action_head.kind == "autoregressive"
    parallel = load_policy(config(**path, action_head="discrete", pruner="none"))
    assert parallel.action_head.kind == "discrete" and parallel.robot.open_loop_steps == 8
    refused = {
        "fetch its .pt files, or say what it is": {"action_head": "l1"},
        "--use_l1_regression True: .* assumed an original .*--action_head discrete": {"use_l1_regression": True},
        "one image, but num_images_in_input=2 was": {
            "use_l1_regression": False,
            "num_images_in_input": 2,
            "use_proprio": True,
        },
        r"num_open_loop_steps 8: a chunk has 1 actions \(autoregressive head\)": {"num_open_loop_steps": 8},
        "the pruner is 'random'; set pruner to none": {"control": "random_tokens"},
        "the pruner is 'random'; set pruner to": {"control": "dropped_tokens"},
        "the pruner is 'lightvla'; set pruner to none": {"pruner": "lightvla"},
    }
    for words, flags in refused.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load_policy(config(**path, **flags))


def test_denoising_steps_follow_the_checkpoint(
    untrained_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """None asked for: as many as in training, at most 50. Too many are refused before weights are read."""
    flags: dict[str, Any] = {"use_l1_regression": False, "use_diffusion": True}
    trained = load_checkpoint(untrained_checkpoint)
    for steps, taken in ((10, 10), (60, 50)):
        trained.action_head = DiffusionActionHead(trained.model.config.text_config.hidden_size, 7, 8, steps)
        path = str(save_checkpoint(tmp_path / str(steps), trained, 0))
        policy = load_policy(config(pretrained_checkpoint=path, **flags))
        assert policy.action_head.num_inference_steps == taken
        assert policy.description()["num_diffusion_steps_inference"] == taken
    few = load_policy(config(pretrained_checkpoint=path, num_diffusion_steps_inference=3, **flags))
    assert few.description()["num_diffusion_steps_inference"] == 3
    for file in Path(path).glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(
        ValueError, match="num_diffusion_steps_inference 61: .* was trained with 60 steps; give at most"
    ):
        load_policy(config(pretrained_checkpoint=path, num_diffusion_steps_inference=61, **flags))
    load_policy(config(pretrained_checkpoint=str(untrained_checkpoint), num_diffusion_steps_inference=61))
    assert "--num_diffusion_steps_inference is of diffusion heads" in caplog.text


def test_command_evaluates_an_original_checkpoint(
    original_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DEFAULT.step_caps, "libero_goal", 4)
    flags: dict[str, Any] = {"initial_states": "30", "renderer": "fast", "env_img_res": 64, "device": "cpu"}
    flags |= {"pretrained_checkpoint": str(original_directory), "output_dir": str(tmp_path), "task_ids": "1,8"}
    assert main(config(**flags, unnorm_key="libero_tiny_no_noops", num_envs=1), ["eval"]) == 0
    results = Results.load(tmp_path)
    assert results.policy["action_head"] == "autoregressive" and results.policy["pruner"] == "none"
    assert results.policy["num_images"] == 1 and results.run["protocol"]["open_loop_steps"] == 1
    assert "assumed an original OpenVLA checkpoint" in results.policy["assumptions"][0]
    assert "assumed an original OpenVLA checkpoint" in " ".join(capsys.readouterr().out.split())
    for episode in results.episodes:
        assert episode.invalid is None and episode.steps == len(episode.latency_ms) == 4
        assert set(episode.tokens_kept) == {256} == {episode.num_visual_tokens}


@pytest.mark.parametrize(
    ("key", "suite", "told"),
    [
        ("libero_goal_no_noops", "libero_goal", False),
        ("libero_goal", "libero_goal", False),
        ("my_own_data", "libero_goal", False),
        ("libero_spatial_no_noops", "libero_goal", True),
        ("libero_10", "libero_object", True),
    ],
)
def test_statistics_of_another_suite_are_told(key: str, suite: str, told: bool) -> None:
    found = statistics_warnings(key, suite)
    assert bool(found) == told and all(key in text and suite in text for text in found)


def test_statistics_of_the_suite_that_is_perturbed_are_its_own() -> None:
    perturbed = next(name for name, suite in SUITES.items() if suite.base == "libero_goal" and name != "libero_goal")
    assert not statistics_warnings("libero_goal_no_noops", perturbed)
    assert statistics_warnings("libero_spatial_no_noops", perturbed)


@pytest.mark.parametrize(
    ("facts", "flags", "words"),
    [
        ({"action_dim": 14, "action_mask": (True,) * 14}, {}, "action has 14 numbers; LIBERO's has 7"),
        ({"proprio_dim": 7}, {}, "state has 7 numbers; LIBERO's has 8"),
        ({"chunk_length": 5}, {}, r"--num_open_loop_steps 8 \(the checkpoint records it\): a chunk has 5 actions"),
        (
            {"chunk_length": 5, "open_loop_steps": 5},
            {"num_open_loop_steps": 6},
            "--num_open_loop_steps 6: a chunk has 5",
        ),
        ({"chunk_length": 5, "open_loop_steps": 5}, {"protocol": "lightvla"}, "--num_open_loop_steps 8: a chunk has 5"),
    ],
)
def test_a_policy_for_another_robot_is_refused(
    small_base: Path, tmp_path: Path, facts: dict[str, Any], flags: dict[str, Any], words: str
) -> None:
    robot = replace(LIBERO, name="other", **facts)
    checkpoint = load_checkpoint(small_base, LoadOptions(robot=robot))
    checkpoint.model.config.robot = robot.to_json()
    checkpoint.action_head = L1RegressionActionHead(32, robot.action_dim, robot.chunk_length)
    checkpoint.proprio_projector = ProprioProjector(32, robot.proprio_dim)
    rng = np.random.default_rng(0)
    samples = (rng.uniform(-1, 1, (50, width)) for width in (robot.action_dim, robot.proprio_dim))
    checkpoint.dataset_statistics = {"libero_goal_no_noops": fit_statistics(*samples, robot.action_mask, 2)}
    path = save_checkpoint(tmp_path / "other", checkpoint, 0)
    with pytest.raises(ValueError, match=words):
        load_policy(config(pretrained_checkpoint=str(path), **flags))


def test_command_refuses_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(config(task_suite_name="libero_kitchen"), ["eval"]) == UNUSABLE
    output = " ".join(capsys.readouterr().err.split())
    assert output.startswith("error: unknown LIBERO suite 'libero_kitchen'; known: standard: libero_spatial")
    assert "Traceback" not in output


def test_command_evaluates_and_writes_results(untrained_checkpoint: Path, tmp_path: Path) -> None:
    flags: dict[str, Any] = {"initial_states": "30", "wide_starts_m": 0.06, "renderer": "fast", "env_img_res": 64}
    flags |= {"device": "cpu", "record": True}
    flags |= {"pretrained_checkpoint": str(untrained_checkpoint), "output_dir": str(tmp_path), "task_ids": "1,8"}
    assert main(config(**flags, control="swapped_instruction"), ["eval", "--flag"]) == 0
    results = Results.load(tmp_path)
    assert results.run["complete"] and results.run["command"] == ["eval", "--flag"]
    assert results.policy["unnorm_key"] == "libero_goal_no_noops"
    protocol = results.run["protocol"]
    assert (protocol["name"], protocol["max_steps"], protocol["settle_steps"]) == (None, 300, 10)
    assert protocol["open_loop_steps"] == 8 and protocol["deviations"] == [] == results.run["warnings"]
    first, second = results.episodes
    assert (first.task_index, first.other_task, first.instruction) == (1, 8, "put the bowl on the plate")
    assert (second.task_index, second.other_task) == (8, 1)
    for episode in results.episodes:
        assert episode.invalid is None and episode.success is False
        assert episode.steps == 300 and len(episode.latency_ms) == 38 and episode.num_visual_tokens == 98
        assert episode.displacement is not None and episode.displacement["split"] == "evaluation"
        assert episode.record == f"records/task{episode.task_index}_state30_trial0_failure.npz"
        recording = EpisodeRecording.load(tmp_path / episode.record)
        assert recording.episode.actions_sha256 == episode.actions_sha256 and len(recording.query_steps) == 38
        assert recording.kept is not None and recording.kept.sum(axis=1).tolist() == episode.tokens_kept
        assert recording.policy["unnorm_key"] == "libero_goal_no_noops" and recording.environment["resolution"] == 64
    assert "put the bowl on the plate" in (tmp_path / "report.html").read_text(encoding="utf-8")
