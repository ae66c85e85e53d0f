"""How published evaluations roll out: the conventions behind `--protocol`.

A protocol gives the flags that were left out. A flag that is given wins, and the result lists it among the deviations,
together with what this evaluation does otherwise whatever the flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.robot.libero.settings.suite_names import STEP_CAPS


@dataclass(frozen=True)
class Protocol:
    """The conventions of an evaluation.

    Args:
        num_trials_per_task: Rollouts per task; the first initial states, in order.
        num_steps_wait: Steps of the settle action before the first policy query.
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

GOVERNED = ("num_trials_per_task", "num_steps_wait", "env_img_res", "seed", "num_open_loop_steps")
"""The flags that a protocol gives."""
