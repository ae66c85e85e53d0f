"""What is wrong with a dataset, what that means for a policy trained on it, and what to do."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from lightvla.datasets.conventions import find_other_conventions
from lightvla.datasets.problem import Problem
from lightvla.datasets.reading import CameraView, Place, StoredDataset
from prismatic.report.data import counted
from prismatic.vla.gripper import GRIPPERS, Gripper, suggestion, unsaid_gripper

FAR = 4.0
"""An action or state lies far out if it is so many times the distance of the 1 % and 99 % quantiles beyond them."""
_REPEATED = 0.01  # share of frames with their predecessor's picture from which on it is a problem
_NO_OPS = 0.05  # share of frames in which nothing is done
_STILL_STATE = 1e-3  # of the range of a state's dimension: less is no movement
_STILL_ACTION = 1e-4  # of an action that is a motion, or of a dimension's range where it is a position
_CLOSED_FIRST = 0.9  # share of episodes that begin with a closed gripper from which on it may be the wrong way round
_ENOUGH = 5  # episodes to say so

_BYTES_LITERAL = re.compile(r"""b(?P<quote>['"]).*(?P=quote)""", re.DOTALL)


def find_problems(data: StoredDataset) -> list[Problem]:
    """All that is wrong, the worst first."""
    checks: tuple[Callable[[StoredDataset], Iterator[Problem]], ...] = (
        _not_finite, _pictures, _state, _gripper, _instructions, _short, _twice, _sizes, _blank, _repeated, _no_ops,
        _constant, _far, find_other_conventions,
    )  # fmt: skip
    return list(chain.from_iterable(check(data) for check in checks))


def gripper_looks_like(stored: NDArray[np.float64]) -> str:
    """Which conventions (N,) stored values of a gripper fit."""
    least, most = float(stored.min()), float(stored.max())
    fitting = [name for name, gripper in GRIPPERS.items() if np.allclose(gripper.stored_range, (least, most), atol=0.1)]
    looks = " or ".join(fitting) or ("nothing: it never moves" if least == most else f"width:{least:g},{most:g}")
    return f"stored {least:g} to {most:g}, which looks like {looks}"


def no_ops(data: StoredDataset) -> NDArray[np.bool_]:
    """(N,) frames whose action stands still, the gripper included, while the state does not change either.

    A step that holds the gripper while its fingers still move is none. Without states actions alone count; the last
    frame of an episode is none.
    """
    robot, actions = data.index.spec.robot, _infinity_as_nan(data.actions)
    unscaled = np.flatnonzero(~np.array(robot.action_mask))
    grippers = np.array(robot.control.grippers, np.int64) if robot.control else unscaled
    moving = np.setdiff1d(np.arange(robot.action_dim), grippers)
    span = _range(actions)
    change = np.diff(actions, axis=0, prepend=actions[:1])
    change[data.firsts[data.lengths > 0]] = 0
    held = np.abs(change) <= _STILL_ACTION * span
    if robot.control and robot.control.kind == "absolute":
        still: NDArray[np.bool_] = np.asarray(held.all(1))
        still[data.firsts[data.lengths > 0]] = False  # the first one has none to be compared with
    else:
        still = np.asarray((np.abs(actions[:, moving]) <= _STILL_ACTION).all(1) & held[:, grippers].all(1))
    if data.states is not None:
        states = _infinity_as_nan(data.states)
        still &= (np.abs(np.diff(states, axis=0, append=states[-1:])) <= _STILL_STATE * _range(states)).all(1)
    still[(data.firsts + data.lengths)[data.lengths > 0] - 1] = False
    return still


def _range(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, D) -> (D,) of the finite rows, 0 where there are none."""
    finite = values[np.isfinite(values).all(1)]
    return np.ptp(finite, axis=0) if len(finite) else np.zeros(values.shape[1])


def _infinity_as_nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences of NaN are NaN without a warning."""
    return np.where(np.isfinite(values), values, np.nan)


def _not_finite(data: StoredDataset) -> Iterator[Problem]:
    for name, values, without in (("actions", data.actions, ""), ("states", data.states, ", which reads no state")):
        odd = np.flatnonzero(~np.isfinite(values).all(1)) if values is not None else np.zeros(0, int)
        if len(odd):
            yield Problem(
                f"NaN in {name}",
                f"{counted(len(odd), 'frame')} with NaN or infinity{_first(data, odd)}",
                "Training refuses the dataset: one such value makes every weight NaN.",
                "Write these episodes again without those steps"
                + (f", or train with --use_proprio False{without}." if without else "."),
                _some(data, odd),
            )


def _pictures(data: StoredDataset) -> Iterator[Problem]:
    for camera, reason in data.lacking.items():
        yield Problem(
            f"{camera} cannot be read",
            reason,
            "A policy that reads this camera cannot be trained.",
            "Store JPEG or PNG under the feature that the dataset's entry names, or lower --num_images_in_input.",
        )
    for camera, view in data.cameras.items():
        if view.unreadable:
            yield Problem(
                f"damaged pictures of {camera}",
                f"{len(view.unreadable)} of {view.looked} pictures looked at cannot be decoded; "
                f"{view.unreadable[0][1]}",
                "Other frames stand for them in training, and more than --max_bad_samples end the run.",
                "Copy or write the shard again.",
            )


def _state(data: StoredDataset) -> Iterator[Problem]:
    if data.unread_state:
        yield Problem(
            "no state",
            data.unread_state,
            "A policy with --use_proprio True cannot be trained.",
            "Store the state as the robot has it, correct the entry, or train with --use_proprio False.",
        )


def _gripper(data: StoredDataset) -> Iterator[Problem]:
    spec = data.index.spec
    stored = data.actions[np.isfinite(data.actions[:, -1]), -1]
    if not spec.has_gripper or not len(stored):
        return
    means = "The policy opens its gripper where it should close, or learns a part of its way only."
    convention = spec.map_actions
    if convention is unsaid_gripper:
        yield Problem(
            "gripper not said",
            f"{gripper_looks_like(stored)}; neither the dataset's name nor an entry or flag says which it is",
            "A wrong guess opens it where it should close. Training refuses the data, or takes -1 to 1 for LIBERO's, "
            "with a warning.",
            f"{suggestion(stored)}.",
        )
        return
    mapped = np.asarray(convention(data.actions), np.float64)[:, -1]
    if isinstance(convention, Gripper):
        try:
            odd = convention.check(stored)
        except ValueError as error:
            odd = str(error)
    else:
        ends = (np.nanmin(mapped), np.nanmax(mapped))
        fits = np.allclose(ends, (0, 1), atol=0.1)
        odd = None if fits else f"the entry makes values from {ends[0]:g} to {ends[1]:g}; 0 should be closed, 1 open"
    if odd:
        yield Problem(
            "gripper range",
            f"{gripper_looks_like(stored)}; {odd}",
            means,
            "Say the convention that the data have (--gripper, or the dataset's entry), or correct the values. If it "
            "is meant never to move, nothing needs doing.",
        )
        return
    first = mapped[data.firsts[data.lengths > 0]]
    if len(first) >= _ENOUGH and (first < 0.5).mean() >= _CLOSED_FIRST:
        yield Problem(
            "gripper begins closed",
            f"{int((first < 0.5).sum())} of {len(first)} episodes begin with a gripper that "
            f"{getattr(convention, 'name', 'the entry')!r} calls closed",
            "Demonstrations mostly begin open: the convention may be the wrong way round, and then the policy opens "
            "where it should close.",
            "Compare the action plots with the pictures; if it is the wrong way round, say the other convention.",
            [(number, 0) for number in np.flatnonzero(data.lengths)[:2].tolist()],
        )


def _instructions(data: StoredDataset) -> Iterator[Problem]:
    empty = np.array([not text for episode in data.episodes for text in episode.instructions])
    if empty.any():
        whole = sum(not episode.instruction for episode in data.episodes)
        yield Problem(
            "empty instructions",
            f"{counted(int(empty.sum()), 'frame')} without an instruction; episodes that have none at all: {whole}"
            f"{_first(data, np.flatnonzero(empty))}",
            "These frames are left out: nothing says what the policy shall do there.",
            "Write the sentence into the episodes, or leave them out for good.",
            _some(data, np.flatnonzero(empty)),
        )
    texts = {text for episode in data.episodes for text in episode.instructions}
    if quoted := sorted(text for text in texts if _BYTES_LITERAL.fullmatch(text)):
        yield Problem(
            "instructions in quotes",
            f"{counted(len(quoted), 'sentence')} such as {quoted[0]!r}",
            "The policy learns sentences that begin with b', and is asked others later.",
            "Write text.decode() where str(text) was written.",
        )


def _short(data: StoredDataset) -> Iterator[Problem]:
    chunk = data.index.spec.robot.chunk_length
    short = np.flatnonzero(data.lengths < chunk)
    if len(short):
        yield Problem(
            "very short episodes",
            f"{len(short)} of {counted(len(data.lengths), 'episode')} have fewer frames than a chunk of {chunk} "
            f"actions; the first is episode {short[0]} with {counted(int(data.lengths[short[0]]), 'frame')}",
            "They hold no sample and are left out; they may be what is left of a recording that broke off.",
            "Record them again, or leave them out for good.",
            [(number, 0) for number in short[:2].tolist()],
        )


def _twice(data: StoredDataset) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    same = []
    for number, episode in enumerate(data.episodes):
        digest = hashlib.sha256(np.ascontiguousarray(episode.action).tobytes())
        digest.update(b"" if episode.state is None else np.ascontiguousarray(episode.state).tobytes())
        first = seen.setdefault(digest.hexdigest(), number)
        same += [(first, number)] if first != number and episode.num_frames else []
    if same:
        splits = sum(data.episodes[one].split != data.episodes[other].split for one, other in same)
        yield Problem(
            "episodes stored twice",
            f"{counted(len(same), 'episode')} whose actions and states are another's to the bit; the first is episode "
            f"{same[0][1]}, a copy of {same[0][0]}"
            + (f"; in another split than the original: {splits}" if splits else ""),
            "They count twice in training; a copy in the validation split makes its loss too good.",
            "Write the dataset again without the copies.",
        )


def _sizes(data: StoredDataset) -> Iterator[Problem]:
    for camera, view in data.cameras.items():
        if len(view.sizes) > 1:
            told = ", ".join(f"{width} x {height}: {count}" for (height, width), count in view.sizes.most_common())
            yield Problem(
                f"mixed picture sizes of {camera}",
                f"{view.looked} pictures were looked at; width x height in pixels and how many: {told}",
                "All are squeezed to the model's square, so another shape is another distortion, and the policy sees "
                "one of them later.",
                "Cut or scale all pictures alike before they are stored.",
            )


def _blank(data: StoredDataset) -> Iterator[Problem]:
    for camera, view in data.cameras.items():
        for places, name in ((view.black, "black"), (view.blank, "one-coloured")):
            if places:
                number, step = places[0]
                yield Problem(
                    f"{name} pictures of {camera}",
                    f"{len(places)} of {view.looked} pictures looked at; the first is step {step} of episode {number}",
                    "The policy learns to act without seeing; the pruner learns from patches that show nothing.",
                    "Look at the camera and its recording; leave those frames or episodes out.",
                    places[:2],
                )


def _repeated(data: StoredDataset) -> Iterator[Problem]:
    for camera, view in data.cameras.items():
        if view.repeated.mean() > _REPEATED:
            frozen = _frozen(data, view)
            yield Problem(
                f"duplicated frames of {camera}",
                f"{counted(int(view.repeated.sum()), 'frame')} ({view.repeated.mean():.1%}) have their predecessor's "
                f"picture, byte for byte{_first(data, np.flatnonzero(view.repeated))}"
                + (f"; in {counted(frozen, 'episode')} it never changes" if frozen else ""),
                "State and actions go on while the picture stands: the policy learns to act on what is past.",
                "Record no faster than the camera gives pictures, or leave out the frames without a new one.",
                _some(data, np.flatnonzero(view.repeated)),
            )


def _frozen(data: StoredDataset, view: CameraView) -> int:
    """Episodes of several frames in which the camera's picture never changes."""
    pairs = zip(data.firsts.tolist(), data.lengths.tolist(), strict=True)
    return sum(length > 1 and bool(view.repeated[first + 1 : first + length].all()) for first, length in pairs)


def _no_ops(data: StoredDataset) -> Iterator[Problem]:
    still = no_ops(data)
    if still.any() and still.mean() > _NO_OPS:
        yield Problem(
            "no-ops",
            f"{counted(int(still.sum()), 'frame')} ({still.mean():.1%}) in which nothing is done and nothing moves"
            f"{_first(data, np.flatnonzero(still))}",
            "The policy learns to stand still, and from a frame where it does it never goes on.",
            "Leave these frames out (those that hold the gripper while its fingers move are not counted and stay).",
            _some(data, np.flatnonzero(still)),
        )


def _constant(data: StoredDataset) -> Iterator[Problem]:
    spec = data.index.spec
    actions = data.actions[:, :-1] if spec.has_gripper else data.actions
    for what, values in (("actions", actions), ("states", data.states)):
        finite = values[np.isfinite(values).all(1)] if values is not None else np.zeros((0, 0))
        if not len(finite):
            continue
        found = np.flatnonzero(np.ptp(finite, axis=0) <= 1e-6 * np.abs(finite).max(0))
        if len(found):
            told = ", ".join(f"{_dimension(data, what, number)} is {finite[0, number]:g}" for number in found.tolist())
            yield Problem(
                f"constant dimensions of {what}",
                f"over all frames {told}",
                "It is normalised to 0; the policy learns nothing about it, and always answers the same."
                if what == "actions"
                else "It is normalised to 0; the policy reads nothing from it, whatever it is later.",
                "If it is meant, nothing needs doing; else look at the recording: a sensor or joint may not be "
                "connected, or the columns are not in the robot's order.",
            )


def _far(data: StoredDataset) -> Iterator[Problem]:
    robot = data.index.spec.robot
    masks = {"actions": np.array(robot.action_mask), "states": np.ones(robot.proprio_dim, bool)}
    for what, values in (("actions", data.actions), ("states", data.states)):
        finite = values[np.isfinite(values).all(1)] if values is not None else np.zeros((0, 0))
        if values is None or not len(finite):
            continue
        low = np.quantile(finite, 0.01, axis=0, method="higher")  # what lies far out moves neither in small datasets
        high = np.quantile(finite, 0.99, axis=0, method="lower")
        with np.errstate(invalid="ignore"):  # NaN is no problem of this kind
            beyond = np.maximum(values - high, low - values)
            far = (beyond > FAR * (high - low) + 1e-6 * np.abs(finite).max(0)) & masks[what] & np.isfinite(values)
        rows = np.flatnonzero(far.any(1))
        if len(rows):
            number = int(far[rows[0]].argmax())
            worst = np.flatnonzero(far.any(0)).tolist()
            scaled = (
                "They are cut to the 1 % and 99 % quantiles, so that the policy never learns them."
                if robot.normalization == "bounds_q99"
                else "Minimum and maximum scale this robot's values, so a single one squeezes all others together."
            )
            yield Problem(
                f"{what} far out",
                f"{counted(len(rows), 'frame')} in {', '.join(_dimension(data, what, n) for n in worst)}"
                f"{_first(data, rows)} with {values[rows[0], number]:.4g}, where 98 % lie from {low[number]:.4g} to "
                f"{high[number]:.4g}",
                f"{scaled} They may be glitches of a sensor, or units that changed.",
                "Look at the plot of that episode; leave out or correct what did not happen.",
                _some(data, rows),
            )


def _dimension(data: StoredDataset, what: str, number: int) -> str:
    return data.index.spec.robot.action_names[number] if what == "actions" else f"state {number}"


def _first(data: StoredDataset, frames: NDArray[np.int64]) -> str:
    number, step = data.place(int(frames[0]))
    return f"; the first at step {step} of episode {number}"


def _some(data: StoredDataset, frames: NDArray[np.int64]) -> list[Place]:
    """The first places in up to two episodes."""
    found: dict[int, Place] = {}
    for frame in frames[:1000].tolist():
        place = data.place(frame)
        found.setdefault(place[0], place)
    return list(found.values())[:2]
