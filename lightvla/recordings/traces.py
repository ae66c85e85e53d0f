"""Recorded episodes as what is drawn of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.robot.libero.rollouts.record import EpisodeRecording, load_any
from prismatic.pictures.trace import PruningTrace
from prismatic.recordings.archive import FOLDER
from prismatic.recordings.recording import Recording


def record_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves; of a folder its `.npz` files, or those in its folder `records`.

    Raises:
        FileNotFoundError: for a path that does not exist, or a folder without any.
    """
    files: list[Path] = []
    for path in paths:
        found = [path] if path.is_file() else sorted(path.glob("*.npz")) or sorted((path / FOLDER).glob("*.npz"))
        if not found:
            raise FileNotFoundError(
                f"--record {path}: no recorded episode there; lightvla eval --record True writes {FOLDER}/*.npz"
            )
        files += found
    return files


def record_traces(paths: Sequence[Path]) -> Iterator[tuple[str, PruningTrace]]:
    """Recorded episodes, each read when it is asked for, by the names of their files, each name once.

    Raises:
        ValueError: as `load_any`, and for one without kept tokens.
        FileNotFoundError: as `record_files`.
    """
    names: set[str] = set()
    files = record_files(paths)
    for path in files:
        numbered = (f"{path.stem}-{number}" for number in range(1, len(files)))
        name = next(name for name in (path.stem, *numbered) if name not in names)
        names.add(name)
        yield name, trace_of(load_any(path), path)


def trace_of(recording: Recording | EpisodeRecording, path: Path) -> PruningTrace:
    """Raises ValueError for one without kept tokens."""
    if recording.kept is None:
        raise ValueError(f"{path}: the recorded agent did not say which tokens it kept; nothing can be drawn")
    if isinstance(recording, EpisodeRecording):
        episode, seen = recording.episode, recording.seen_from_outside()
        start, source = f"initial state {episode.initial_state}, trial {episode.trial}", source_text(recording)
    else:
        seen, start = recording, f"session {recording.session}" if recording.session else ""
        source = _policy_name(recording.policy)
    steps, unit, rate = _steps(seen)
    return PruningTrace(
        title=seen.instruction,
        cameras=tuple(seen.images),
        images=tuple(seen.images.values()),
        kept=recording.kept,
        steps=steps,
        center_crop=bool(seen.center_crop),
        control_rate_hz=rate,
        scores=seen.scores,
        success=seen.success,
        source=source,
        start=start,
        unit=unit,
    )


def _steps(seen: Recording) -> tuple[np.ndarray, str, float]:
    """When each policy query was, in which unit, and how many of that unit pass in a second.

    Where nobody has said how many steps were taken they are counted in queries, at the pace of the server's clock.
    """
    if seen.steps is not None and seen.control_rate_hz is not None:
        return seen.steps, "step", seen.control_rate_hz
    pause = float(np.median(np.diff(seen.times))) if seen.times is not None and len(seen) > 1 else 0.0
    return np.arange(len(seen)), "query", 1 / pause if pause > 0 else 1.0


def source_text(recording: EpisodeRecording) -> str:
    """Suite, control and policy."""
    episode = recording.episode
    control = f"control: {episode.control.replace('_', ' ')}" if episode.control != "none" else ""
    return " · ".join(filter(None, (episode.suite, control, _policy_name(recording.policy))))


def _policy_name(policy: dict) -> str:
    return policy_text(policy.get("checkpoint") or policy.get("policy_url"), policy.get("pruner"))


def policy_text(checkpoint: object, pruner: object) -> str:
    """`small (lightvla)`: the last part of a checkpoint's place, and its pruner."""
    name = Path(str(checkpoint)).name if checkpoint else "unnamed policy"
    return f"{name} ({pruner})" if pruner else name
