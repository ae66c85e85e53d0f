"""A tiny RLDS dataset on disk, written the way collected demonstrations are."""

from pathlib import Path

import numpy as np
from tensorflow_process import TensorFlow, write_shard

from experiments.robot.libero.rlds_writer import Episode, write_rlds
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
