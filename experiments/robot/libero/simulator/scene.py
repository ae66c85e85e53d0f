"""What a scripted expert may know that a policy may not: where things are, from the simulator's own model and state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from experiments.robot.libero.simulator.backend import simulator

Points = NDArray[np.float64]

COLLISION, VISUAL = 0, 1
"""Groups of shapes: what the physics touches, and what the camera sees."""

_GRIP_SITE = "gripper0_grip_site"
_LATTICE = 7
_MAX_VERTICES = 3000


class Scene:
    """Geometry of one environment, always current; positions in metres in the world's frame, z up."""

    def __init__(self, inner: Any) -> None:
        """Of LIBERO's own environment, `LiberoEnvironment.inner`."""
        self.inner = inner
        self.model, self.data = inner.sim.model._model, inner.sim.data._data
        self._mujoco = simulator().mujoco

    @property
    def names(self) -> tuple[str, ...]:
        """Objects, then fixtures."""
        return tuple(self.inner.obj_body_id)

    @property
    def grip_position(self) -> Points:
        """The point between the fingertips, (3,)."""
        return self.data.site(_GRIP_SITE).xpos.copy()

    @property
    def grip_rotation(self) -> Points:
        """Orientation of the gripper, (3, 3): the fingers close along the first column and point along the third."""
        return self.data.site(_GRIP_SITE).xmat.reshape(3, 3).copy()

    @property
    def base_position(self) -> Points:
        """Foot of the arm, (3,)."""
        return self.data.body("robot0_base").xpos.copy()

    def is_movable(self, name: str) -> bool:
        return name in self.inner.objects_dict

    def rests_on_workspace(self, name: str) -> bool:
        """Whether the task's definition starts an object on the table or floor itself, not on or in another thing."""
        problem = self.inner.parsed_problem
        places = [fact[2] for fact in problem["initial_state"] if fact[0] == "on" and fact[1] == name]
        return any(
            place in problem["regions"] and problem["regions"][place]["target"] == self.inner.workspace_name
            for place in places
        )

    def owner(self, place: str) -> str | None:
        """The object or fixture that a goal's place is or belongs to; None for a region of the table."""
        if place in self.inner.obj_body_id:
            return place
        owners = [name for name in self.names if place.startswith(name + "_")]
        return max(owners, key=len) if owners else None

    def place_center(self, place: str) -> Points:
        """Horizontal centre (2,) of an object, a fixture or a named region."""
        if place in self.inner.object_sites_dict:
            return self.data.site(place).xpos[:2].copy()
        return self.position(place)[:2]

    def position(self, name: str) -> Points:
        """Origin of an object's body, (3,)."""
        return self.data.xpos[self.inner.obj_body_id[name]].copy()

    def shift(self, name: str, offset: ArrayLike) -> None:
        """Moves a movable object horizontally by (2,) metres."""
        address = self.model.jnt_qposadr[self.model.joint(self.inner.objects_dict[name].joints[-1]).id]
        self.data.qpos[address : address + 2] += np.asarray(offset, dtype=np.float64)
        self._mujoco.mj_kinematics(self.model, self.data)

    def bodies(self, name: str) -> list[int]:
        """An object's bodies, root first."""
        found = [self.inner.obj_body_id[name]]
        for body in range(found[0] + 1, self.model.nbody):
            if self.model.body_parentid[body] in found:
                found.append(body)
        return found

    def points(self, name: str, group: int = COLLISION) -> Points:
        """Points (P, 3) that fill or cover an object's shapes; P is 0 where it has none in that group."""
        return self.body_points(self.bodies(name), group)

    def body_points(self, bodies: list[int], group: int = COLLISION) -> Points:
        """Like `points`, for single bodies."""
        geoms = self._geoms(bodies, group).tolist()
        return np.concatenate([self._geom_points(geom) for geom in geoms]) if geoms else np.zeros((0, 3))

    def gap(self, name: str, other: str, limit: float) -> float:
        """Smallest distance between two things' collision shapes, negative where they overlap; at most `limit`."""
        own, theirs = (self._geoms(self.bodies(thing), COLLISION) for thing in (name, other))
        apart = np.linalg.norm(self.data.geom_xpos[own][:, None] - self.data.geom_xpos[theirs][None], axis=-1)
        apart -= self.model.geom_rbound[own][:, None] + self.model.geom_rbound[theirs][None]
        for i, j in np.argwhere(apart < limit).tolist():
            pair = (int(own[i]), int(theirs[j]))
            limit = min(limit, self._mujoco.mj_geomDistance(self.model, self.data, *pair, limit, None))
        return limit

    def _geoms(self, bodies: list[int], group: int) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.model.geom_bodyid, bodies) & (self.model.geom_group == group))

    def _geom_points(self, geom: int) -> Points:
        kinds = self._mujoco.mjtGeom
        kind, size = self.model.geom_type[geom], self.model.geom_size[geom]
        if kind == kinds.mjGEOM_MESH:
            mesh = self.model.geom_dataid[geom]
            first = self.model.mesh_vertadr[mesh]
            local = self.model.mesh_vert[first : first + self.model.mesh_vertnum[mesh]]
            local = local[:: max(1, len(local) // _MAX_VERTICES)]
        else:
            axis = np.linspace(-1.0, 1.0, _LATTICE)
            local = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(-1, 3)
            if kind in (kinds.mjGEOM_CYLINDER, kinds.mjGEOM_CAPSULE):
                local = local[np.hypot(local[:, 0], local[:, 1]) <= 1.001] * size[[0, 0, 1]]
            elif kind == kinds.mjGEOM_SPHERE:
                local = local[np.linalg.norm(local, axis=1) <= 1.001] * size[0]
            else:
                local = local * size
        return local @ self.data.geom_xmat[geom].reshape(3, 3).T + self.data.geom_xpos[geom]

    def surface_below(self, xy: ArrayLike, height: float) -> float:
        """Height of the first solid thing straight below (x, y) at `height`; minus infinity where there is none."""
        groups = np.zeros(6, dtype=np.uint8)
        groups[COLLISION] = 1
        start = np.array([*np.asarray(xy, dtype=np.float64), height])
        distance = self._mujoco.mj_ray(
            self.model, self.data, start, np.array([0.0, 0.0, -1.0]), groups, 1, -1, np.zeros(1, dtype=np.int32)
        )
        return height - distance if distance >= 0 else -np.inf
