"""How published evaluations roll out: the conventions behind `--protocol`, and what a result says about them.

A protocol gives the flags that were left out. A flag that is given wins, and the result lists it among the deviations,
together with what this evaluation does otherwise whatever the flags.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.robot.libero.suites import PERTURBATIONS, STEP_CAPS, find_suite, perturbed

if TYPE_CHECKING:
    from experiments.robot.libero.config import EvaluationConfig

RECOMMENDED_MUJOCO = {"3.2.3": "Python up to 3.12", "3.2.7": "Python 3.13"}
"""The versions that the extra `libero` pins, each for its Python; they draw alike, others otherwise (SETUP.md)."""


@dataclass(frozen=True)
class Protocol:
    """The conventions of an evaluation.

    Args:
        num_trials_per_task: Rollouts per task; the first initial states, in order.
        num_steps_wait: Steps of the settle action before the policy looks.
        env_img_res: Side of the rendered pictures in pixels.
        seed: Of the simulator before every reset.
        num_open_loop_steps: Actions executed of each chunk; None: as many as the robot's or the policy's.
        step_caps: Standard suite -> control steps after which a rollout has failed.
        seed_counts_up: Whether the seed grows by one with every rollout of a task.
        differences: What is done otherwise here, whatever the flags.
    """

    num_trials_per_task: int = 50
    num_steps_wait: int = 10
    env_img_res: int = 256
    seed: int = 7
    num_open_loop_steps: int | None = None
    step_caps: dict[str, int] = field(default_factory=lambda: dict(STEP_CAPS))
    seed_counts_up: bool = False
    differences: tuple[str, ...] = ()


DEFAULT = Protocol()
"""Without `--protocol`."""

_SEEDED_ONCE = (
    "seeding: the published code seeds the simulator with 0 once per task, so that fixtures lie where earlier rollouts "
    "left the generator; here it is seeded before every reset"
)
_SOFT_RESET = "resets: the published code builds the simulator anew for every rollout; here it is built once per task"

PROTOCOLS = {
    # github.com/moojink/openvla-oft, experiments/robot/libero/run_libero_eval.py (GenerateConfig, TASK_MAX_STEPS) and
    # libero_utils.py: 256 px, both cameras turned by 180 degrees, relative control, `env.seed(0)` after the build,
    # centre crop where training cropped (here the checkpoint says so).
    "openvla-oft": Protocol(num_open_loop_steps=8, differences=(_SEEDED_ONCE, _SOFT_RESET)),
    # The LightVLA research code is a fork of the above (arXiv 2509.12594; run_libero_eval.py in github.com/minxin-lai/
    # LightVLA, a copy of it): the same conventions, rollouts spread over processes.
    "lightvla": Protocol(num_open_loop_steps=8, differences=(_SEEDED_ONCE, _SOFT_RESET)),
    # github.com/huggingface/lerobot, docs/source/libero.mdx: 10 episodes per task, relative control, hard resets;
    # src/lerobot/envs/libero.py: caps (spatial 280), 10 settle steps, seeding at every reset; envs/configs.py: 360 px;
    # configs/eval.py: seed 1000; scripts/lerobot_eval.py: episode n of a task gets seed + n. `n_action_steps` and
    # cropping are the policy's.
    "lerobot": Protocol(
        num_trials_per_task=10,
        env_img_res=360,
        seed=1000,
        step_caps={**STEP_CAPS, "libero_spatial": 280},
        seed_counts_up=True,
        differences=(_SOFT_RESET,),
    ),
}
"""`--protocol` -> conventions."""

_GOVERNED = ("num_trials_per_task", "num_steps_wait", "env_img_res", "seed", "num_open_loop_steps")
_STANDARD = {
    "initial_states_path": "DEFAULT",
    "initial_states": None,
    "task_ids": None,
    "center_crop": None,
    "wide_starts_m": 0.0,
    "renderer": "robosuite",
    "control": "none",
}
_LEFT_OPEN = {
    "num_open_loop_steps": "leaves the number to the policy",
    "center_crop": "crops where the policy's training did",
}
"""What a protocol says where it has no value; elsewhere that it does without the flag."""


def protocol_of(config: EvaluationConfig) -> Protocol:
    """Raises ValueError for an unknown `--protocol`."""
    if config.protocol is None:
        return DEFAULT
    if config.protocol not in PROTOCOLS:
        raise ValueError(f"unknown --protocol {config.protocol!r}; known: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[config.protocol]


def fill_in(config: EvaluationConfig) -> None:
    """Give the flags that were left out their values, and the suite its perturbation.

    What is unknown stays for `check_flags` to complain about.
    """
    protocol = PROTOCOLS.get(config.protocol or "", DEFAULT)
    for flag in _GOVERNED:
        if getattr(config, flag) is None:
            setattr(config, flag, getattr(protocol, flag))
    if config.perturbation in PERTURBATIONS:
        try:
            config.task_suite_name = perturbed(config.task_suite_name, config.perturbation)
        except ValueError:
            return


def max_steps(config: EvaluationConfig) -> int:
    """Control steps after which a rollout has failed; a perturbed suite has its base's cap."""
    return protocol_of(config).step_caps[find_suite(config.task_suite_name).base]


