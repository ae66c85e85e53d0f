"""Episodes on disk: all that a policy was shown, its action chunks, which tokens it kept, and what was then done.

One `.npz` per episode (`prismatic.recordings.archive`), readable without pickle and without the model. Records of what
a server or a robot saw, which know no simulator, are `prismatic.recordings.recording`'s; `load_any` reads both.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.policies.contract import ActionChunk, Observation
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.rollout import Moment, RolloutSettings
from experiments.robot.libero.rollouts.start import Start
from prismatic.atomic_files import replacing
from prismatic.recordings.archive import (
    IMAGES,
    check_arrays,
    differences,
    packed,
    read_arrays,
    read_header,
    refuse_objects,
    stated_version,
    undone,
    unpacked,
    unusable_header,
)
from prismatic.recordings.recording import FORMAT_VERSION as OUTSIDE_VERSION
from prismatic.recordings.recording import Recording

FORMAT_VERSION = 2
_RENAMED = {"look_steps": "query_steps"}
"""Arrays of format version 1, which differs in nothing else -> what they are called now."""

_HEADER = ("episode", "settings", "environment", "center_crop", "control_rate_hz", "policy", "versions")
_TOKEN_ARRAYS = ("kept", "picks", "scores")
_ARRAYS = ("header", "start_state", "query_steps", "states", "qpos", "chunks", "actions")
_DIMENSIONS = {"start_state": 1, "query_steps": 1} | dict.fromkeys(("states", "qpos", "actions", *_TOKEN_ARRAYS), 2)
_DIMENSIONS |= {"chunks": 3}


@dataclass
class EpisodeRecording:
    """One rollout of T steps and L policy queries.

    Args:
        episode: The rollout's row of the results, as it stood when the rollout ended: suite, task, instruction,
            initial state, trial, seed, displacement, outcome, SHA-256 of the executed actions.
        settings: How it ran: step cap, open-loop steps, control, cameras.
        environment: Options that make an equal `LiberoEnvironment`.
        center_crop: Whether the policy saw the central part of the pictures only.
        control_rate_hz: Control steps per second.
        policy: `Agent.description()`.
        versions: Package -> version.
        start_state: (S,) the initial state, before any displacement.
        query_steps: (L,) how many steps had been taken at each policy query.
        images: Camera -> (L, H, W, 3) uint8, what the policy was given.
        states: (L, P) the robot's state it was given.
        qpos: (L, nq) the simulator's joint positions.
        chunks: (L, chunk, action_dim) its action chunks, in the robot's units.
        actions: (T, action_dim) what was executed, of the policy's convention (gripper 1 = open).
        kept: (L, V) bool, the visual tokens that stayed; None where the agent did not say. V counts image by image and
            inside an image row by row.
        picks: (L, V) how many patch queries picked each; None likewise.
        scores: (L, V) float32, the best score that any patch query gave each; None where there are none.
    """

    episode: EpisodeRecord
    settings: RolloutSettings
    environment: dict[str, Any]
    center_crop: bool
    control_rate_hz: float
    policy: dict[str, Any]
    versions: dict[str, str]
    start_state: NDArray[np.float64]
    query_steps: NDArray[np.int64]
    images: dict[str, NDArray[np.uint8]]
    states: NDArray[np.float64]
    qpos: NDArray[np.float64]
    chunks: NDArray[np.float64]
    actions: NDArray[np.float64]
    kept: NDArray[np.bool_] | None = None
    picks: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None

    def save(self, path: str | Path) -> None:
        """Write atomically: a crash leaves nothing under the final name, or what stood there before.

        Raises:
            ValueError: for arrays of Python objects.
        """
        header = {"format_version": FORMAT_VERSION, **{name: getattr(self, name) for name in _HEADER}}
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS[1:]}
        arrays |= {name: value for name in _TOKEN_ARRAYS if (value := getattr(self, name)) is not None}
        if self.kept is not None:
            header["num_visual_tokens"] = self.kept.shape[1]
            arrays["kept"] = packed(self.kept)
        arrays |= {IMAGES + camera: differences(pictures) for camera, pictures in self.images.items()}
        arrays["header"] = np.array(json.dumps(header, default=_plain))
        refuse_objects(path, arrays)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> EpisodeRecording:
        """Read and check one file.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when it is no episode record, is damaged, lacks something, or was written in another format.
        """
        path = Path(path)
        return cls.from_arrays(path, read_arrays(path))

    @classmethod
    def from_arrays(cls, path: Path, arrays: dict[str, NDArray[Any]]) -> EpisodeRecording:
        """What `load` makes of the arrays of a file; raises ValueError as it does."""
        header = _read_header(path, arrays)
        if header["format_version"] == 1:
            arrays = {_RENAMED.get(name, name): array for name, array in arrays.items()}
        cameras = header["settings"].cameras
        if missing := [name for name in (*_ARRAYS, *(IMAGES + c for c in cameras)) if name not in arrays]:
            raise ValueError(f"{path} lacks the arrays {missing}; it holds {sorted(arrays)}. Record the episode again")
        check_arrays(path, arrays, _DIMENSIONS)
        if "kept" in arrays:
            arrays["kept"] = unpacked(arrays["kept"], header["num_visual_tokens"])
        parts: dict[str, Any] = {name: header[name] for name in _HEADER}
        parts |= {name: arrays[name] for name in _ARRAYS[1:]}
        parts |= {name: arrays.get(name) for name in _TOKEN_ARRAYS}
        parts["images"] = {c: undone(arrays[IMAGES + c]) for c in cameras}
        recording = cls(**parts)
        recording.check(path)
        return recording

    def check(self, where: str | Path = "the recording") -> None:
        """Raises ValueError when its parts do not fit together: numbers of queries and steps, the actions' hash."""
        queries = {name: len(pictures) for name, pictures in self.images.items()}
        names = ("query_steps", "states", "qpos", "chunks", *_TOKEN_ARRAYS)
        queries |= {name: len(value) for name in names if (value := getattr(self, name)) is not None}
        if len(set(queries.values())) != 1:
            raise ValueError(f"{where}: numbers of policy queries differ: {queries}. Record the episode again")
        if len(self.actions) != self.episode.steps or actions_sha256(self.actions) != self.episode.actions_sha256:
            raise ValueError(
                f"{where}: its {len(self.actions)} actions are not the {self.episode.steps} that were executed "
                "(another SHA-256). Record the episode again"
            )

    def seen_from_outside(self) -> Recording:
        """What a record of any source holds of it."""
        episode, other = self.episode, self.episode.other_task is not None
        return Recording(
            source="evaluation",
            instruction=episode.instruction,
            success=episode.other_success if other else episode.success,
            center_crop=self.center_crop,
            control_rate_hz=self.control_rate_hz,
            policy=self.policy,
            versions=self.versions,
            images=self.images,
            states=self.states,
            steps=self.query_steps,
            chunks=self.chunks,
            actions=self.actions,
            kept=self.kept,
            picks=self.picks,
            scores=self.scores,
        )


