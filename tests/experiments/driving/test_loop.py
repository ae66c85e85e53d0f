"""LIBERO's simulator as a robot that is driven over a network, by a policy in another process."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from served_policy import serving_process
from unreliable_network import UnreliableNetwork

from experiments.robot.libero.driving.loop import Sight, drive
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.rollouts.rollout import RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.policy import Policy
from prismatic.serving.asking import InSimulatedTime
from prismatic.serving.client import PolicyClient
from prismatic.serving.executed import Action, Hold
from prismatic.serving.runner import ChunkRunner, RunnerSettings
from prismatic.vla.robots import LIBERO

pytestmark = pytest.mark.slow

STOVE, STEPS = 1, 40
LIMIT_S, MAX_AGE_S = 1.8, 1.9  # for a busy machine; the answers that are delayed come after 2 s


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", STOVE), resolution=64, renderer="fast") as environment:
        yield environment


@pytest.fixture(scope="module")
def gentle(small_policy_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small policy, untrained as it is, with motions of a tenth: the arm stays away from its joints' ends."""
    folder = shutil.copytree(small_policy_directory, tmp_path_factory.mktemp("gentle") / "policy")
    file = folder / "dataset_statistics.json"
    statistics = json.loads(file.read_text())
    for scaled in (dataset["action"] for dataset in statistics.values()):
        for name in ("min", "max", "q01", "q99"):
            scaled[name][:6] = [0.1 * value for value in scaled[name][:6]]
    file.write_text(json.dumps(statistics))
    return folder


def test_the_simulator_itself_cuts_deltas_where_the_robot_s_limits_do(environment: LiberoEnvironment) -> None:
    assert LIBERO.control is not None and LIBERO.control.bounds == (*((-1.0, 1.0),) * 6, None)
    ends = []
    for excess in (0.0, 0.7):
        environment.reset(30, seed=7)
        for sign in (1, 1, -1):
            environment.step_policy(np.array([sign * (1 + excess)] * 6 + [1.0]))
        ends.append(environment.state())
    assert np.array_equal(*ends)


def test_without_latency_it_is_a_rollout(environment: LiberoEnvironment, gentle: Path) -> None:
    """Action for action what an evaluation executes, synchronously and asynchronously, with limits in force."""
    policy = Policy.from_pretrained(gentle, device="cpu", dtype=torch.float32)

    class Agent:
        def query(self, queries: list[PolicyQuery]) -> list[ActionChunk]:
            (query,) = queries
            return [ActionChunk(policy.act(query.observation, query.instruction))]

    task = environment.task
    record = run_episode(environment, Agent(), Start(task, task.language, 30, 0, 7), RolloutSettings(STEPS))
    for asynchronous in (False, True):
        taken = [0]
        environment.reset(30, seed=7)
        asker = InSimulatedTime(policy, 0.0, lambda taken=taken: taken[0] / 20)
        runner = ChunkRunner(asker, LIBERO, RunnerSettings(asynchronous=asynchronous), clock=asker._clock)
        runner.begin(task.language)

        def count(step: int, _: object, taken: list[int] = taken) -> None:
            taken[0] = step + 1

        driven = drive(environment, runner, STEPS, on_step=count)
        assert (driven.steps, driven.actions, driven.success) == (STEPS, STEPS, record.success)
        digest = hashlib.sha256(b"".join(a.values.tobytes() for a in runner.log if isinstance(a, Action))).hexdigest()
        assert driven.actions_sha256 == digest == record.actions_sha256