def reset_seed(config: EvaluationConfig, trial: int) -> int:
    """Seed of the simulator before the reset of a task's rollout."""
    return config.seed + (trial if protocol_of(config).seed_counts_up else 0)


def deviations(config: EvaluationConfig) -> list[str]:
    """What differs from the protocol: flags, then what this evaluation cannot repeat. Empty without a protocol."""
    protocol = protocol_of(config)
    if config.protocol is None:
        return []
    expected = {flag: getattr(protocol, flag) for flag in _GOVERNED} | _STANDARD
    changed = [
        f"--{flag} {getattr(config, flag)}: the protocol "
        + (_LEFT_OPEN.get(flag, "does without") if value is None else f"has {value}")
        for flag, value in expected.items()
        if getattr(config, flag) != value
    ]
    return [*changed, *protocol.differences]


def describe(config: EvaluationConfig, max_steps: int, open_loop_steps: int, center_crop: bool) -> dict[str, Any]:
    """What a result records under `run["protocol"]`: the conventions as they were in force."""
    suite = find_suite(config.task_suite_name)
    return {
        "name": config.protocol,
        "suite": suite.name,
        "base_suite": suite.base,
        "perturbation": suite.perturbation,
        "num_trials_per_task": config.num_trials_per_task if config.initial_states is None else None,
        "settle_steps": config.num_steps_wait,
        "max_steps": max_steps,
        "open_loop_steps": open_loop_steps,
        "env_img_res": config.env_img_res,
        "rotation_degrees": 180,
        "center_crop": center_crop,
        "control_mode": "relative",
        "seed": config.seed,
        "initial_states_sha256": initial_states_sha256(config),
        "seeding": "before every reset" + (", seed + trial" if protocol_of(config).seed_counts_up else ""),
        "deviations": deviations(config),
    }


def initial_states_sha256(config: EvaluationConfig) -> str | None:
    """Of the file of initial states, 64 hexadecimal digits, so that equal names do not pass for equal starts.

    None for the task's own states.
    """
    if config.initial_states_path == _STANDARD["initial_states_path"]:
        return None
    return hashlib.sha256(Path(config.initial_states_path).read_bytes()).hexdigest()


def version_warnings(versions: dict[str, str]) -> list[str]:
    """One line where the installed MuJoCo is none of the recommended ones."""
    found = versions.get("mujoco")
    if found is None or found in RECOMMENDED_MUJOCO:
        return []
    remedies = " or ".join(f"mujoco=={version} ({python})" for version, python in RECOMMENDED_MUJOCO.items())
    return [
        f"mujoco {found} is installed and another is recommended: its version changes pixels and success rates with "
        f"them (SETUP.md); pip install {remedies}"
    ]