def load_any(path: str | Path) -> Recording | EpisodeRecording:
    """Read a record of an evaluation, a server or a robot; errors as of `EpisodeRecording.load`."""
    path = Path(path)
    arrays = read_arrays(path)
    kind = Recording if stated_version(arrays) == OUTSIDE_VERSION else EpisodeRecording
    return kind.from_arrays(path, arrays)


def actions_sha256(actions: NDArray[np.float64]) -> str:
    """Of (T, action_dim), as in `EpisodeRecord.actions_sha256`."""
    return hashlib.sha256(np.ascontiguousarray(actions, dtype=np.float64).tobytes()).hexdigest()


@dataclass
class EpisodeRecorder:
    """Observes a rollout and makes an `EpisodeRecording` of it.

    Args:
        start: Of the rollout.
        settings: Of the rollout.
        center_crop: Whether the policy sees the central part of the pictures only.
        control_rate_hz: Control steps per second.
        policy: `Agent.description()`.
        recording: None until the rollout has ended; an invalid one never does.
    """

    start: Start
    settings: RolloutSettings
    center_crop: bool = True
    control_rate_hz: float = 20.0
    policy: Mapping[str, Any] = field(default_factory=dict)
    recording: EpisodeRecording | None = None
    _queries: list[tuple[int, Observation, ActionChunk, NDArray[np.float64]]] = field(default_factory=list)
    _actions: list[NDArray[np.float64]] = field(default_factory=list)

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        """Note the observation, the action chunk and where everything stands."""
        self._queries.append((moment.step, observation, chunk, moment.environment.data.qpos.copy()))

    def step(self, moment: Moment, action: NDArray[np.float64]) -> None:
        """Note the action."""
        self._actions.append(action)

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        """Put everything together."""
        state = self.start.state
        steps, observations, chunks, qpos = zip(*self._queries, strict=True)
        self.recording = EpisodeRecording(
            episode=replace(record),
            settings=self.settings,
            environment=moment.environment.options,
            center_crop=self.center_crop,
            control_rate_hz=self.control_rate_hz,
            policy=dict(self.policy),
            versions=collect_versions(),
            start_state=self.start.task.init_states[self.start.initial_state] if state is None else state,
            query_steps=np.array(steps),
            images={camera: np.stack([o[camera] for o in observations]) for camera in self.settings.cameras},
            states=np.stack([observation["state"] for observation in observations]),
            qpos=np.stack(qpos),
            chunks=np.stack([np.asarray(chunk.actions, np.float64) for chunk in chunks]),
            actions=np.stack(self._actions),
            kept=_stacked([chunk.kept for chunk in chunks]),
            picks=_stacked([chunk.picks for chunk in chunks]),
            scores=_stacked([chunk.scores for chunk in chunks]),
        )


