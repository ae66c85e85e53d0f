"""A dataset of a known robot that was written by another convention than that robot's policies read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lightvla.datasets.problem import Problem
from lightvla.datasets.reading import Place, StoredDataset
from prismatic.report.data import counted
from prismatic.vla.datasets.stored.episode import Episode, UnreadableImage
from prismatic.vla.robots import LIBERO

_TURN = 2 * np.pi
_NEAR_A_TURN = 0.4  # radians
_LAG = 5  # frames between two pictures whose difference shows where the arm moves
_PAIRS = 150
_ENOUGH = 40  # pairs to say so
_AGAINST = 0.5  # correlation with the arm's way from which on pictures stand the other way
_MOVED = 30  # grey levels, all colours together, below which a pixel has not changed
_FINGER = 0.05  # metres that a finger of LIBERO's gripper may be off the middle


def find_other_conventions(data: StoredDataset) -> Iterator[Problem]:
    """What the values and pictures of a dataset say themselves."""
    yield from _frame_rate(data)
    if data.index.spec.robot.name == LIBERO.name:
        yield from _rotation(data)
        yield from _columns(data)
        yield from _upright(data)


def _frame_rate(data: StoredDataset) -> Iterator[Problem]:
    fps, robot = data.index.fps, data.index.spec.robot
    if fps is not None and fps != robot.control_rate_hz:
        yield Problem(
            "another frame rate",
            f"the dataset says {fps:g} frames per second, and robot {robot.name!r} is controlled at "
            f"{robot.control_rate_hz:g} Hz",
            "An action per frame is executed as one per control step, so motions would be faster or slower.",
            "If only the number is wrong, as in conversions of LIBERO that say 10, nothing needs doing; else resample "
            "the recording, or give the robot its control_rate_hz in a --dataset_spec.",
        )


def _rotation(data: StoredDataset) -> Iterator[Problem]:
    """A jump by a full turn, which neither an arm makes nor the simulator's axis-angle."""
    if data.states is None:
        return
    rotation = data.states[:, 3:6]
    with np.errstate(invalid="ignore"):
        jump = np.linalg.norm(np.diff(rotation, axis=0, prepend=rotation[:1]), axis=1)
        found = (np.abs(jump - _TURN) < _NEAR_A_TURN) & (np.linalg.norm(rotation, axis=1) > _TURN / 2 - _NEAR_A_TURN)
    found[data.firsts[data.lengths > 0]] = False
    rows = np.flatnonzero(found)
    if len(rows):
        names = data.index.labels.get("state", ())[3:6]
        named = f" ({', '.join(names)})" if names else ""
        place = data.place(int(rows[0]))
        yield Problem(
            "rotation of another kind",
            f"state 3 to 5{named} jump by a full turn at "
            f"{counted(len(rows), 'frame')}, the first at step {place[1]} of episode {place[0]}",
            "LIBERO's state is an axis-angle that goes on beyond half a turn, also where it is labelled roll, pitch, "
            "yaw. These are Euler angles, or an axis-angle of a quaternion with its sign made positive: the policy "
            "reads other numbers in the simulator.",
            "Write the axis-angle of the simulator's quaternion as it comes, or train with --use_proprio False.",
            [place],
        )


def _columns(data: StoredDataset) -> Iterator[Problem]:
    """The two fingers, which mirror each other, in other columns than the last two."""
    if data.states is None or data.states.shape[1] < 2:
        return
    finite = data.states[np.isfinite(data.states).all(1)]
    if not len(finite):
        return
    sums = np.abs(finite[:, :-1] + finite[:, 1:]).max(0)
    size = np.abs(finite).max(0)
    mirrored = (sums < 0.2 * _FINGER) & (np.ptp(finite, axis=0)[:-1] > 1e-3) & (size[:-1] < _FINGER)
    if mirrored.any() and not mirrored[-1]:
        first = int(mirrored.argmax())
        yield Problem(
            "state in another order",
            f"state {first} and {first + 1} mirror each other as the two fingers do, which stand last in LIBERO's",
            "The policy reads position, axis-angle and the fingers, 3 + 3 + 2, in the simulator.",
            "Write the state in that order, or train with --use_proprio False.",
        )


def _upright(data: StoredDataset) -> Iterator[Problem]:
    """The moving arm goes up in the picture as it rises, and to the left as its y grows: the camera faces the robot."""
    camera = LIBERO.cameras[0]
    if camera not in data.cameras or data.states is None:
        return
    seen: list[NDArray[np.float64]] = []
    places: list[Place] = []
    for number, step in _pairs(data):
        if (found := _where_it_moves(data.episodes[number], camera, step)) is not None:
            seen.append(np.concatenate([found, data.states[data.firsts[number] + step, 1:3]]))
            places.append((number, step))
    values = np.array(seen)
    if len(values) < _ENOUGH or not np.isfinite(values).all() or (values.std(0) < 1e-6).any():
        return
    sideways, downwards = (float(np.corrcoef(values[:, n], values[:, n + 2])[0, 1]) for n in (0, 1))
    mirrored, upside_down = sideways > _AGAINST, downwards > _AGAINST
    if mirrored or upside_down:
        remedy = {
            (True, True): "rotate_pictures: 180",
            (True, False): "mirror_pictures: true",
            (False, True): "rotate_pictures: 180 and mirror_pictures: true",
        }[mirrored, upside_down]
        ways = [*(["mirrored"] if mirrored else []), *(["upside down"] if upside_down else [])]
        yield Problem(
            f"pictures of {camera} stand another way",
            f"they are {' and '.join(ways)}: what moves goes to the right with the state's y (correlation "
            f"{sideways:+.2f}) and down with its z ({downwards:+.2f}; {len(values)} pairs of pictures), where in "
            "LIBERO's convention both are negative",
            "The policy is shown the simulator's pictures the published way round, and fails.",
            f"Say {remedy} in a --dataset_spec, and look whether the wrist camera's need it, too.",
            places[:2],
        )


def _pairs(data: StoredDataset) -> list[Place]:
    """Steps spread over all episodes that have another one `_LAG` frames later."""
    every = max(int(np.maximum(data.lengths - _LAG, 0).sum()) // _PAIRS, _LAG)
    counted_through = 0
    places: list[Place] = []
    for number, length in enumerate(data.lengths.tolist()):
        first = -counted_through % every
        places += [(number, step) for step in range(first, length - _LAG, every)]
        counted_through += max(length - _LAG, 0)
    return places


def _where_it_moves(episode: Episode, camera: str, step: int) -> NDArray[np.float64] | None:
    """Centre of what changes, (right, down) as shares of the picture; None where next to nothing does."""
    try:
        one, other = (episode.image(camera, at).astype(np.int32) for at in (step, step + _LAG))
    except UnreadableImage:
        return None
    if one.shape != other.shape:
        return None
    change = np.abs(one - other).sum(-1).astype(np.float64)
    change[change < _MOVED] = 0
    if change.sum() < 10 * _MOVED:
        return None
    down, right = (np.arange(size) / size for size in change.shape)
    return np.array([change.sum(0) @ right, change.sum(1) @ down]) / change.sum()
