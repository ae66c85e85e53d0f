"""The flags of `lightvla looks`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from experiments.robot.libero.settings.flags import EvaluationConfig

UNBLANKED = "unblanked"
BLANKED = ("target", "goal", "background", "random", "all", "hidden")
"""What kept tokens lose their content on: a class of pixels, as many others as lie on the target, or all of them.
`hidden` blanks nothing: the target is left out of the policy's pictures, so that no token has seen it."""
_ASKED = ("target", "goal", "background", "random", "hidden")
NOTHING = "none"


@dataclass
class LooksConfig:
    """Say what a policy's kept tokens lie on, phase by phase, and whether it needs them there.

    Rollouts are those of `lightvla eval` with the same flags. Stopped, the same command goes on.
    """

    # Policy
    pretrained_checkpoint: str  # checkpoint folder or hub id
    pruner: str | None = None  # overrides the checkpoint's; None: as trained
    unnorm_key: str | None = None  # dataset whose statistics apply; None: the suite's
    num_open_loop_steps: int | None = None  # actions executed of each chunk, the first ones; None: the robot's
    device: str = "auto"  # auto, cpu or cuda
    dtype: str | None = None  # bfloat16, float16, float32; None: bfloat16 on GPUs and CPUs that are faster in it
    engine: str = "auto"  # eager, compiled, or auto, as of lightvla eval

    # Rollouts
    task_suite_name: str = "libero_spatial"  # suites, with commas
    task_ids: str | None = None  # `1,4,8` or `0-4`; None: all of the suite
    initial_states: str | None = None  # `30-33`; None: the first ones
    num_trials_per_task: int | None = None  # rollouts of each task; None: each of the initial states once, else 50
    wide_starts_m: float = 0.0  # objects of the goal moved anywhere free within so many metres; 0: standard starts
    env_img_res: int = 256  # side of the rendered pictures in pixels, as the policy's data had
    renderer: str = "robosuite"  # robosuite or fast, as the policy's data was drawn
    seed: int = 7  # of resets and random choices
    num_envs: int | None = None  # simulator processes; None: as many as cores and memory allow

    # Questions
    blank: str = ",".join(_ASKED)  # rolled out again without these, each by itself; all: every token; none: only look

    # Output
    output_dir: Path = Path("looks")  # looks.json, looks.md, looks.html, pictures; rollouts/ below it
    force: bool = False  # go on although policy, flags or simulator were others; the results say it

    def rollouts(self, condition: str) -> Path:
        """The folder of a condition."""
        return self.output_dir / "rollouts" / condition

    def evaluation(self, condition: str) -> EvaluationConfig:
        """The evaluation that a condition is: its rollouts go below `output_dir`, and are gone on with."""
        known = {field.name for field in fields(EvaluationConfig)}
        given = {name: value for name, value in vars(self).items() if name in known and value is not None}
        return EvaluationConfig(
            **{**given, "output_dir": str(self.rollouts(condition)), "resume": True, "report": False}
        )

    def conditions(self) -> list[str]:
        """What is rolled out, unblanked first. Raises ValueError for an unknown word in `blank`."""
        words = [word.strip() for word in self.blank.split(",")]
        if words == [NOTHING]:
            return [UNBLANKED]
        if (unknown := [word for word in words if word not in BLANKED]) or len(set(words)) < len(words):
            what = f"has {unknown[0]!r}" if unknown else "names one twice"
            raise ValueError(f"--blank {self.blank!r} {what}; expected some of {', '.join(BLANKED)}, or {NOTHING}")
        return [UNBLANKED, *(word for word in BLANKED if word in words)]
