"""A robot driven over a network that goes wrong; `tests/experiments/driving/` has the simulator as the robot."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from policy_server import serving
from scripted_world import ROBOT, Policy
from unreliable_network import UnreliableNetwork

from prismatic.serving.client import PolicyClient
from prismatic.serving.executed import Action, Hold
from prismatic.serving.runner import ChunkRunner, RunnerSettings

LIMIT_S, MAX_AGE_S, TICK_S = 0.4, 0.6, 0.02
METADATA = {"convention": "lightvla", "robot": ROBOT.to_json(), "echoes_id": True}


class Robot:
    """`scripted_world.World` in real time: it moves through the states that the policy was shown."""

    def __init__(self, client: PolicyClient) -> None:
        settings = RunnerSettings(hold_after_s=LIMIT_S, max_age_s=MAX_AGE_S)
        self.executed = 0
        self.runner = ChunkRunner(client, ROBOT, settings)
        self.runner.begin("count")

    def until(self, holds: Callable[[Action | Hold], bool], within_s: float = 30.0) -> Action | Hold:
        """Tick until a command is as wished."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            command = self.tick()
            if holds(command):
                return command
        pytest.fail("the robot did not come to that")

    def tick(self) -> Action | Hold:
        time.sleep(TICK_S)
        now = time.monotonic()
        command = self.runner.step({"state": np.array([self.executed, now])})
        if isinstance(command, Action):
            assert command.values[0] == self.executed, "an action of another control step was executed"
            assert now - command.values[1] <= MAX_AGE_S + 0.01, "a stale action was executed"
            self.executed += 1
        else:
            assert not command.values[:6].any()
        return command

    def acts(self, number: int) -> None:
        goal = self.executed + number
        self.until(lambda _: self.executed >= goal)

    def is_stopped(self) -> None:
        """Ticks until it holds for good, in the first control step after the limit."""
        command = self.until(lambda command: isinstance(command, Hold) and command.needs_rearm)
        last = max(record.time for record in self.runner.log if isinstance(record, Action))
        step_before = max(record.time for record in self.runner.log if record.step < command.step)
        assert step_before - last < LIMIT_S + 0.2 and command.time - last > LIMIT_S - 0.2


@pytest.fixture
def served() -> Iterator[tuple[Robot, UnreliableNetwork]]:
    policy = Policy()

    def infer(message: dict[str, Any]) -> dict[str, Any]:
        return {"actions": policy.act(message, message["prompt"]), "id": message["id"]}

    with ExitStack() as stack:
        url = stack.enter_context(serving(infer, METADATA))
        network = stack.enter_context(UnreliableNetwork(url))
        client = PolicyClient(network.url, timeout_s=1.0, robot=ROBOT)
        stack.callback(client.close)
        yield Robot(client), network


def goes_on_after_rearming(robot: Robot) -> None:
    stopped_at, before = time.monotonic(), robot.executed
    for _ in range(10):
        command = robot.tick()
        assert isinstance(command, Hold) and command.needs_rearm, "all is well again, but nobody has said so"
    robot.runner.rearm()
    robot.acts(20)
    actions = [record for record in robot.runner.log if isinstance(record, Action)][before:]
    assert all(source.observed_at > stopped_at for action in actions for source in action.sources)


def delay(network: UnreliableNetwork) -> None:
    network.delay_s = 2.0


def mix_up(network: UnreliableNetwork) -> None:
    network.is_mixed_up = True


def mend(network: UnreliableNetwork) -> None:
    network.delay_s, network.is_mixed_up = 0.0, False
    network.mend()


@pytest.mark.parametrize("trouble", [delay, mix_up, UnreliableNetwork.cut], ids=["delayed", "out of order", "cut"])
def test_the_robot_holds_while_the_network_fails_and_goes_on_when_armed(
    served: tuple[Robot, UnreliableNetwork], trouble: Callable[[UnreliableNetwork], None]
) -> None:
    robot, network = served
    robot.acts(20)
    trouble(network)
    robot.is_stopped()
    assert network.mixed_up > 0 or not network.is_mixed_up
    mend(network)
    goes_on_after_rearming(robot)


def test_connections_that_break_are_replaced_before_the_chunk_is_used_up(
    served: tuple[Robot, UnreliableNetwork], caplog: pytest.LogCaptureFixture
) -> None:
    robot, network = served
    robot.acts(20)
    for _ in range(3):
        network.reset()
        robot.acts(20)
    assert not robot.runner.watchdog.history
    assert "opening another connection" in caplog.text or "closed the connection" in caplog.text


def test_the_robot_holds_when_the_server_dies_and_goes_on_when_it_is_back() -> None:
    policy, port = Policy(), 0

    def infer(message: dict[str, Any]) -> dict[str, Any]:
        return {"actions": policy.act(message, message["prompt"]), "id": message["id"]}

    with serving(infer, METADATA) as url:
        port = int(url.rpartition(":")[2])
        client = PolicyClient(url, timeout_s=1.0, robot="libero")
        robot = Robot(client)
        robot.acts(20)
    robot.is_stopped()
    (trip,) = robot.runner.watchdog.history
    assert "no policy server" in trip.reason
    with serving(infer, METADATA, port):
        goes_on_after_rearming(robot)
        client.close()


def test_a_request_that_cannot_be_sent_ends_in_time() -> None:
    """More than the network's buffers hold: sending itself would wait for minutes."""
    with (
        serving(lambda message: {"actions": 1, "id": message["id"]}, METADATA) as url,
        UnreliableNetwork(url) as network,
    ):
        client = PolicyClient(network.url, timeout_s=0.5)
        network.cut()
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=r"has not answered within 0\.5 s"):
            client.infer({"picture": np.zeros(40_000_000, np.uint8)})
        assert time.monotonic() - began < 5
        client.close()
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
