"""What a server would tell of a real small policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.policies.contract import PolicyQuery
from experiments.robot.libero.policies.local import PolicyAgent
from prismatic.policy import Policy
from prismatic.recordings.recording import Facts
from prismatic.serving.server.events import Answered

Asked = Callable[..., Answered]


@pytest.fixture(scope="session")
def recorded_policy(small_policy_directory: Path) -> Policy:
    return Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager")


@pytest.fixture
def facts(recorded_policy: Policy) -> Facts:
    return Facts(recorded_policy.robot, True, {"checkpoint": "runs/small", "pruner": "lightvla"}, {"lightvla": "1"})


@pytest.fixture
def asked(recorded_policy: Policy) -> Asked:
    """Asks the policy about a made-up observation, and says so as a server does; keywords change the event."""

    def ask(query: int, session: str = "arm", **more: Any) -> Answered:
        size = more.pop("size", 48)
        rng = np.random.default_rng([query, *session.encode()])
        observation = {
            **{c: rng.integers(0, 256, (size, size, 3), np.uint8) for c in recorded_policy.robot.cameras},
            "state": rng.normal(size=8),
        }
        request = PolicyQuery(observation, more.get("instruction", "lift it"))
        (chunk,) = PolicyAgent(recorded_policy).query([request])
        facts: dict[str, Any] = {
            "request_id": f"r{query}", "time": 1.8e9 + query, "connection": "socket-1", "session": session,
            "query": query, "observation": observation, "instruction": "lift it", "actions": chunk.actions,
            "kept": chunk.kept, "picks": chunk.picks, "scores": chunk.scores,
        }  # fmt: skip
        return Answered(**{**facts, **more})

    return ask
