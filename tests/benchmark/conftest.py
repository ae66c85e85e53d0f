"""Policies with random weights at the smallest preset."""

import pytest
import torch

from prismatic.benchmark.random_policy import SIZES, policy_of, random_checkpoint
from prismatic.policy import Policy


@pytest.fixture(scope="session")
def tiny_policy() -> Policy:
    """512 visual tokens, two layers of 64, float32. Read only."""
    return policy_of(random_checkpoint(SIZES["tiny"], torch.device("cpu"), torch.float32))
