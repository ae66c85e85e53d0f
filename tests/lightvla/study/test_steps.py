"""The steps of a study are commands that the command lines understand, and only what is left is run."""

from pathlib import Path

import draccus
import pytest
from study_files import CONTENT, changed, keep, write_study

from experiments.robot.libero.demonstrations.config import CollectionConfig
from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.settings.flags import EvaluationConfig
from lightvla.demo.small_model import SmallModelConfig
from lightvla.study.benchmarks import SceneBenchmark
from lightvla.study.definition import read_study
from lightvla.study.places import Places
from lightvla.study.progress import SECONDS_PER_UNIT, Progress, units_done, wall_seconds
from lightvla.study.steps import all_steps, filled_in, fingerprints, ordered
from prismatic.benchmark.config import BenchmarkConfig, pruner_names
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import dataset_specs
from prismatic.training.preflight import check_flags as check_training
from prismatic.vla.gripper import GRIPPERS

PARSERS = {
    "collect": CollectionConfig, "build-small-model": SmallModelConfig, "finetune": FinetuneConfig,
    "eval": EvaluationConfig, "benchmark": BenchmarkConfig,
}  # fmt: skip


def parsed(command: list[str]):
    place = command.index("lightvla") + 1
    return draccus.parse(PARSERS[command[place]], args=command[place + 1 :])


def test_every_step_is_a_command_that_is_understood(tmp_path: Path) -> None:
    places = write_study(tmp_path / "a study")
    study = read_study(places.definition)
    steps = all_steps(study, places)
    assert len(steps) == 1 + 2 * (2 + 2 + 4) + 1
    configs = {name: parsed(filled_in(step, 2, 17)) for name, step in steps.items()}
    before: set[str] = set()
    for name, step in steps.items():
        assert set(step.needs) <= before, "a step stands behind what it needs"
        before.add(name)
    collection, parent = configs["collect-goal"], configs["train-goal-parent-seed7"]
    assert isinstance(collection, CollectionConfig) and collection.num_processes == 2
    collection.validate()
    assert parent.vla_path == str(configs["build-seed7"].output_dir)
    for name in ("none", "lightvla"):
        arm = configs[f"train-goal-{name}-seed7"]
        assert arm.vla_path == str(parent.run_dir) and arm.max_steps == 3 and arm.learning_rate == 3e-4
        check_training(arm)
        assert [spec.map_actions for spec, _ in dataset_specs(arm)] == [GRIPPERS["libero"]]
        assert (arm.seed, arm.batch_size) == (parent.seed, parent.batch_size)
    trained_by = {"none": "none", "lightvla": "lightvla", "grid": "none", "blind": "lightvla"}
    for name, run in trained_by.items():
        evaluation = configs[f"evaluate-goal-{name}-seed11"]
        check_flags(evaluation)
        assert evaluation.pretrained_checkpoint == str(configs[f"train-goal-{run}-seed11"].run_dir)
        assert (evaluation.initial_states, evaluation.trials_of_states, evaluation.seed) == ("30-34", 10, 7)
    assert configs["evaluate-goal-grid-seed7"].pruner == "grid:tokens=17"
    assert "evaluate-goal-lightvla-seed7" in steps["evaluate-goal-grid-seed7"].needs
    benchmark = configs["benchmark-goal-seed7"]
    assert benchmark.checkpoint == str(configs["train-goal-lightvla-seed7"].run_dir) and benchmark.tokens == 17
    assert pruner_names(benchmark.pruners) == ["none", "lightvla", "grid:tokens=17"]


def test_a_trained_arm_may_begin_with_the_count_that_lightvla_reached(tmp_path: Path) -> None:
    sampler = {"name": "sampler", "kind": "trained", "flags": "--pruner grids:tokens={lightvla}"}
    places = write_study(tmp_path, {**CONTENT, "arms": [sampler, *CONTENT["arms"]]})
    progress = Progress(read_study(places.definition), places)
    names = list(progress.steps)
    train = progress.steps["train-goal-sampler-seed11"]
    assert set(train.needs) == {"collect-goal", "train-goal-parent-seed11", "evaluate-goal-lightvla-seed11"}
    assert all(names.index(need) < names.index(train.name) for need in train.needs)
    assert "evaluate-goal-lightvla-seed11" not in progress.steps["evaluate-goal-sampler-seed11"].needs
    assert "train-goal-lightvla-seed7" in {step.name for step in progress.left("sampler")}
    keep(places, "lightvla", lambda *_: True, tokens=17.4)
    left = {step.name for step in progress.left("sampler")}
    assert train.name in left and "train-goal-lightvla-seed7" not in left
    config = parsed(filled_in(train, 2, progress.count_for(train)))
    assert isinstance(config, FinetuneConfig) and config.pruner == "grids:tokens=17"
    check_training(config)


