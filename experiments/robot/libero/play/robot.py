"""The simulator as a robot, in a process of its own: asks a policy server, acts in simulated real time.

Started by `desk.py`, which holds the other end of the pipe and sends `Begin` and `Run`; `Status` goes back. The process
ends when the other end closes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.driving.loop import Sight
from experiments.robot.libero.play.messages import Begin, PlaySettings, Run, SceneTask, Status
from experiments.robot.libero.play.moves import Moves, movable_objects
from experiments.robot.libero.simulator.backend import choose_backend, simulator
from experiments.robot.libero.simulator.environment import LiberoEnvironment, SimulationUnstable
from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import LiberoTask, get_suite, load_task
from prismatic.serving.client import PolicyClient, PolicyServerError
from prismatic.serving.executed import Hold
from prismatic.serving.runner import ChunkRunner, RunnerSettings
from prismatic.vla.robots import RobotSpec

_STATUS_S = 0.1
_GOALS_EVERY = 4
_RECENT_STEPS = 40
_ANSWER_S, _SERVER_S = 20.0, 60.0
"""How long an answer may take, and the server to listen."""


def tasks_of_scene(task: LiberoTask) -> list[LiberoTask]:
    """The suite's tasks in the same scene: the same objects and fixtures; the task itself is among them."""
    own = _things(task)
    others = [load_task(task.suite, index) for index in range(get_suite(task.suite).get_num_tasks())]
    return [other for other in others if _things(other) == own]


def _things(task: LiberoTask) -> tuple[object, object]:
    problem = simulator().parse_problem(str(task.bddl_file))
    return problem["objects"], problem["fixtures"]


