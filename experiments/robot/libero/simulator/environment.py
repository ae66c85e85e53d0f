"""LIBERO tasks and their simulator environment, seeded before every reset and rendered only when looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.robot.libero.simulator.backend import quiet, release_memory, seeded, simulator
from experiments.robot.libero.simulator.renderer import RENDERERS, CameraRenderer
from experiments.robot.libero.simulator.scene import Scene
from experiments.robot.libero.simulator.tasks import LiberoTask
from experiments.robot.libero.simulator.wide_starts import Mover

CAMERAS = {"full_image": "agentview", "wrist_image": "robot0_eye_in_hand"}
"""Observation key -> the simulator's camera."""
SETTLE_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)

Pose = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Position (3,) in metres and quaternion (4,), w first."""

_RESET_ATTEMPTS = 100
_UNDRAWN = 5
"""A group of shapes that MuJoCo does not draw."""
_ROUNDED = 1e-4
"""MuJoCo writes a model with six digits; places that differ by less are the same."""
_UNSTABLE = ("BADQPOS", "BADQVEL", "BADQACC")
_PROPRIO = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


class SimulationUnstable(RuntimeError):
    """Positions, velocities or accelerations became infinite or huge; MuJoCo then starts over from a standard pose."""


def quaternion_to_axis_angle(quaternion: ArrayLike, canonical: bool = False) -> NDArray[np.float64]:
    """Turns a unit quaternion (x, y, z, w) into axis times angle (3,), in radians: 2 acos(w) axis.

    Args:
        quaternion: (4,).
        canonical: choose, of the two quaternions of one rotation, the one with x >= 0. A gripper that points down turns
            by about pi, where the vector's sign is otherwise an accident. Published datasets do without.
    """
    x, y, z, w = np.asarray(quaternion, dtype=np.float64)
    if canonical and x < 0:
        x, y, z, w = -x, -y, -z, -w
    w = min(max(w, -1.0), 1.0)
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.array([x, y, z]) * (2.0 * np.arccos(w) / sine)


class LiberoEnvironment:
    """One task in the simulator. At most one per process should render (see `CameraRenderer`).

    The model is built once; a `reset` seeds NumPy's global generator (LIBERO draws fixtures' poses from it, and
    they are no part of an initial state) and restores it afterwards, so that equal arguments give equal episodes.

    Args:
        task: from `load_task`.
        resolution: side of the square pictures in pixels.
        render: whether pictures will be asked for; without them no graphics library is touched.
        renderer: `robosuite` or `fast`, see `CameraRenderer`.
        settle_steps: steps of `SETTLE_ACTION` after a reset, in which objects come to rest.
        canonical_quaternion: see `quaternion_to_axis_angle`.

    Raises:
        ValueError: for an unknown renderer.
        RenderingUnavailable: when pictures are wanted and cannot be drawn.
    """

    def __init__(
        self,
        task: LiberoTask,
        resolution: int = 256,
        render: bool = True,
        seed: int = 0,
        renderer: str = "robosuite",
        settle_steps: int = 10,
        canonical_quaternion: bool = False,
    ) -> None:
        if renderer not in RENDERERS:
            raise ValueError(f"unknown renderer {renderer!r}; known: {', '.join(RENDERERS)}")
        self.task, self.resolution, self.seed = task, resolution, seed
        self.settle_steps, self.canonical_quaternion = settle_steps, canonical_quaternion
        self.renderer = renderer
        with seeded(seed), quiet():
            self._control: Any = simulator().control_env(
                bddl_file_name=str(task.bddl_file),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                ignore_done=True,
                hard_reset=False,
            )
        self.inner: Any = self._control.env
        for name, observable in self.inner._observables.items():
            observable.set_enabled(name in _PROPRIO)
        self._renderer = CameraRenderer(self.model, resolution, renderer) if render else None
        self._proprio: dict[str, Any] = {}

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that make another one which behaves and draws alike."""
        names = ("resolution", "renderer", "settle_steps", "canonical_quaternion")
        return {name: getattr(self, name) for name in names}

    @property
    def model(self) -> Any:
        """The `mujoco.MjModel`."""
        return self.inner.sim.model._model

    @property
    def data(self) -> Any:
        """The `mujoco.MjData`."""
        return self.inner.sim.data._data

    def reset(
        self,
        initial_state: ArrayLike | int,
        seed: int | None = None,
        displacement: Mover | None = None,
        fixtures: Mapping[str, Pose] | None = None,
    ) -> None:
        """Starts an episode and lets it settle.

        Args:
            initial_state: index into the task's initial states, or such a state (S,).
            seed: of the fixtures' poses; default: the environment's.
            displacement: moves objects away from their standard places (see `wide_starts.py`).
            fixtures: body -> where it stands, instead of where the seed has it; other bodies are ignored.

        Raises:
            ValueError: for an index out of range or a state of another length.
        """
        state = self._initial_state(initial_state)
        for kind in self._instabilities():
            self.data.warning[kind].number = 0
        with seeded(self.seed if seed is None else seed), quiet():
            self._soft_reset()
            self._place(fixtures or {})
            self._proprio = self._control.set_init_state(state)
        if displacement is not None:
            displacement.apply(Scene(self.inner), self.task, state)
            self._refresh()
        for _ in range(self.settle_steps):
            self.step(SETTLE_ACTION)

    def _initial_state(self, initial_state: ArrayLike | int) -> NDArray[np.float64]:
        states = self.task.init_states
        if isinstance(initial_state, int | np.integer):
            if not 0 <= initial_state < len(states):
                raise ValueError(
                    f"{self.task.suite} task {self.task.index} has no initial state {initial_state}; "
                    f"expected 0 to {len(states) - 1}"
                )
            return states[int(initial_state)]
        state = np.asarray(initial_state, dtype=np.float64)
        expected = 1 + self.model.nq + self.model.nv
        if state.shape != (expected,) or not np.isfinite(state).all():
            raise ValueError(
                f"an initial state of {self.task.suite} task {self.task.index} is {expected} finite numbers (time, "
                f"positions, velocities); got shape {state.shape}"
            )
        return state

    def _soft_reset(self) -> None:
        # What robosuite leaves behind from the episode before: how far the gripper's command had ramped up, and where
        # the contact solver starts from.
        self.inner.robots[0].gripper.current_action[:] = 0.0
        # LIBERO's own loop swallows every error and would run for ever on one; robosuite's reset is called directly.
        for _ in range(_RESET_ATTEMPTS):
            try:
                self.inner.reset()
                self.data.qacc_warmstart[:] = 0.0
                return
            except simulator().randomization_error:
                continue
        raise RuntimeError(
            f"{self.task.name}: no valid placement of the objects in {_RESET_ATTEMPTS} attempts; try another seed"
        )

    def _place(self, poses: Mapping[str, Pose]) -> None:
        for fixture in self.inner.fixtures_dict.values():
            if (pose := poses.get(fixture.root_body)) is not None:
                body = self.model.body(fixture.root_body)
                for now, then in zip((body.pos, body.quat), pose, strict=True):
                    if np.abs(now - then).max() > _ROUNDED:
                        now[:] = then

    def _refresh(self) -> None:
        self.inner.sim.forward()
        self.inner._post_process()
        self.inner._update_observables(force=True)
        self._proprio = self.inner._get_observations()

    def step(self, action: ArrayLike) -> bool:
        """Applies one action (7,) in the simulator's convention (gripper -1 open, +1 close); says if the goal holds.

        Raises:
            ValueError: for an action of another shape, or with NaN or infinity.
            SimulationUnstable: when the simulation has gone astray, so that nothing can be said of the policy.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is 7 finite numbers; got shape {action.shape}: {action}")
        self._proprio, _, done, _ = self.inner.step(action)
        if any(self.data.warning[kind].number for kind in self._instabilities()):
            raise SimulationUnstable(
                f"the simulation of {self.task.name} became unstable (NaN, infinite or huge values in MuJoCo's state)"
            )
        return bool(done)

    @staticmethod
    def _instabilities() -> list[int]:
        """MuJoCo's warnings after which it resets its state without a word to the caller."""
        kinds = simulator().mujoco.mjtWarning
        return [int(getattr(kinds, f"mjWARN_{name}")) for name in _UNSTABLE]

    def step_policy(self, action: ArrayLike) -> bool:
        """Applies one action (7,) as `Policy` returns it (gripper in [0, 1], 1 = open); says whether the goal holds."""
        action = np.array(action, dtype=np.float64)
        if action.shape == (7,):
            action[6] = -np.sign(2.0 * action[6] - 1.0)
        return self.step(action)

    def state(self) -> NDArray[np.float64]:
        """End-effector position in metres (3), axis-angle in radians (3), finger positions in metres (2)."""
        if not self._proprio:
            raise RuntimeError("the environment was never reset; call reset() first")
        position, quaternion, fingers = (self._proprio[name] for name in _PROPRIO)
        return np.concatenate([position, quaternion_to_axis_angle(quaternion, self.canonical_quaternion), fingers])

    @property
    def control_rate_hz(self) -> float:
        """Control steps per simulated second."""
        return float(self.inner.control_freq)

    def position(self) -> NDArray[np.float64]:
        """Where the end effector is, (3,) in metres."""
        return np.array(self._proprio[_PROPRIO[0]], dtype=np.float64)

    def gripper_commanded(self) -> bool:
        """Whether robosuite, which turns a change of the gripper's command into a ramp of 8 steps, is at its end."""
        return bool((np.abs(self.inner.robots[0].gripper.current_action) > 1.0 - 1e-6).all())

    def observe(self) -> dict[str, NDArray[Any]]:
        """Renders both cameras: `full_image`, `wrist_image` uint8 (H, W, 3) as datasets store them; `state` (8,)."""
        observation: dict[str, NDArray[Any]] = {key: self.frame(key) for key in CAMERAS}
        observation["state"] = self.state()
        return observation

    def frame(self, camera: str = "full_image", without: Sequence[int] = ()) -> NDArray[np.uint8]:
        """Renders one camera, uint8 (H, W, 3); takes an observation key or the name of a simulator camera.

        Bodies `without` which it is drawn are there all the same.

        Raises:
            RenderError: when the picture is blank.
            ValueError: when the environment was made with `render=False`.
        """
        groups = self.model.geom_group.copy()
        self.model.geom_group[np.isin(self.model.geom_bodyid, list(without))] = _UNDRAWN
        try:
            return self._drawing().render(self.data, CAMERAS.get(camera, camera))
        finally:
            self.model.geom_group[:] = groups

    def bodies(self, camera: str = "full_image") -> NDArray[np.int32]:
        """Which body every pixel of `frame` shows, (H, W) ids of the model; -1 where it shows none.

        Raises ValueError when the environment was made with `render=False`.
        """
        return self._drawing().bodies(self.data, CAMERAS.get(camera, camera))

    def _drawing(self) -> CameraRenderer:
        if self._renderer is None:
            raise ValueError("this environment was made with render=False; make it with render=True to see pictures")
        return self._renderer

    def succeeded(self, goal: Sequence[Sequence[str]] | None = None) -> bool:
        """Whether a goal holds now: the task's own, or another task's (`LiberoTask.goal`) that lives in the same scene.

        Raises:
            ValueError: when the goal names something that is not in this scene.
        """
        predicates = self.task.goal if goal is None else goal
        known = self.inner.object_states_dict
        missing = sorted({name for predicate in predicates for name in predicate[1:] if name not in known})
        if missing:
            raise ValueError(f"{', '.join(missing)} not in the scene of {self.task.name!r}; it has: {', '.join(known)}")
        return all(self.inner._eval_predicate(list(predicate)) for predicate in predicates)

    def progress(self) -> float:
        """The share of the own goal's predicates that hold now, in [0, 1]."""
        return float(np.mean([self.inner._eval_predicate(list(predicate)) for predicate in self.task.goal]))

    def restore(self, qpos: NDArray[np.float64]) -> None:
        """Puts every joint where it was, at rest, to draw it; fixtures stay as `reset` placed them."""
        self.data.qpos[:] = qpos
        self.data.qvel[:] = 0.0
        self.inner.sim.forward()
        # A lit stove is drawn by a flag that LIBERO updates from the knob.
        self.inner._post_process()

    def close(self) -> None:
        """Frees the renderer and the simulator, which cannot be used any more; may be called twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self.inner is not None:
            # robosuite's environment refers to itself in circles, and what hangs on it (200 MiB) is no Python memory,
            # so the collector sees no reason to run.
            self._control = self.inner = None
            self._proprio = {}
            release_memory()

    def __enter__(self) -> LiberoEnvironment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
