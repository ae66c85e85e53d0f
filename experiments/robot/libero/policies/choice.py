"""Which agent the flags of an evaluation ask for: a checkpoint in this process, or somebody's server."""

from __future__ import annotations

import torch

from experiments.robot.libero.policies.checkpoint import load_policy, policies_of_suites
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.policies.fingerprint import checkpoint_fingerprint
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.settings.flags import EvaluationConfig
from prismatic.checkpoints.files import resolve


def weights_of(config: EvaluationConfig) -> str | None:
    """The fingerprint of the checkpoint that the flags name; None for a server, which does not tell.

    Raises:
        FileNotFoundError, ValueError: as `resolve` and `checkpoint_fingerprint`.
    """
    return None if config.policy_url is not None else checkpoint_fingerprint(resolve(config.pretrained_checkpoint))


def make_agent(config: EvaluationConfig, device: torch.device | str = "cpu", fingerprint: str | None = None) -> Agent:
    """Load the checkpoint onto a device, or connect to the server of `--policy_url`, and query it once.

    Args:
        config: the flags.
        device: of a checkpoint.
        fingerprint: from `weights_of`, for the policy's description.

    Raises:
        FileNotFoundError, ValueError: as `load_policy`; when more actions are to be executed than the server returns.
        ConnectionError: when there is no usable server (`PolicyServerError`).
    """
    if config.policy_url is None:
        policy = load_policy(config, device)
        agent = PolicyAgent(policy, policies_of_suites(policy, config), fingerprint)
        agent.warm_up()
        return agent
    # Needs packages of the extra `serve`, which checkpoints do without.
    from experiments.robot.libero.policies.server import RemoteAgent

    remote = RemoteAgent(config.policy_url, config.policy_convention, config.policy_timeout_s)
    steps = config.open_loop_steps(remote.robot)
    if steps > remote.robot.chunk_length:
        remote.close()
        raise ValueError(
            f"{steps} actions of each chunk are to be executed, but the server at {config.policy_url} returns "
            f"{remote.robot.chunk_length}; give --num_open_loop_steps {remote.robot.chunk_length} or fewer"
        )
    return remote
