"""Every pruner in a rollout, and the memory that an agent keeps of each episode for those that have one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.robot.libero.policies.contract import PolicyQuery
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.rollouts.rollout import RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.policy import Policy

PRUNERS = (
    "grid:tokens=16", "text_similarity:tokens=16", "divprune:tokens=16", "fastv:layer=1,tokens=16",
    "static_reuse:tokens=16,similarity=0.9", "grids:tokens=16", "random:seed=3",
    "random:tokens=16,seed=3",
)  # fmt: skip


def query(episode: int, number: int) -> PolicyQuery:
    rng = np.random.default_rng([episode, number])
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("full_image", "wrist_image")}
    return PolicyQuery({**images, "state": np.zeros(8)}, "turn on the stove", 0, "", f"robot {episode}", number)


def test_an_agent_keeps_one_memory_per_episode(untrained_checkpoint: Path) -> None:
    policy = Policy.from_pretrained(
        untrained_checkpoint, dtype="float32", pruner="static_reuse:tokens=4,similarity=0.5"
    )
    alone = []
    for episode in range(2):
        agent = PolicyAgent(policy)
        alone.append([agent.query([query(episode, number)])[0] for number in range(3)])
    agent = PolicyAgent(policy)
    for number in range(3):
        for episode, chunk in enumerate(agent.query([query(0, number), query(1, number)])):
            expected = alone[episode][number]
            np.testing.assert_allclose(chunk.actions, expected.actions, atol=1e-5)
            assert chunk.kept is not None and np.array_equal(chunk.kept, expected.kept)
            assert chunk.kept.all() == (number == 0), "later queries reuse something"
    (anew,) = agent.query([query(0, 0)])
    assert anew.kept is not None and anew.kept.all(), "the same process has begun another episode"


@pytest.mark.slow
@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruner_drives_six_rollouts(untrained_checkpoint: Path, pruner: str) -> None:
    options = LoadOptions(dtype=torch.float32, pruner=PrunerSpec.parse(pruner), new_pruner=True)
    checkpoint, key = load_checkpoint(untrained_checkpoint, options), "libero_goal_no_noops"
    agent = PolicyAgent(Policy(checkpoint, checkpoint.transform(key, True), key))
    task = load_task("libero_goal", 1)
    with LiberoEnvironment(task, resolution=64, renderer="fast", settle_steps=2) as environment:
        for trial in range(6):
            start = Start(task=task, instruction=task.language, initial_state=trial, trial=trial, seed=7)
            record = run_episode(environment, agent, start, RolloutSettings(max_steps=16, open_loop_steps=4))
            assert record.invalid is None and record.steps == 16 and len(record.tokens_kept) == 4
            if pruner.startswith("static_reuse"):
                assert record.tokens_kept[0] == record.num_visual_tokens > min(record.tokens_kept)
            elif "tokens" in pruner:
                assert max(record.tokens_kept) <= 16
