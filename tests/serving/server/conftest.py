"""A small policy, its observations, and what it answers in process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.policy import Policy

INSTRUCTION = "put the bowl on the plate"


@pytest.fixture(scope="session")
def policy(small_policy_directory: Path) -> Policy:
    """One for all tests here: whoever changes it changes it back."""
    return Policy.from_pretrained(small_policy_directory, dtype=torch.float32)


@pytest.fixture(scope="session")
def observe(policy: Policy) -> Callable[[int], dict[str, Any]]:
    """number -> an observation, another one for each number."""

    def make(number: int) -> dict[str, Any]:
        draw = np.random.default_rng(number)
        pictures = {camera: draw.integers(256, size=(64, 64, 3), dtype=np.uint8) for camera in policy.robot.cameras}
        return {**pictures, "state": draw.uniform(-0.5, 0.5, policy.robot.proprio_dim)}

    return make
