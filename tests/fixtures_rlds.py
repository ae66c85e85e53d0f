"""Tiny RLDS datasets on disk: written the way collected demonstrations are, or by hand where no writer makes such."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorflow_process import TensorFlow, write_shard

from experiments.robot.libero.demonstrations.rlds_writer import Episode, write_rlds
from prismatic.vla.datasets.crc32c import masked_crc32c
from prismatic.vla.images import encode_jpeg

INSTRUCTIONS = ("Put the bowl on the plate", "turn on the stove")


def tiny_episodes(episodes: int = 3, steps: int = 12, size: int = 64, seed: int = 0) -> list[Episode]:
    """Made-up episodes of `steps`, `steps + 1`, ... steps; drifting colour gradients, gripper -1 or +1."""
    return [_episode(number, steps + number, size, np.random.default_rng([seed, number])) for number in range(episodes)]


def _episode(number: int, steps: int, size: int, rng: np.random.Generator) -> Episode:
    def pictures() -> list[np.ndarray]:
        y, x, _ = np.mgrid[0:size, 0:size, 0:1] / size
        frequency, phase = rng.uniform(2, 9, (2, 3)), rng.uniform(0, 6, 3)
        waves = [np.sin(frequency[0] * x + frequency[1] * y + phase + 0.3 * step) for step in range(steps)]
        return [np.round(127.5 + 120 * wave).astype(np.uint8) for wave in waves]

    actions = rng.uniform(-1, 1, (steps, 7))
    actions[:, 6] = np.where(rng.uniform(size=steps) < 0.5, -1, 1)
    return Episode(
        images=pictures(),
        wrist_images=pictures(),
        states=rng.normal(size=(steps, 8)),
        actions=actions,
        language=INSTRUCTIONS[number % len(INSTRUCTIONS)],
        metadata={"file_path": f"tiny/{number}"},
    )


def write_tiny_rlds(
    root: Path, name: str = "libero_tiny_no_noops", episodes: int = 3, steps: int = 12, size: int = 64, seed: int = 0
) -> Path:
    """Write `tiny_episodes` as the dataset `<root>/<name>`; returns the folder of its shards."""
    return write_rlds(root, name, tiny_episodes(episodes, steps, size, seed), resolution=size)


def aloha_features(steps: int, size: int = 64, seed: int = 0) -> dict[str, list]:
    """One made-up episode of two arms as the features of an RLDS record: three cameras, state and action of 14."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(steps + 1, 14)).cumsum(0)
    features: dict[str, list] = {
        "steps/observation/state": states[:-1].ravel().tolist(),
        "steps/action": states[1:].ravel().tolist(),
        "steps/language_instruction": [b"Fold the towel"] * steps,
    }
    for camera in ("image", "left_wrist_image", "right_wrist_image"):
        pictures = rng.integers(0, 255, (steps, size // 8, size // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        features[f"steps/observation/{camera}"] = [encode_jpeg(picture) for picture in pictures]
    return features


def write_tiny_aloha(tensorflow: TensorFlow, root: Path, name: str, episodes: int = 2, steps: int = 30) -> Path:
    """Write `aloha_features` as the dataset `<root>/<name>`, a shard per episode; returns the folder of its shards."""
    folder = root / name / "1.0.0"
    for number in range(episodes):
        path = folder / f"{name}-train.tfrecord-{number:05d}-of-{episodes:05d}"
        tensorflow(write_shard, path, aloha_features(steps + number, seed=number))
    return folder


def hand_made(
    steps: int = 12, seed: int = 0, gripper: Sequence[float] = (-1, 1), image_format: str = "JPEG", state_dim: int = 8
) -> dict[str, Any]:
    """Features of one episode in LIBERO's layout; the gripper takes the two given values in turns of three steps."""
    rng = np.random.default_rng([seed, steps])
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 6] = [gripper[step // 3 % 2] for step in range(steps)]
    features: dict[str, Any] = {"steps/action": actions, "steps/language_instruction": [b"Stack the blocks"] * steps}
    if state_dim:
        features["steps/observation/state"] = rng.normal(size=(steps, state_dim)).astype(np.float32)
    for camera in ("image", "wrist_image"):
        pictures = rng.integers(0, 255, (steps, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        features[f"steps/observation/{camera}"] = [encoded(picture, image_format) for picture in pictures]
    return features


def encoded(picture: np.ndarray, image_format: str) -> bytes:
    """A picture as a file of that format."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, image_format)
    return buffer.getvalue()


def write_by_hand(root: Path, name: str, **splits: Sequence[dict[str, Any]]) -> Path:
    """Write episodes (features by name: lists of bytes, or arrays) as `<root>/<name>/1.0.0`, a shard per split.

    Returns the folder of the shards.
    """
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    for split, episodes in splits.items():
        path = folder / f"{name}-{split}.tfrecord-00000-of-00001"
        path.write_bytes(b"".join(_record(_example(episode)) for episode in episodes))
    return folder


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + bytes(4)


def _example(features: dict[str, Any]) -> bytes:
    entries = [_field(1, _field(1, name.encode()) + _field(2, _values(value))) for name, value in features.items()]
    return _field(1, b"".join(entries))


def _values(values: Any) -> bytes:
    """`tf.train.Feature`: field 1 byte strings, 2 floats, 3 integers, the numbers packed."""
    if not isinstance(values, np.ndarray):
        return _field(1, b"".join(_field(1, value) for value in values))
    if values.dtype.kind == "f":
        return _field(2, _field(1, values.astype("<f4").tobytes()))
    return _field(3, _field(1, b"".join(_varint(int(value) % (1 << 64)) for value in values.ravel())))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    low = value & 127
    return bytes([low]) if value < 128 else bytes([low | 128]) + _varint(value >> 7)
