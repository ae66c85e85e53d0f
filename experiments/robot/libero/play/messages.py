"""What goes through the pipe between the server's process and the simulator's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PlaySettings:
    """How the simulator is made.

    Attributes:
        url: of the policy server, ws://host:port; api_key: what it wants to be shown, if anything.
        suite, task_index: the scene, and whose initial states are used.
        trained: tasks that the policy was trained on.
        initial_state: the one to begin with.
        resolution: side of the rendered pictures in pixels.
        seed: of the fixtures' poses and the policy's random numbers.
        settle_steps: control steps in which objects come to rest.
    """

    url: str
    api_key: str | None = field(repr=False)
    suite: str
    task_index: int
    trained: tuple[int, ...]
    initial_state: int
    resolution: int
    renderer: str
    seed: int
    canonical_quaternion: bool
    open_loop_steps: int
    max_steps: int
    settle_steps: int = 10


@dataclass(frozen=True)
class Begin:
    """Put the scene into an initial state, with objects moved, and stand still there.

    Attributes:
        offsets: object -> metres along x and y.
        runs: whether to act at once.
    """

    instruction: str
    initial_state: int
    offsets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    runs: bool = True


@dataclass(frozen=True)
class Run:
    """Act, or pause."""

    runs: bool


@dataclass(frozen=True)
class SceneTask:
    """A task of the scene: its number in the suite, its instruction, whether the policy was trained on it."""

    index: int
    instruction: str
    is_trained: bool


@dataclass(frozen=True)
class Status:
    """How the robot stands.

    Attributes:
        phase: `starting`, `ready`, `running`, `paused`, `held` (the runner waits to be armed again), `ended`, `failed`.
        said: a sentence on what happened.
        steps: control steps of the episode so far.
        success: whether the instruction's goal holds; None where the instruction is none of the scene's.
        goals: instructions of the scene whose goals hold.
        tasks: what can be asked for in this scene.
        num_initial_states: how many the task has.
        starts: movable object -> x, y in metres as the episode began.
        places: the same now; fixtures: of what cannot be moved; hand: of the gripper.
        speed: simulated seconds per second of the last seconds.
    """

    phase: str = "starting"
    said: str = ""
    instruction: str = ""
    initial_state: int = 0
    offsets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    steps: int = 0
    max_steps: int = 0
    success: bool | None = None
    goals: tuple[str, ...] = ()
    tasks: tuple[SceneTask, ...] = ()
    num_initial_states: int = 0
    starts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    places: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    fixtures: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    hand: tuple[float, float] | None = None
    speed: float | None = None