class Asked:
    """The policy server, as a runner asks it. After an error another connection is opened with the next request.

    A server whose pruner was switched greets with other metadata than before, which one `PolicyClient` does not take.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url, self._api_key = url, api_key
        self._client: PolicyClient | None = None

    def act(self, observation: Mapping[str, Any], instruction: str) -> NDArray[np.float64]:
        """One observation -> (chunk, action_dim) actions. Raises PolicyServerError."""
        client = self._connected()
        try:
            return client.act(observation, instruction)
        except PolicyServerError:
            client.close()
            self._client = None
            raise

    @property
    def robot(self) -> RobotSpec:
        """Whose actions the server gives. Raises PolicyServerError."""
        return self._connected().robot

    def begin_episode(self) -> None:
        """A policy with a memory begins it anew."""
        if self._client is not None:
            self._client.begin_episode()

    def _connected(self) -> PolicyClient:
        if self._client is None:
            self._client = PolicyClient(self._url, _ANSWER_S, wait_s=_SERVER_S, api_key=self._api_key)
        return self._client


class Robot:
    """One scene and what happens in it."""

    def __init__(self, settings: PlaySettings) -> None:
        self.settings = settings
        task = load_task(settings.suite, settings.task_index)
        self._tasks = tasks_of_scene(task)
        self._environment = LiberoEnvironment(
            task,
            settings.resolution,
            seed=settings.seed,
            renderer=settings.renderer,
            settle_steps=settings.settle_steps,
            canonical_quaternion=settings.canonical_quaternion,
        )
        self._scene = Scene(self._environment.inner)
        self._policy = Asked(settings.url, settings.api_key)
        # Synchronously, and by the simulation's clock: its time stands still while an answer is under way.
        asking = RunnerSettings(asynchronous=False, open_loop_steps=settings.open_loop_steps)
        self._taken = 0
        self._runner = ChunkRunner(self._policy, self._policy.robot, asking, clock=lambda: self._taken * self.period_s)
        self._stepped: deque[float] = deque(maxlen=_RECENT_STEPS)
        known = tuple(SceneTask(other.index, other.language, other.index in settings.trained) for other in self._tasks)
        self.status = Status(
            tasks=known, num_initial_states=len(task.init_states), max_steps=settings.max_steps, phase="ready", said=""
        )

    @property
    def instruction(self) -> str:
        """Of the task whose scene it is."""
        return self._environment.task.language

    @property
    def runs(self) -> bool:
        return self.status.phase == "running"

    def obey(self, command: Begin | Run) -> None:
        """Do what a person asked; what cannot be done becomes the status."""
        if isinstance(command, Run):
            self._run(command.runs)
            return
        begun = replace(
            self.status, instruction=command.instruction, initial_state=command.initial_state,
            offsets=dict(command.offsets), steps=0, success=None, goals=(), said="",
        )  # fmt: skip
        self._stepped.clear()
        try:
            self._environment.reset(command.initial_state, self.settings.seed, Moves(command.offsets))
            self.status = replace(begun, phase="running" if command.runs else "paused")
            self._look()
            self.status = replace(self.status, starts=self.status.places)
            if not command.runs:  # the page shows what was asked about
                self._policy.begin_episode()
                self._policy.act(self._environment.observe(), command.instruction)
        except (ValueError, SimulationUnstable, PolicyServerError) as error:
            self.status = replace(begun, phase="failed", said=str(error))
        self._runner.begin(command.instruction)
        self._runner.rearm()

    def _run(self, runs: bool) -> None:
        if self.status.phase in ("running", "paused", "held"):
            self._stepped.clear()
            self._runner.rearm()
            self.status = replace(self.status, phase="running" if runs else "paused", said="", speed=None)

    def step(self) -> None:
        """One control step."""
        command = self._runner.step(Sight(self._environment), wait_s=_ANSWER_S)
        if isinstance(command, Hold) and command.needs_rearm:
            self.status = replace(self.status, phase="held", said=f"The robot holds: {command.reason}")
            return
        try:
            self._environment.step_policy(command.values)
        except SimulationUnstable as error:
            self.status = replace(self.status, phase="failed", said=str(error))
            return
        self._taken += 1
        self._stepped.append(time.monotonic())
        self.status = replace(self.status, steps=self.status.steps + 1)
        if self.status.steps % _GOALS_EVERY == 0 or self.status.steps >= self.settings.max_steps:
            self._look()

    def _look(self) -> None:
        """Take note of where things are and which goals hold, and end the episode where it has ended."""
        status, scene = self.status, self._scene
        holding = {task.language: self._environment.succeeded(task.goal) for task in self._tasks}
        own = holding.get(status.instruction)
        movable = movable_objects(scene)
        places = {name: _flat(scene.position(name)) for name in scene.names}
        status = replace(
            status,
            success=own,
            goals=tuple(sentence for sentence, holds in holding.items() if holds),
            places={name: place for name, place in places.items() if name in movable},
            fixtures={name: place for name, place in places.items() if name not in movable},
            hand=_flat(self._environment.position()),
            speed=self._speed(),
        )
        if own:
            status = replace(status, phase="ended", said=f"success after {status.steps} steps")
        elif status.steps >= self.settings.max_steps:
            outcome = "no goal of this scene says when it is done" if own is None else "not solved"
            status = replace(status, phase="ended", said=f"{outcome}: {status.steps} steps are used up")
        self.status = status

    def _speed(self) -> float | None:
        if len(self._stepped) < 2:
            return None
        simulated = (len(self._stepped) - 1) / self._environment.control_rate_hz
        return round(simulated / (self._stepped[-1] - self._stepped[0]), 2)

    @property
    def period_s(self) -> float:
        """Between two control steps."""
        return 1.0 / self._environment.control_rate_hz

    def close(self) -> None:
        self._environment.close()


def _flat(position: NDArray[np.float64]) -> tuple[float, float]:
    return round(float(position[0]), 4), round(float(position[1]), 4)


def serve(connection: Connection) -> None:
    """Obey until the connection closes."""
    settings: PlaySettings = connection.recv()
    choose_backend()
    robot = Robot(settings)
    robot.obey(Begin(robot.instruction, settings.initial_state, runs=False))
    said_at, due = 0.0, time.monotonic()
    try:
        connection.send(robot.status)
        while True:
            before = robot.status.phase
            if connection.poll(0.0 if robot.runs else None):
                robot.obey(connection.recv())
                due = time.monotonic()
            if robot.runs:
                robot.step()
                due = max(due + robot.period_s, time.monotonic() - robot.period_s)  # no haste after a slow step
                time.sleep(max(0.0, due - time.monotonic()))
            if robot.status.phase != before or not robot.runs or time.monotonic() - said_at > _STATUS_S:
                said_at = time.monotonic()
                connection.send(robot.status)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    finally:
        robot.close()


def main(descriptor: int) -> None:
    """Serve at one end of a socket pair, which this process has inherited."""
    with Connection(descriptor) as connection:
        serve(connection)
