"""Which agent the flags of an evaluation ask for: a checkpoint in this process, or somebody's server."""

from __future__ import annotations

import torch

from experiments.robot.libero.policies.checkpoint import load_policy
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.settings.flags import EvaluationConfig


def make_agent(config: EvaluationConfig, device: torch.device | str = "cpu") -> Agent:
    """Load the checkpoint onto a device, or connect to the server of `--policy_url`, and query it once.

    Raises:
        FileNotFoundError, ValueError: as `load_policy`; when more actions are to be executed than the server returns.
        ConnectionError: when there is no usable server (`PolicyServerError`).
    """
    if config.policy_url is None:
        policy = PolicyAgent(load_policy(config, device))
        policy.warm_up()
        return policy
    # Needs packages of the extra `serve`, which checkpoints do without.
    from experiments.robot.libero.policies.server import RemoteAgent

    agent = RemoteAgent(config.policy_url, config.policy_convention, config.policy_timeout_s)
    steps = config.num_open_loop_steps or agent.robot.open_loop_steps
    if steps > agent.robot.chunk_length:
        agent.close()
        raise ValueError(
            f"{steps} actions of each chunk are to be executed, but the server at {config.policy_url} returns "
            f"{agent.robot.chunk_length}; give --num_open_loop_steps {agent.robot.chunk_length} or fewer"
        )
    return agent