def test_checkpoints_are_kept_and_measured_as_steps_of_their_own(tmp_path: Path) -> None:
    content = changed("arms.1.checkpoints", [2, 4])
    content["training"]["arm_steps"] = 5
    content["scenes"][0]["checkpoint_trials_per_task"] = 6
    places = write_study(tmp_path, content)
    study = read_study(places.definition)
    steps = all_steps(study, places)
    assert len(steps) == 1 + 2 * (2 + 2 + 4 + 2) + 1
    train = parsed(filled_in(steps["train-goal-lightvla-seed7"], 2, None))
    assert isinstance(train, FinetuneConfig) and train.save_freq == 2 and not train.save_latest_checkpoint_only
    other = parsed(filled_in(steps["train-goal-none-seed7"], 2, None))
    assert isinstance(other, FinetuneConfig) and other.save_freq == 1000 and other.save_latest_checkpoint_only
    own = parsed(filled_in(steps["evaluate-goal-lightvla-seed7"], 2, None))
    for number in (2, 4):
        step = steps[f"evaluate-goal-lightvla@step{number}-seed7"]
        config = parsed(filled_in(step, 2, None))
        assert isinstance(config, EvaluationConfig) and isinstance(own, EvaluationConfig)
        check_flags(config)
        checkpoint = train.run_dir / "checkpoints" / f"goal-lightvla-seed7--{number}_chkpt"
        assert config.pretrained_checkpoint == str(checkpoint) and step.needs == ("train-goal-lightvla-seed7",)
        assert (config.trials_of_states, own.trials_of_states, step.units) == (6, 10, 12)
        assert (config.initial_states, config.seed, config.wide_starts_m) == ("30-34", own.seed, own.wide_starts_m)
    progress = Progress(study, places)
    keep(places, "lightvla", lambda *_: True)
    left = {step.name for step in progress.left("lightvla")}
    assert {name for name in left if "evaluate" in name} == {
        f"evaluate-goal-lightvla@step{step}-seed{seed}" for step in (2, 4) for seed in (7, 11)
    }
    for number in (2, 4):
        keep(places, "lightvla", lambda *_: True, variant=f"step{number}", trials=6)
    assert progress.left("lightvla") == []


def test_perturbed_arms_are_measured_on_the_perturbed_suite(tmp_path: Path) -> None:
    content = changed("scenes.0.perturbations", ["position", "object"])
    content["scenes"][0]["perturbed_arms"] = ["none", "grid"]
    places = write_study(tmp_path, content)
    study = read_study(places.definition)
    steps = all_steps(study, places)
    assert len(steps) == 1 + 2 * (2 + 2 + 4 + 4) + 1
    plain = parsed(filled_in(steps["evaluate-goal-grid-seed11"], 2, 17))
    for perturbation, suite in (("position", "libero_goal_swap"), ("object", "libero_goal_object")):
        step = steps[f"evaluate-goal-grid@{perturbation}-seed11"]
        config = parsed(filled_in(step, 2, 17))
        assert isinstance(config, EvaluationConfig) and isinstance(plain, EvaluationConfig)
        check_flags(config)
        assert config.task_suite_name == suite and config.pruner == "grid:tokens=17"
        changes = {name for name, value in vars(config).items() if value != getattr(plain, name)}
        assert changes == {"task_suite_name", "perturbation", "output_dir"}
        assert step.needs == steps["evaluate-goal-grid-seed11"].needs and step.units == 20
    progress = Progress(study, places)
    for variant in ("", "position", "object"):
        keep(places, "none", lambda *_: True, variant=variant)
    assert progress.left("none") == []


