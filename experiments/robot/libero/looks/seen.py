"""What was seen in one rollout, on disk: per policy query the phase, the kept tokens and what each patch showed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.looks.phases import Carried
from experiments.robot.libero.results.results import EpisodeRecord
from prismatic.atomic_files import replacing
from prismatic.recordings.archive import differences, undone

FOLDER = "looks"
"""Where a rollout's file lies in its evaluation's folder."""
_ARRAYS = ("steps", "phases", "kept", "blanked", "pixels")


@dataclass
class Seen:
    """One rollout of L policy queries over I cameras with V tokens.

    Attributes:
        cameras: observation keys, in the tokens' order.
        names: per predicate of the goal, what is moved and where it goes.
        carried: likewise how far the episode came with it; empty in files of before it was noted.
        steps: (L,) control steps before each query.
        phases: (L,) index into `phases.PHASES`.
        kept: (L, V) bool, the tokens that stayed.
        blanked: (L, V) bool, those of them whose content was replaced.
        pixels: (L, V, classes) pixels of each class on each patch.
        images: per camera (L, H, W, 3) uint8, as the policy was given them; empty where none were to be kept.
        classes: per camera (L, H, W) uint8, the class of every pixel; empty likewise.
        actions_sha256: of the rollout, to tell a file of another one.
    """

    cameras: tuple[str, ...]
    names: list[tuple[str, str]]
    steps: NDArray[np.int64]
    phases: NDArray[np.int64]
    kept: NDArray[np.bool_]
    blanked: NDArray[np.bool_]
    pixels: NDArray[np.int64]
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    classes: list[NDArray[np.uint8]] = field(default_factory=list)
    carried: list[Carried | None] = field(default_factory=list)
    actions_sha256: str | None = None

    def per_camera(self, values: NDArray) -> NDArray:
        """(L, V, ...) -> (I, L, V / I, ...)."""
        return np.stack(np.split(values, len(self.cameras), axis=1))

    def save(self, path: Path) -> None:
        """Write atomically."""
        header = {
            "cameras": self.cameras,
            "names": self.names,
            "carried": [each and asdict(each) for each in self.carried],
            "actions_sha256": self.actions_sha256,
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["pixels"] = self.pixels.astype(np.uint16 if self.pixels.max() < 2**16 else np.uint32)
        for number, (images, classes) in enumerate(zip(self.images, self.classes, strict=True)):
            arrays |= {f"images_{number}": differences(images), f"classes_{number}": classes}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: Path) -> Seen:
        """Raises ValueError, naming the remedy, where there is none, or a damaged one."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(str(arrays["header"]))
                found = {name: arrays[name] for name in _ARRAYS}
                pictured = [number for number in range(len(header["cameras"])) if f"images_{number}" in arrays]
                images = [undone(arrays[f"images_{number}"]) for number in pictured]
                classes = [arrays[f"classes_{number}"] for number in pictured]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); remove {path.parents[1]} and run the same command again"
            ) from error
        found["pixels"] = found["pixels"].astype(np.int64)
        names = [(str(target), str(goal)) for target, goal in header["names"]]
        cameras, digest = tuple(header["cameras"]), header["actions_sha256"]
        carried = carried_from(header.get("carried", []))
        return cls(cameras, names, **found, images=images, classes=classes, carried=carried, actions_sha256=digest)


def carried_from(content: Sequence[dict[str, Any] | None]) -> list[Carried | None]:
    """What `dataclasses.asdict` made of each."""
    return [
        None if each is None else Carried(**{**each, "apart": each["apart"] and tuple(each["apart"])})
        for each in content
    ]


def read_all(folder: Path, episodes: Sequence[EpisodeRecord], several_suites: bool) -> list[tuple[EpisodeRecord, Seen]]:
    """What was seen in the valid rollouts of an evaluation's folder; raises ValueError where a file is not theirs."""
    found = []
    for record in episodes:
        if record.invalid is not None:
            continue
        path = folder / FOLDER / f"{record.suite + '_' if several_suites else ''}{record.file_stem}.npz"
        seen = Seen.load(path)
        if seen.actions_sha256 != record.actions_sha256:
            raise ValueError(f"{path} is of another rollout than results.json has; remove {folder} and run again")
        found.append((record, seen))
    return found
