"""What a record says the policy took, against what the policy itself measured."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.evaluation.evaluate import evaluate
from experiments.robot.libero.evaluation.plan import make_plan
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.vla.robots import LIBERO


class TakesItsTime:
    """Holds still, takes a twentieth of a second per call, and notes how long and for how many queries."""

    robot = LIBERO
    cameras = ("full_image", "wrist_image")
    center_crop = False

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def description(self) -> dict[str, Any]:
        return {"checkpoint": "slow", "assumptions": [], "device_name": "cpu", "unnorm_key": "libero_goal_no_noops"}

    def close(self) -> None:
        pass

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        began = time.perf_counter()
        time.sleep(0.05)
        self.calls.append((1000 * (time.perf_counter() - began), len(queries)))
        return [ActionChunk(np.zeros((8, 7))) for _ in queries]


@pytest.mark.parametrize(("num_envs", "batch_size"), [(1, None), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_the_policy_s_own_time_is_told_from_waiting(tmp_path: Path, num_envs: int, batch_size: int | None) -> None:
    agent = TakesItsTime()
    config = EvaluationConfig(
        pretrained_checkpoint="x", task_suite_name="libero_goal", task_ids="1,8", initial_states="30", renderer="fast",
        env_img_res=64, num_steps_wait=2, output_dir=str(tmp_path), num_envs=num_envs, batch_size=batch_size,
    )  # fmt: skip
    episodes = evaluate(replace(make_plan(config), max_steps=16), agent, ["eval"]).episodes
    own = sorted(ms for episode in episodes for ms in episode.policy_ms)
    assert all(episode.is_timed for episode in episodes)
    assert own == pytest.approx(sorted(ms for ms, size in agent.calls for _ in range(size)), abs=5)
    sizes = sorted(size for episode in episodes for size in episode.call_queries)
    assert sizes == sorted(size for _, size in agent.calls for _ in range(size))
    waited = [ms for episode in episodes for ms in episode.waiting_ms]
    assert len(waited) == len(own) == 4 and min(waited) >= 0
    if num_envs == 1:
        assert max(waited) < 5