class SimulatedRobot:
    """Driven in real time at 20 Hz, or as fast as this machine can."""

    def __init__(self, environment: LiberoEnvironment, client: PolicyClient) -> None:
        self.environment = environment
        environment.reset(30, seed=7)
        settings = RunnerSettings(hold_after_s=LIMIT_S, max_age_s=MAX_AGE_S)
        self.runner = ChunkRunner(client, LIBERO, settings)
        self.runner.begin(environment.task.language)

    def tick(self) -> Action | Hold:
        began = time.monotonic()
        command = self.runner.step(Sight(self.environment))
        self.environment.step_policy(command.values)
        time.sleep(max(0.0, began + 0.05 - time.monotonic()))
        return command

    def until(self, holds: Callable[[Action | Hold], bool], within_s: float = 60.0) -> Action | Hold:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if holds(command := self.tick()):
                return command
        pytest.fail("the robot did not come to that")

    def acts(self, number: int) -> None:
        """The machine may be busy: a robot that was held for that is armed again."""
        goal = len(self.actions()) + number

        def enough(command: Action | Hold) -> bool:
            if isinstance(command, Hold) and command.needs_rearm:
                self.runner.rearm()
            return len(self.actions()) >= goal

        self.until(enough, within_s=180.0)

    def actions(self) -> list[Action]:
        return [record for record in self.runner.log if isinstance(record, Action)]

    def is_held(self) -> None:
        """It holds for good within the limit, keeps its place and its gripper, and nothing changes that by itself."""
        command = self.until(lambda command: isinstance(command, Hold) and command.needs_rearm)
        last = self.actions()[-1]
        step_before = max(record.time for record in self.runner.log if record.step < command.step)
        assert step_before - last.time < LIMIT_S + 0.5, "in the first control step after the limit"
        assert not command.values[:6].any() and command.values[6] == last.values[6]
        for _ in range(10):  # until the arm's own motion has ended
            self.tick()
        where = self.environment.position()
        for _ in range(20):
            assert isinstance(self.tick(), Hold)
        assert np.linalg.norm(self.environment.position() - where) < 0.005

    def goes_on(self) -> None:
        armed_at, before = time.monotonic(), len(self.actions())
        for _ in range(5):
            assert isinstance(self.tick(), Hold), "all is well again, but nobody has said so"
        self.runner.rearm()
        self.acts(20)
        sources = [source for action in self.actions()[before:] for source in action.sources]
        assert len(self.actions()) == before + 20 and min(source.observed_at for source in sources) > armed_at


def test_whatever_fails_the_robot_holds_and_executes_nothing_stale(
    environment: LiberoEnvironment, gentle: Path
) -> None:
    run_chaos(environment, gentle)


def run_chaos(environment: LiberoEnvironment, checkpoint: Path) -> SimulatedRobot:
    with serving_process(checkpoint) as (process, url), UnreliableNetwork(url) as network:
        client = PolicyClient(network.url, timeout_s=5.0, wait_s=60.0, robot="libero")
        robot = SimulatedRobot(environment, client)
        robot.acts(20)
        network.delay_s = 2.0
        robot.is_held()
        time.sleep(2.0)  # what was asked is answered by now, and nobody takes it
        network.delay_s = 0.0
        robot.goes_on()
        network.is_mixed_up = True
        robot.is_held()
        assert network.mixed_up
        network.is_mixed_up = False
        robot.goes_on()
        network.cut()
        robot.is_held()
        network.mend()
        robot.goes_on()
        process.send_signal(signal.SIGKILL)
        robot.is_held()
        assert "the policy failed" in robot.runner.watchdog.history[-1].reason
        with serving_process(checkpoint, "--port", url.rpartition(":")[2]) as (_, again):
            assert again == url
            robot.goes_on()
            client.close()
    asked = sorted(robot.actions(), key=lambda action: action.step)
    assert all(action.age_s <= MAX_AGE_S for action in asked), "a stale action was executed"
    for one, other in zip(asked, asked[1:], strict=False):
        follows = other.sources[0].index - one.sources[0].index
        assert other.sources[0].chunk > one.sources[0].chunk or follows == 1, "an action was executed out of its turn"
    trips = robot.runner.watchdog.history
    assert len(trips) >= 4
    return robot


def test_sight_draws_what_is_looked_at(environment: LiberoEnvironment) -> None:
    environment.reset(30, seed=7)
    sight = Sight(environment, ("wrist_image",))
    assert list(sight) == ["wrist_image", "state"] and len(sight) == 2
    assert np.array_equal(sight["wrist_image"], environment.frame("wrist_image"))
    with pytest.raises(KeyError):
        sight["full_image"]
