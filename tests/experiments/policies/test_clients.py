"""An episode of the real simulator by whoever may ask our server: the actions are those of the policy in process.

The server is the command, in a process of its own; the clients are openpi-client 0.1.2 itself, `requests` with
OpenVLA-OFT's payload, and the agent of `lightvla eval --policy_url`.
"""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from openpi_environment import PEER, openpi_interpreter, own_environment
from served_policy import serving_process

from experiments.robot.libero.policies.choice import make_agent
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery, Queryable
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.policies.server import CONVENTIONS, resize_with_padding
from experiments.robot.libero.rollouts.rollout import RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.policy import Policy
from prismatic.serving.wire import unpack

pytestmark = pytest.mark.slow

SETTINGS = RolloutSettings(max_steps=24, open_loop_steps=4)
# The default engine measures which kernels are faster, in each process anew, and they differ in their last digits.
AS_HERE = {"engine": "eager", "dtype": "float32"}
FLAGS = [word for name, value in AS_HERE.items() for word in (f"--{name}", value)]

Episode = tuple[str | None, bool | None, int, bytes]
"""The actions' hash, the outcome, the steps, and all joints at the end."""
Play = Callable[[Queryable], Episode]


class AskedByOpenpi:
    """A policy of this process as a client of openpi's convention has it: its pictures, the simulator's gripper."""

    def __init__(self, policy: Policy) -> None:
        self._agent = PolicyAgent(policy)

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        chunks = self._agent.query([self._enlarged(query) for query in queries])
        return [replace(chunk, actions=self._by_sign(chunk.actions)) for chunk in chunks]

    def _enlarged(self, query: PolicyQuery) -> PolicyQuery:
        pictures = {camera: resize_with_padding(query.observation[camera], 224) for camera in self._agent.cameras}
        return replace(query, observation={**query.observation, **pictures})

    @staticmethod
    def _by_sign(actions: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The gripper as the simulator moves it, which is by the sign alone: 1 opens, 0 closes."""
        return np.concatenate([actions[:, :6], np.heaviside(2.0 * actions[:, 6:] - 1.0, 0.5)], axis=1)


class OpenpiClient:
    """openpi's `WebsocketClientPolicy` in its own process, asked line by line."""

    def __init__(self, process: subprocess.Popen[str], convention: str, request: Path) -> None:
        self._process, self._convention, self._request = process, CONVENTIONS[convention], request

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        assert self._process.stdin is not None and self._process.stdout is not None
        chunks = []
        for query in queries:
            np.savez(self._request, **self._convention.encode(query))
            print(self._request, file=self._process.stdin, flush=True)
            reply = unpack(bytes.fromhex(self._process.stdout.readline()))
            chunks.append(ActionChunk(self._convention.decode(reply["actions"])))
        return chunks


class OftClient:
    """POST /act, as OpenVLA-OFT's clients ask."""

    def __init__(self, url: str) -> None:
        self._url = f"{url.replace('ws://', 'http://')}/act"

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        return [ActionChunk(np.stack(self._ask({**q.observation, "instruction": q.instruction}))) for q in queries]

    def _ask(self, request: dict[str, object]) -> list[np.ndarray]:
        answer = requests.post(self._url, data=json_numpy.dumps(request), timeout=60)
        answer.raise_for_status()
        actions: list[np.ndarray] = json_numpy.loads(answer.text)
        return actions


@contextmanager
def openpi_client(python: Path, url: str, convention: str, folder: Path) -> Iterator[OpenpiClient]:
    command = [str(python), str(PEER), "relay", url]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own_environment()
    ) as process:
        assert process.stdin is not None
        try:
            yield OpenpiClient(process, convention, folder / "request.npz")
        finally:
            process.stdin.close()
            process.wait(20)


def by_policy_url(url: str) -> AbstractContextManager[Queryable]:
    return closing(make_agent(EvaluationConfig(policy_url=url, task_suite_name="libero_goal", num_open_loop_steps=4)))


@pytest.fixture(scope="module")
def play() -> Iterator[Play]:
    task = load_task("libero_goal", 1)
    start = Start(task=task, instruction=task.language, initial_state=3, trial=0, seed=7)
    with LiberoEnvironment(task, resolution=64, renderer="fast", settle_steps=2) as environment:

        def run(agent: Queryable) -> Episode:
            record = run_episode(environment, agent, start, SETTINGS)
            assert record.invalid is None, record.invalid
            return record.actions_sha256, record.success, record.steps, environment.data.qpos.tobytes()

        yield run


def test_an_episode_by_other_people_s_clients_is_the_one_in_process(
    play: Play, untrained_checkpoint: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    python = openpi_interpreter(request.config)
    policy = Policy.from_pretrained(untrained_checkpoint, **AS_HERE)
    own, openpi_s = play(PolicyAgent(policy)), play(AskedByOpenpi(policy))
    assert own[2] == openpi_s[2] == SETTINGS.max_steps
    assert own[0] != openpi_s[0] and own[3] != openpi_s[3]  # the pictures count, and so do small differences of them
    with serving_process(untrained_checkpoint, *FLAGS) as (_, url):
        with openpi_client(python, url, "lightvla", tmp_path) as client:
            assert play(client) == own
        assert play(OftClient(url)) == own
        with by_policy_url(url) as agent:
            assert play(agent) == own
    with serving_process(untrained_checkpoint, *FLAGS, "--convention", "openpi") as (_, url):
        with openpi_client(python, url, "openpi", tmp_path) as client:
            assert play(client) == openpi_s
        with by_policy_url(url) as agent:
            assert play(agent) == openpi_s
        assert play(OftClient(url)) == own
