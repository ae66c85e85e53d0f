"""A definition is read strictly, and stays what it was once an arm has been run."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from study_files import CONTENT, changed, write_study

from lightvla.study.arm_flags import check_arms
from lightvla.study.definition import read_study
from lightvla.study.flags import study_parser
from lightvla.study.records import check_unchanged, fix, forced_changes
from lightvla.study.run import command

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*/study.yaml")), ids=lambda path: path.parent.name)
def test_every_study_of_this_repository_can_be_run(path: Path) -> None:
    study = read_study(path)
    check_arms(study)
    assert {"none", "lightvla"} <= {arm.name for arm in study.arms}
    assert study.fixed.primary == ("lightvla", "none")


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("quick", "f50dab70767c72709e698da148368a408fd8041faf44a15665e1333ac0c3487a"),
        ("goal3", "68261435d256b8b745591e7ba92f32c9558b70ba9556caee4614a19b28f688c9"),
        ("object", "6119fbef8d14ca62e4bb8f3e4e5806e538fab5e06d0a7cfdd2dfe69b778ba3d4"),
        ("goal3-training", "c28c6a9c96590d0d576806e7e94a262a21bfdf0b3808b58c75f3d98ffd07bbaa"),
    ],
)
def test_hashes_stay_where_definitions_do(name: str, sha256: str) -> None:
    """Results are bound to them: keys that came later change none, and a study that is changed shows here."""
    assert read_study(ROOT / "studies" / name / "study.yaml").sha256 == sha256


def test_comments_and_order_are_no_part_of_the_hash(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    before = read_study(places.definition)
    assert before.training.learning_rate == 3e-4
    places.definition.write_text("# said otherwise\n" + yaml.safe_dump(CONTENT, sort_keys=False))
    assert read_study(places.definition).sha256 == before.sha256
    for where, value in (
        ("fixed.margin_points", 12),
        ("arms.1.checkpoints", [1]),
        ("scenes.0.checkpoint_trials_per_task", 5),
    ):
        write_study(tmp_path, changed(where, value))
        assert read_study(places.definition).sha256 != before.sha256
    write_study(tmp_path, changed("scenes.0.checkpoint_trials_per_task", 0))
    assert read_study(places.definition).sha256 == before.sha256, "what it is without the key"


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("question", 3, "question is 3; expected text"),
        ("seeds", [7], "unknown keys at the top: seeds; known are question, scenes, training, arms, fixed"),
        ("scenes.0.task", 1, "unknown keys in scenes[0]: task; known are name, suite, tasks, "),
        ("scenes.0.tasks", [], "scenes[0].tasks is []; expected a list with at least one entry"),
        ("scenes.0.tasks", ["1"], "scenes[0].tasks[0] is '1'; expected a whole number"),
        ("scenes.0.tasks", [1, 10], "scene goal: libero_goal has no task 10; expected 0 to 9"),
        ("scenes.0.tasks", [-1], "scene goal: libero_goal has no task -1; expected 0 to 9"),
        ("scenes.0.tasks", [1, 1], "scene goal: tasks are [1, 1]; name each once"),
        ("scenes.0.suite", "libero_gaol", "scene goal: unknown LIBERO suite 'libero_gaol'; known: "),
        ("scenes.0.held_out_states", "5-12", "state 5 is trained on and held out"),
        ("scenes.0.held_out_states", "40-50", "initial states 0 to 49"),
        ("scenes.0.wide_starts_m", 0, "10 trials of 5 held-out states would repeat rollouts"),
        ("training", [], "in training stands []; expected the keys seeds, parent_steps"),
        ("training.seeds", [7, 7], "expected different numbers from 0 on"),
        ("training.arm_steps", 0, "training.arm_steps is 0; expected more than 0"),
        ("training.batch_size", True, "training.batch_size is True; expected a whole number"),
        ("training.learning_rate", "much", "training.learning_rate is 'much'; expected a number"),
        ("arms.0.name", "a/b", "the name 'a/b' in arms: expected letters"),
        ("arms.0.name", "lightvla", "the name 'lightvla' stands twice in arms"),
        ("arms.0.kind", "learnt", "arm none has kind 'learnt'; known are trained: fine-tuned"),
        ("arms.0.name", "dense", "arm grid needs a trained arm named none; add it"),
        ("arms.1.flags", "--pruner grids:tokens={lightvla}", "arm lightvla: {lightvla} is what lightvla keeps once"),
        ("arms.0.flags", "--pruner grids:tokens={lightvla}", "neither it nor none can begin with that, so say a"),
        ("arms.2.checkpoints", [1], "arm grid: checkpoints [1]: only a trained arm has some of its own"),
        (
            "arms.1.checkpoints",
            [2, 1],
            "arm lightvla: checkpoints [2, 1]: expected rising steps, from 1 to below the 3",
        ),
        ("arms.1.checkpoints", [1, 3], "checkpoints [1, 3]: expected rising steps, from 1 to below the 3 of training."),
        ("arms.1.checkpoints", 1, "arms[1].checkpoints is 1; expected a list"),
        ("scenes.0.checkpoint_trials_per_task", 11, "is 11; expected at most the 10 of trials_per_task, or 0 for all"),
        ("scenes.0.perturbations", ["position"], "perturbations and perturbed_arms go together; give both, or neither"),
        ("scenes.0.perturbed_arms", ["none"], "perturbations and perturbed_arms go together; give both, or neither"),
        ("arms.2.flags", "--perturbation position", "--perturbation is the study's, the same for all arms"),
        ("arms.0.flags", "--save_freq 5", "--save_freq is the study's, the same for all arms"),
        ("arms.0.flags", "--pruner", "expected pairs as --pruner none"),
        ("arms.0.flags", "--prunner none", "lightvla finetune has no flag --prunner"),
        ("arms.0.flags", "--max_steps 9", "--max_steps is the study's, the same for all arms"),
        ("arms.2.flags", "--num_trials_per_task 9", "--num_trials_per_task is the study's"),
        ("arms.2.flags", "--pruner gird:tokens=3", "gird"),
        ("arms.3.flags", "--control blinded", "unknown --control blinded; known: none, blank_images"),
        ("fixed.primary", ["lightvla"], "expected two arms: [lightvla, none], say"),
        ("fixed.primary", ["lightvla", "dense"], "no arm 'dense'; the arms are none, lightvla, grid, blind"),
        ("fixed.margin_points", 0, "fixed.margin_points is 0.0; expected more than 0"),
        ("fixed.primry", 1, "unknown keys in fixed: primry; known are primary, margin_points, exclusions"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(where: str, value: Any, said: str, tmp_path: Path, capsys) -> None:
    write_study(tmp_path / "s", changed(where, value))
    options = study_parser().parse_args(["s", "--studies_dir", str(tmp_path), "--list"])
    assert command(options) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error
    assert not (tmp_path / "s" / "work").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name one study: lightvla study NAME, or lightvla study --preset quick"),
        (["s", "--preset", "quick"], "name one study"),
        (["nothing"], "there is no such study"),
        (["s", "--only", "dense"], "--only dense: no arm 'dense'; the arms are none, lightvla, grid, blind"),
        (["s", "--num_processes", "0"], "--num_processes 0: expected 1 or more"),
        (["s", "--report_only", "True"], "holds no results yet"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(words: list[str], said: str, tmp_path: Path, capsys) -> None:
    write_study(tmp_path / "s")
    assert command(study_parser().parse_args([*words, "--studies_dir", str(tmp_path)])) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "s" / "work").exists()


@pytest.mark.parametrize(
    ("perturbations", "arms", "said"),
    [
        (["swap"], ["none"], "scene goal: unknown --perturbation 'swap'; known: language, object, position, task, env"),
        (["position"], ["dense"], "scene goal: no arm 'dense'; the arms are none, lightvla, grid, blind"),
        (["object", "object"], ["none"], r"perturbations are \['object', 'object'\]; name each once"),
        (["object"], ["lightvla"], "perturbed_arms lacks none, which the others are compared with"),
    ],
)
def test_perturbations_that_cannot_be_measured_are_refused(perturbations, arms, said, tmp_path: Path) -> None:
    content = changed("scenes.0.perturbations", perturbations)
    content["scenes"][0]["perturbed_arms"] = arms
    with pytest.raises(ValueError, match=said):
        read_study(write_study(tmp_path, content).definition)


def test_more_checkpoints_than_a_disk_should_hold_are_refused(tmp_path: Path) -> None:
    content = changed("arms.1.checkpoints", [400, 801])
    content["training"]["arm_steps"] = 1650
    with pytest.raises(
        ValueError, match=r"\[400, 801\]: to have these, one is kept every 1 steps, 1651 in all; give mul"
    ):
        read_study(write_study(tmp_path, content).definition)


def test_a_definition_stays_once_an_arm_was_run(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    first = read_study(places.definition)
    check_unchanged(first, places, force=False)
    fix(first, places)
    fix(first, places)
    check_unchanged(first, places, force=False)
    write_study(tmp_path, changed("fixed.margin_points", 20))
    second = read_study(places.definition)
    with pytest.raises(ValueError, match=r"was changed after arms had been run by it .* put it back, write the new"):
        check_unchanged(second, places, force=False)
    assert not forced_changes(places)
    check_unchanged(second, places, force=True)
    check_unchanged(second, places, force=False)
    [change] = forced_changes(places)
    assert (change["from"], change["to"]) == (first.sha256, second.sha256)