def _stacked(rows: list[Any]) -> NDArray[Any] | None:
    return None if any(row is None for row in rows) else np.stack(rows)


def _plain(value: Any) -> Any:
    """For JSON: what it does not know itself."""
    return asdict(value) if isinstance(value, EpisodeRecord | RolloutSettings) else str(value)


def _read_header(path: Path, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """What is no array, with `episode` and `settings` as dataclasses. Raises ValueError for any header that is none."""
    header = read_header(path, arrays, (1, FORMAT_VERSION, OUTSIDE_VERSION))
    if header["format_version"] == OUTSIDE_VERSION:
        raise ValueError(
            f"{path} was recorded by a {header.get('source')}, which knows neither the simulator's start nor its "
            "positions, so it cannot be replayed; lightvla eval --record True writes records that can"
        )
    try:
        names = [*_HEADER, *(["num_visual_tokens"] if "kept" in arrays else [])]
        if missing := [name for name in names if name not in header]:
            raise ValueError(f"it lacks {missing}; it has {sorted(header)}")
        settings = {**header["settings"], "cameras": tuple(header["settings"]["cameras"])}
        header["episode"] = _dataclass_from(EpisodeRecord, header["episode"])
        header["settings"] = _dataclass_from(RolloutSettings, settings)
        _check_types(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise unusable_header(path, f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error
    return header


def _check_types(header: Mapping[str, Any]) -> None:
    """Raises ValueError for entries of other types than are written."""
    cameras, tokens, rate = header["settings"].cameras, header.get("num_visual_tokens", 1), header["control_rate_hz"]
    whole = (header["episode"].task_index, header["episode"].steps, header["settings"].open_loop_steps, tokens)
    fits = {
        **{name: isinstance(header[name], dict) for name in ("environment", "policy", "versions")},
        "cameras": bool(cameras) and all(isinstance(camera, str) for camera in cameras),
        "center_crop": isinstance(header["center_crop"], bool),
        "control_rate_hz": isinstance(rate, int | float) and 0 < rate < math.inf,
        "numbers of steps, tokens or the task": all(isinstance(number, int) and number >= 0 for number in whole),
        "suite or instruction": all(
            isinstance(getattr(header["episode"], key), str) for key in ("suite", "instruction")
        ),
    }
    if wrong := [name for name, right in fits.items() if not right]:
        raise ValueError(f"it has entries of another kind: {', '.join(wrong)}")


def _dataclass_from(kind: Any, content: Any) -> Any:
    """Raises TypeError for entries that are missing, and for anything but a dict."""
    if not isinstance(content, dict):
        raise TypeError(f"its {kind.__name__} is a {type(content).__name__}")
    if unknown := sorted(set(content) - {f.name for f in fields(kind)}):
        raise ValueError(f"unknown entries {unknown}: another version of this code wrote it")
    return kind(**content)
