"""`--save_rollout_video failures`: which rollouts keep a video, in the real simulator."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.rollouts.rollout import RolloutSettings
from experiments.robot.libero.rollouts.runner import EnvironmentSettings, EpisodeRunner, EpisodeSettings, VideoSettings
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task

TURN_ON_THE_STOVE = 7


class HoldsStill:
    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        return [ActionChunk(np.zeros((8, 7))) for _ in queries]


@pytest.mark.parametrize("only_failures", [True, False])
def test_a_video_is_kept_of_failures_alone(tmp_path: Path, only_failures: bool) -> None:
    """One rollout begins with the stove lit, which is the goal, and ends at once; the other one never gets there."""
    task = load_task("libero_goal", TURN_ON_THE_STOVE)
    assert task.goal == (("turnon", "flat_stove_1"),)
    lit = task.init_states[0].copy()
    with LiberoEnvironment(task, render=False) as environment:
        lit[1 + environment.model.jnt_qposadr[environment.model.joint("flat_stove_1_button").id]] = 1.0
    settings = EpisodeSettings(
        RolloutSettings(max_steps=4),
        EnvironmentSettings(64, True, 7, "fast", 2, False),
        tmp_path,
        VideoSettings(2, None, False, 20.0, only_failures),
    )
    runner = EpisodeRunner(settings, HoldsStill())
    try:
        solved, failed = (
            runner.run(Start(task=task, instruction="x", initial_state=0, trial=trial, seed=7, state=state))
            for trial, state in enumerate((lit, task.init_states[0]))
        )
    finally:
        runner.close()
    assert (solved.invalid, solved.success) == (None, True) and (failed.invalid, failed.success) == (None, False)
    assert failed.video is not None and (tmp_path / failed.video).is_file()
    assert (solved.video is None) == only_failures
    assert len(list(tmp_path.rglob("*.mp4"))) == (1 if only_failures else 2)


@pytest.mark.parametrize(("given", "meant"), [("True", True), ("false", False), ("failures", "failures"), (True, True)])
def test_the_flag_has_three_positions(given: str | bool, meant: str | bool) -> None:
    config = EvaluationConfig(pretrained_checkpoint="x", save_rollout_video=given)
    assert config.save_rollout_video == meant
    check_flags(config)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match="--save_rollout_video 'sometimes': expected True, False or failures"):
        check_flags(EvaluationConfig(pretrained_checkpoint="x", save_rollout_video="sometimes"))
