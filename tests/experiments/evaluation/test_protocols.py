"""Protocols: the published numbers, which flags win, and what a result says about it."""

import re
from dataclasses import asdict
from pathlib import Path

import draccus
import pytest

from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.evaluation.plan import make_plan
from experiments.robot.libero.settings.flags import EvaluationConfig

ROOT = Path(__file__).parents[3]


def parse(*flags: str) -> EvaluationConfig:
    return draccus.parse(EvaluationConfig, args=["--pretrained_checkpoint", "x", *flags])


def governed(config: EvaluationConfig) -> tuple[object, ...]:
    return (
        config.num_trials_per_task,
        config.num_steps_wait,
        config.env_img_res,
        config.seed,
        config.num_open_loop_steps,
    )


def test_flags_left_out_are_the_protocol_s() -> None:
    assert governed(parse()) == (50, 10, 256, 7, None)
    assert governed(parse("--protocol", "openvla-oft")) == (50, 10, 256, 7, 8)
    assert governed(parse("--protocol", "lightvla")) == (50, 10, 256, 7, 8)
    assert governed(parse("--protocol", "lerobot")) == (10, 10, 360, 1000, None)
    config = parse("--protocol", "lerobot", "--seed", "7")
    assert governed(config) == (10, 10, 360, 7, None)
    # What was recorded gives the same evaluation again.
    assert EvaluationConfig(**asdict(config)) == config


@pytest.mark.parametrize(
    ("suite", "oft", "lerobot"),
    [
        ("libero_spatial", 220, 280),
        ("libero_object", 280, 280),
        ("libero_goal", 300, 300),
        ("libero_10", 520, 520),
        ("libero_90", 400, 400),
        ("libero_spatial_swap", 220, 280),
    ],
)
def test_step_caps(suite: str, oft: int, lerobot: int) -> None:
    assert conventions.max_steps(parse("--task_suite_name", suite)) == oft
    assert conventions.max_steps(parse("--task_suite_name", suite, "--protocol", "openvla-oft")) == oft
    assert conventions.max_steps(parse("--task_suite_name", suite, "--protocol", "lerobot")) == lerobot


def test_a_result_lists_what_differs() -> None:
    assert conventions.describe(parse(), 220, 8, True)["deviations"] == []
    config = parse("--protocol", "openvla-oft", "--env_img_res", "128", "--task_ids", "1", "--wide_starts_m", "0.06")
    record = conventions.describe(config, 220, 8, True)
    assert record["name"] == "openvla-oft" and record["settle_steps"] == 10 and record["max_steps"] == 220
    assert record["open_loop_steps"] == 8 and record["base_suite"] == "libero_spatial"
    flags = [line for line in record["deviations"] if line.startswith("--")]
    assert flags == [
        "--env_img_res 128: the protocol has 256",
        "--task_ids 1: the protocol does without",
        "--wide_starts_m 0.06: the protocol has 0.0",
    ]
    assert any(line.startswith("seeding:") for line in record["deviations"])


@pytest.mark.parametrize("flags", [("--num_open_loop_steps", "10"), ("--center_crop", "True")])
def test_what_a_protocol_leaves_open_is_not_done_without(flags: tuple[str, str]) -> None:
    words = {
        "num_open_loop_steps": "leaves the number to the policy",
        "center_crop": "crops where the policy's training did",
    }
    (line,) = [x for x in conventions.deviations(parse("--protocol", "lerobot", *flags)) if x.startswith("--")]
    assert line == f"{' '.join(flags)}: the protocol {words[flags[0].removeprefix('--')]}"


def test_a_file_of_initial_states_is_known_by_what_it_holds(tmp_path: Path) -> None:
    path, copy = tmp_path / "states.json", tmp_path / "copy.json"
    for file in (path, copy):
        file.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for file in (path, copy):
        config = parse("--initial_states_path", str(file))
        assert conventions.describe(config, 220, 8, True)["initial_states_sha256"] == digest
    path.write_bytes(b"abd")
    assert conventions.initial_states_sha256(parse("--initial_states_path", str(path))) not in (None, digest)
    assert conventions.describe(parse(), 220, 8, True)["initial_states_sha256"] is None


def test_lerobot_counts_the_seed_up() -> None:
    flags = ("--task_suite_name", "libero_goal", "--task_ids", "1", "--control", "blank_images")
    (starts,) = make_plan(parse("--protocol", "lerobot", *flags)).starts
    assert [start.seed for start in starts] == list(range(1000, 1010))
    assert [start.initial_state for start in starts] == list(range(10))
    (starts,) = make_plan(parse(*flags, "--num_trials_per_task", "3")).starts
    assert [start.seed for start in starts] == [7, 7, 7]


def test_perturbation_is_short_for_the_suite() -> None:
    config = parse("--task_suite_name", "libero_goal", "--perturbation", "language")
    assert config.task_suite_name == "libero_goal_lan"
    assert EvaluationConfig(**asdict(config)) == config
    check_flags(config)
    with pytest.raises(ValueError, match="does not fit --task_suite_name libero_90"):
        check_flags(parse("--task_suite_name", "libero_90", "--perturbation", "language"))
    with pytest.raises(ValueError, match="unknown --perturbation 'words'"):
        check_flags(parse("--perturbation", "words"))
    with pytest.raises(ValueError, match="unknown --protocol 'oft'; known: openvla-oft, lightvla, lerobot"):
        check_flags(parse("--protocol", "oft"))


@pytest.mark.parametrize("good", ["3.2.3", "3.2.7"])
def test_another_mujoco_is_warned_about(good: str) -> None:
    assert conventions.version_warnings({"mujoco": good}) == [] == conventions.version_warnings({})
    (line,) = conventions.version_warnings({"mujoco": "3.4.0"})
    assert "3.4.0 is installed" in line and f"mujoco=={good}" in line and "\n" not in line


def test_the_recommended_mujocos_are_those_that_are_installed() -> None:
    pins = re.findall(
        r'"mujoco==([\d.]+); python_version (<|==|>=) \'([\d.]+)\'"', (ROOT / "pyproject.toml").read_text()
    )
    assert [pin[1:] for pin in pins] == [("<", "3.13"), ("==", "3.13"), (">=", "3.14")]
    assert [pin[0] for pin in pins[:2]] == list(conventions.RECOMMENDED_MUJOCO)