def test_one_arm_needs_less_and_kept_results_are_not_made_again(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    study = read_study(places.definition)
    progress = Progress(study, places)
    assert len(progress.left(None)) == len(progress.steps)
    assert {step.name for step in progress.left("none")} == {
        "collect-goal", "build-seed7", "build-seed11",
        *(f"{step}-seed{seed}" for seed in (7, 11) for step in
          ("train-goal-parent", "train-goal-none", "evaluate-goal-none")),
    }  # fmt: skip
    for arm in ("none", "lightvla", "blind"):
        keep(places, arm, lambda *_: True, tokens=17.4)
    left = {step.name for step in progress.left("grid")}
    assert "train-goal-none-seed7" in left and "train-goal-lightvla-seed7" not in left
    assert progress.count_for(progress.steps["evaluate-goal-grid-seed7"]) == 17
    keep(places, "grid", lambda *_: True)
    assert [step.kind for step in progress.left("grid")] == []
    assert {step.name for step in progress.left(None)} >= {"train-goal-lightvla-seed7", "benchmark-goal-seed7"}
    SceneBenchmark(study.sha256, "lightvla benchmark", {}, ()).save(places.benchmark(study, "goal"))
    assert progress.left(None) == []


def test_a_step_is_done_when_it_ended_well_and_is_whole(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    progress = Progress(read_study(places.definition), places)
    step = progress.steps["build-seed7"]
    assert progress.begin(step) == 0.0 and not progress.is_done(step)
    progress.end(step, 12.0, done=False)
    assert progress.begin(step) == 12.0, "its time counts on"
    step.makes.mkdir(parents=True)
    step.proof.write_text("{}")
    assert not progress.is_done(step)
    progress.end(step, 30.0, done=True)
    assert progress.is_done(step)
    assert progress.estimates()["build-seed11"] == 30.0, "as long as the other one of its kind took"
    step.proof.unlink()
    assert not progress.is_done(step), "what it made is gone"


def test_another_command_begins_anew_and_so_does_what_is_made_from_it(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    before = Progress(read_study(places.definition), places)
    for name in ("build-seed7", "train-goal-parent-seed7"):
        step = before.steps[name]
        before.begin(step)
        step.proof.mkdir(parents=True)
        before.end(step, 1.0, done=True)
    assert before.is_done(before.steps["train-goal-parent-seed7"])
    write_study(tmp_path, changed("scenes.0.image_size", 128))
    after = Progress(read_study(places.definition), places)
    parent = after.steps["train-goal-parent-seed7"]
    assert after.is_done(after.steps["build-seed7"]) and not after.is_done(parent), "its data are others"
    after.begin(parent)
    assert not parent.makes.exists()


def test_times_are_estimated_by_kind(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    study = read_study(places.definition)
    progress = Progress(study, places)
    seconds = progress.estimates()
    assert seconds["collect-goal"] == 6 * SECONDS_PER_UNIT["collect"]
    assert seconds["train-goal-none-seed7"] == 12 * SECONDS_PER_UNIT["train"]
    evaluations = ordered(progress.steps, ["evaluate-goal-none-seed7", "evaluate-goal-grid-seed7"])
    assert wall_seconds(evaluations, seconds, 2) == 20 * SECONDS_PER_UNIT["evaluate"]
    run = progress.steps["train-goal-none-seed7"].makes
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"ste')
    assert units_done(progress.steps["train-goal-none-seed7"]) == 8


def test_simulator_processes_change_nothing(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    steps = all_steps(read_study(places.definition), places)
    assert filled_in(steps["collect-goal"], 1, None) != filled_in(steps["collect-goal"], 3, None)
    assert len(set(fingerprints(steps, places).values())) == len(steps)


def test_steps_stay_done_wherever_the_study_is_called_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = write_study(tmp_path / "studies" / "s")
    study = read_study(places.definition)
    monkeypatch.chdir(tmp_path / "studies" / "s")
    found = [
        fingerprints(all_steps(study, each), each)
        for each in (places, Places(Path(".")), Places(Path("../s")), Places(tmp_path / "elsewhere"))
    ]
    assert all(each == found[0] for each in found[1:])


@pytest.mark.parametrize(("where", "name"), [("arms.2.name", "parent"), ("arms.0.name", "a-none")])
def test_names_of_steps_do_not_collide(where: str, name: str, tmp_path: Path) -> None:
    content = changed(where, name)
    if name == "parent":
        content["arms"][2] = {"name": name, "kind": "trained", "flags": "--pruner none"}
    if name == "a-none":
        content["arms"].append({"name": "none", "kind": "trained", "flags": "--pruner none"})
        content["scenes"].append({**content["scenes"][0], "name": "goal-a"})
    write_study(tmp_path, content)
    with pytest.raises(ValueError, match="two steps would be called .*; rename a scene or an arm"):
        all_steps(read_study(tmp_path / "study.yaml"), Places(tmp_path))
