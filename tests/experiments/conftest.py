"""A complete but untrained small checkpoint, for what has to run through the real policy and simulator."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightvla.demo.small_model import SmallModelConfig, build
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.vla.normalization import fit_statistics


@pytest.fixture(scope="session")
def untrained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    sizes = SmallModelConfig(root / "base", vision_dim=64, vision_depth=2, llm_dim=64, llm_layers=2, llm_mlp=128)
    checkpoint = load_checkpoint(build(sizes))
    torch.manual_seed(0)
    robot = checkpoint.model.robot
    checkpoint.action_head = L1RegressionActionHead(sizes.llm_dim, robot.action_dim, robot.chunk_length)
    checkpoint.proprio_projector = ProprioProjector(sizes.llm_dim, robot.proprio_dim)
    rng = np.random.default_rng(0)
    statistics = fit_statistics(
        rng.uniform(-1, 1, (64, robot.action_dim)), rng.normal(size=(64, robot.proprio_dim)), robot.action_mask, 2
    )
    checkpoint.dataset_statistics = {"libero_goal_no_noops": statistics}
    return save_checkpoint(root / "untrained", checkpoint, step=0)
