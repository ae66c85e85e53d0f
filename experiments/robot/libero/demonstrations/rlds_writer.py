"""Episodes -> an RLDS dataset on disk, in the format of the published LIBERO datasets, with tensorflow-datasets."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

VERSION = "1.0.0"

Image = NDArray[np.uint8] | bytes
"""Pixels (H, W, 3) uint8, or the bytes of a JPEG file, which are stored as they are."""


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps.

    Attributes:
        images, wrist_images: T pictures each, rotated by 180 degrees as the published datasets are.
        states: (T, 8) end-effector position, axis-angle, finger positions.
        actions: (T, 7) in the simulator's convention (gripper -1 open, +1 close).
        language: the instruction.
        metadata: `file_path` says where the episode came from; other keys are not stored.
    """

    images: Sequence[Image]
    wrist_images: Sequence[Image]
    states: NDArray[Any]
    actions: NDArray[Any]
    language: str
    metadata: dict[str, str] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises ValueError where lengths or widths do not fit together."""
        steps = len(self.actions)
        if not steps or not len(self.images) == len(self.wrist_images) == len(self.states) == steps:
            raise ValueError(
                f"an episode needs as many images, wrist images and states as actions, and at least one; got "
                f"{len(self.images)}, {len(self.wrist_images)}, {len(self.states)}, {steps}"
            )
        if self.states.shape != (steps, 8) or self.actions.shape != (steps, 7):
            raise ValueError(
                f"expected states ({steps}, 8) and actions ({steps}, 7); got {self.states.shape}, {self.actions.shape}"
            )


def write_rlds(
    out_root: Path | str, dataset_name: str, episodes: Iterable[Episode], resolution: int, description: str = ""
) -> Path:
    """Writes `<out_root>/<dataset_name>/1.0.0`, replacing one that is there; returns that folder.

    The dataset appears under its name only when it is complete. TensorFlow runs in a process of its own: loaded beside
    Mesa's software renderer it crashes, because both bring an LLVM.

    Args:
        out_root: folder of datasets.
        dataset_name: lower case words and digits joined by underscores, as tensorflow-datasets wants them.
        episodes: consumed once, one at a time.
        resolution: side of the pictures in pixels.
        description: a sentence stored with the dataset.

    Raises:
        ValueError: for an unusable name, an episode whose parts do not fit together, or no episode at all.
        ModuleNotFoundError: when tensorflow-datasets is not installed; the message says how to install it.
        RuntimeError: when tensorflow-datasets fails; the message ends with its own.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", dataset_name):
        raise ValueError(
            f"{dataset_name!r} cannot name a dataset; use lower case words and digits joined by underscores, "
            "like 'libero_demo'"
        )
    for module in ("tensorflow", "tensorflow_datasets"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"writing RLDS needs {module}; run: pip install -e '.[rlds]'")
    episodes = iter(episodes)
    first = next(episodes, None)
    if first is None:
        raise ValueError(f"dataset {dataset_name!r} would have no episodes; nothing was written")
    out_root = Path(out_root)
    out_root.mkdir(parents=True, exist_ok=True)
    target = out_root / dataset_name / VERSION
    with tempfile.TemporaryDirectory(dir=out_root, prefix=f".{dataset_name}-incomplete-") as scratch:
        job = _Job(scratch, dataset_name, resolution, description)
        _write_in_child(job, itertools.chain([first], episodes))
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(exist_ok=True)
        os.replace(Path(scratch) / dataset_name / VERSION, target)
    return target


@dataclass(frozen=True)
class _Job:
    """What the process that has TensorFlow is told before the episodes come."""

    data_dir: str
    dataset_name: str
    resolution: int
    description: str


def _write_in_child(job: _Job, episodes: Iterable[Episode]) -> None:
    """Pickles the job, the episodes and a closing None to a process that runs `_write_from`."""
    code = f"import sys; from {__name__} import _write_from; _write_from(sys.stdin.buffer)"
    search_path = os.pathsep.join(filter(None, (str(Path(__file__).parents[4]), os.environ.get("PYTHONPATH"))))
    # Says nothing about optimisations that do not concern us; neither setting changes what is written.
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0", **os.environ, "PYTHONPATH": search_path}
    with (
        (Path(job.data_dir) / "log").open("w+") as log,
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env=environment
        ) as child,
    ):
        assert child.stdin is not None
        try:
            pickle.dump(job, child.stdin)
            for episode in episodes:
                episode.validate()
                pickle.dump(episode, child.stdin)
            pickle.dump(None, child.stdin)
            child.stdin.close()
        except BrokenPipeError:
            pass  # the child has ended early; its log says why
        except BaseException:
            child.kill()
            raise
        if child.wait() != 0:
            log.seek(0)
            raise RuntimeError(
                f"tensorflow-datasets could not write {job.dataset_name!r}: {log.read()[-2000:].strip()}"
            )


def _write_from(stream: BinaryIO) -> None:
    """Writes one dataset from what `_write_in_child` sends."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    tfds.disable_progress_bar()
    job: _Job = pickle.load(stream)
    _builder(tfds, job, iter(lambda: pickle.load(stream), None))(data_dir=job.data_dir).download_and_prepare(
        file_format="tfrecord"
    )


def _features(tfds: Any, resolution: int) -> Any:
    image = tfds.features.Image(shape=(resolution, resolution, 3), dtype=np.uint8, encoding_format="jpeg")
    step = {
        "observation": {
            "image": image,
            "wrist_image": image,
            "state": tfds.features.Tensor(shape=(8,), dtype=np.float32),
        },
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "discount": tfds.features.Scalar(dtype=np.float32),
        "reward": tfds.features.Scalar(dtype=np.float32),
        "is_first": tfds.features.Scalar(dtype=np.bool_),
        "is_last": tfds.features.Scalar(dtype=np.bool_),
        "is_terminal": tfds.features.Scalar(dtype=np.bool_),
        "language_instruction": tfds.features.Text(),
    }
    metadata = {"file_path": tfds.features.Text()}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})


def _builder(tfds: Any, job: _Job, episodes: Iterable[Episode]) -> Any:
    """A tensorflow-datasets builder class that generates from `episodes`."""

    def info(self: Any) -> Any:
        features = _features(tfds, job.resolution)
        return tfds.core.DatasetInfo(builder=self, description=job.description or job.dataset_name, features=features)

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def generate_examples(self: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, episode in enumerate(episodes):
            yield f"{number:06d}", _example(episode)

    parts = {
        "name": job.dataset_name,
        "VERSION": tfds.core.Version(VERSION),
        "__module__": __name__,
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": generate_examples,
    }
    return type("Builder", (tfds.core.GeneratorBasedBuilder,), parts, skip_registration=True)


def _example(episode: Episode) -> dict[str, Any]:
    last = len(episode.actions) - 1
    steps = [
        {
            "observation": {"image": image, "wrist_image": wrist_image, "state": state},
            "action": action,
            "discount": 1.0,
            "reward": float(step == last),
            "is_first": step == 0,
            "is_last": step == last,
            "is_terminal": step == last,
            "language_instruction": episode.language,
        }
        for step, (image, wrist_image, state, action) in enumerate(
            zip(
                episode.images,
                episode.wrist_images,
                np.asarray(episode.states, dtype=np.float32),
                np.asarray(episode.actions, dtype=np.float32),
                strict=True,
            )
        )
    ]
    return {"steps": steps, "episode_metadata": {"file_path": episode.metadata.get("file_path", "")}}
