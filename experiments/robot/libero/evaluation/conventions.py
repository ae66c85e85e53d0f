"""The conventions in force: what follows from flags and protocol, and what a result says about them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from experiments.robot.libero.settings.flags import OWN_STATES, EvaluationConfig, protocol_of
from experiments.robot.libero.settings.protocols import GOVERNED
from experiments.robot.libero.settings.suite_names import find_suite, suites_of

RECOMMENDED_MUJOCO = {"3.2.3": "Python up to 3.12", "3.2.7": "Python 3.13"}
"""The versions that the extra `libero` pins, each for its Python; they draw alike, others otherwise (SETUP.md)."""


_STANDARD = {
    "initial_states_path": OWN_STATES,
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


def max_steps(config: EvaluationConfig, suite: str | None = None) -> int:
    """Control steps after which a rollout has failed: a suite's, a perturbed one's being its base's, or the most."""
    suites = suites_of(config.task_suite_name) if suite is None else [suite]
    return max(protocol_of(config).step_caps[find_suite(name).base] for name in suites)


def reset_seed(config: EvaluationConfig, trial: int) -> int:
    """Seed of the simulator before the reset of a task's rollout."""
    return config.seed + (trial if protocol_of(config).seed_counts_up else 0)


def deviations(config: EvaluationConfig) -> list[str]:
    """What differs from the protocol: flags, then what this evaluation cannot repeat. Empty without a protocol."""
    protocol = protocol_of(config)
    if config.protocol is None:
        return []
    expected = {flag: getattr(protocol, flag) for flag in GOVERNED} | _STANDARD
    changed = [
        f"--{flag} {getattr(config, flag)}: the protocol "
        + (_LEFT_OPEN.get(flag, "does without") if value is None else f"has {value}")
        for flag, value in expected.items()
        if getattr(config, flag) != value
    ]
    return [*changed, *protocol.differences]


def describe(config: EvaluationConfig, most_steps: int, open_loop_steps: int, center_crop: bool) -> dict[str, Any]:
    """What a result records under `run["protocol"]`: the conventions as they were in force.

    What depends on the suite stands under `suites` where there are several (`caveats.recorded_protocol` puts together).
    """
    own = {
        suite.name: {
            "suite": suite.name,
            "base_suite": suite.base,
            "perturbation": suite.perturbation,
            "max_steps": min(most_steps, max_steps(config, suite.name)),
        }
        for suite in map(find_suite, suites_of(config.task_suite_name))
    }
    return {
        "name": config.protocol,
        **({"suites": own} if len(own) > 1 else next(iter(own.values()))),
        "num_trials_per_task": config.num_trials_per_task if config.initial_states is None else config.trials_of_states,
        "settle_steps": config.num_steps_wait,
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
    """Of the file of initial states, 64 hexadecimal digits, so that equal names do not pass for equal ones.

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
