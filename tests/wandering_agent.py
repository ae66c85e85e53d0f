"""An agent for evaluations in the real simulator, and what tests of them share.

It moves the arm by what it is asked for, in a way that depends on the picture, the state, and the seed of the policy
query: whatever goes astray on the way changes the actions, and with them the hashes.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.evaluation.plan import Plan, make_plan
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.results.journal import Journal
from experiments.robot.libero.results.results import FILE_NAME, Results
from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.vla.robots import LIBERO

STEPS = 16


class Wanders:
    """Small motions, a pure function of what is asked."""

    robot = LIBERO
    cameras = ("full_image", "wrist_image")
    center_crop = False

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def description(self) -> dict[str, Any]:
        own = "libero_spatial_no_noops"
        return {"checkpoint": "wanders", "assumptions": [], "device_name": "cpu", "unnorm_key": own}

    def close(self) -> None:
        pass

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.sizes.append(len(queries))
        return [self._chunk(query) for query in queries]

    def _chunk(self, query: PolicyQuery) -> ActionChunk:
        picture = query.observation["full_image"].astype(np.int64).sum()
        rng = np.random.default_rng([query.seed, int(picture)])
        actions = rng.uniform(-0.5, 0.5, (8, 7)) + 0.1 * np.asarray(query.observation["state"])[:7]
        return ActionChunk(actions, rng.random(98) < 0.2, np.ones(98, np.float32), {"total": 1.0})


class Kills(Wanders):
    """Kills a simulator process at the n-th queries, or stops it so that it says nothing any more."""

    def __init__(self, at: set[int], how: signal.Signals) -> None:
        super().__init__()
        self.at, self.how, self.queries = at, how, 0
        self.struck: list[int] = []

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.queries += 1
        if self.queries in self.at:
            victim = next(pid for pid in children() if pid not in self.struck)
            self.struck.append(victim)
            os.kill(victim, self.how)
        return super().query(queries)


def children() -> list[int]:
    """This process's simulator processes."""
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [pid for pid in map(int, task) if b"rollouts.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def plan_into(folder: Path, **flags: Any) -> Plan:
    given = {"task_suite_name": "libero_goal", "task_ids": "1,8", "initial_states": "30-31", "wide_starts_m": 0.06}
    given |= {"renderer": "fast", "env_img_res": 64, "num_steps_wait": 2, "pretrained_checkpoint": "x"}
    config = EvaluationConfig(**{**given, "output_dir": str(folder), "num_envs": 1, **flags})  # type: ignore[arg-type]
    return replace(make_plan(config), max_steps=STEPS)


def already_done(folder: Path, results: Results, count: int) -> None:
    """Leave the first rollouts as an evaluation leaves them that was stopped before it wrote its results again."""
    with Journal(folder) as journal:
        for record in results.episodes[:count]:
            journal.append(record)
    replace(results, run={**results.run, "complete": False}, episodes=[]).save(folder / FILE_NAME)
