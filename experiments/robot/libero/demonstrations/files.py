"""Demonstrations with pictures, one file each: what a simulator process hands to whoever writes the dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from experiments.robot.libero.demonstrations.demonstration import Recording, segments
from experiments.robot.libero.demonstrations.rlds_writer import Episode
from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnvironment
from prismatic.atomic_files import replacing
from prismatic.vla.images import encode_jpeg


def save_demonstration(environment: LiberoEnvironment, recording: Recording, file: Path, source: str = "") -> None:
    """Draws a recording's segments as JPEG and writes them to a `.npz` file, which appears only when it is complete.

    The environment must not have been reset since the recording.

    Args:
        source: what is stored as where it came from; default: the task and the file's name.
    """
    kept = segments(recording.wanted)
    steps = np.concatenate([np.arange(part.start, part.stop) for part in kept])
    pictures: dict[str, list[bytes]] = {camera: [] for camera in CAMERAS}
    for step in steps:
        environment.restore(recording.qpos[step])
        for camera in CAMERAS:
            pictures[camera].append(encode_jpeg(environment.frame(camera)))
    arrays = {
        "lengths": np.array([part.stop - part.start for part in kept]),
        "states": recording.states[steps],
        "actions": recording.actions[steps],
        "language": np.array(environment.task.language),
        "source": np.array(source or f"{environment.task.suite}/{environment.task.name}/{file.stem}"),
    }
    for camera, encoded in pictures.items():
        arrays[camera] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        arrays[f"{camera}_sizes"] = np.array([len(picture) for picture in encoded])
    with replacing(file) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def load_episodes(file: Path) -> Iterator[Episode]:
    """Reads a saved demonstration back, one RLDS episode per segment."""
    with np.load(file, allow_pickle=False) as stored:
        arrays = dict(stored)
    pictures = {camera: _split(arrays[camera].tobytes(), arrays[f"{camera}_sizes"]) for camera in CAMERAS}
    start = 0
    for number, length in enumerate(arrays["lengths"].tolist()):
        part = slice(start, start + length)
        yield Episode(
            images=pictures["full_image"][part],
            wrist_images=pictures["wrist_image"][part],
            states=arrays["states"][part],
            actions=arrays["actions"][part],
            language=str(arrays["language"]),
            metadata={"file_path": f"{arrays['source']}/segment{number}"},
        )
        start += length


def _split(data: bytes, sizes: np.ndarray) -> list[bytes]:
    ends = np.cumsum(sizes).tolist()
    return [data[end - size : end] for end, size in zip(ends, sizes.tolist(), strict=True)]
