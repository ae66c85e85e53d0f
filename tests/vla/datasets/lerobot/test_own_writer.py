"""What lerobot's own code writes is read, as pictures and as video, and equals the RLDS that it was made of."""

import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lerobot_environment import PEER, lerobot_interpreter, own_environment

from prismatic.vla.datasets.catalog import LAYOUTS
from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.stored.index import DatasetIndex
from prismatic.vla.gripper import GRIPPERS

SPEC = replace(LAYOUTS["libero"], name="arm", map_actions=GRIPPERS["libero"])
FEATURES = {"full_image": "observation.images.image", "wrist_image": "observation.images.wrist_image"}


def written(config: pytest.Config, root: Path, index: RldsIndex, kind: str, codec: str = "h264") -> DatasetIndex:
    python = lerobot_interpreter(config)
    arrays: dict[str, np.ndarray] = {}
    for number, episode in enumerate(index.episodes):
        for camera, name in FEATURES.items():
            pictures = [episode.image(camera, step) for step in range(episode.num_frames)]
            arrays[f"{name}_{number}"] = np.stack(pictures)
        assert episode.state is not None
        arrays |= {f"observation.state_{number}": episode.state, f"action_{number}": episode.action}
        arrays[f"task_{number}"] = np.array(episode.instruction)
    np.savez(root / "episodes.npz", **arrays)
    command = [str(python), str(PEER), str(root / "episodes.npz"), str(root / "arm"), kind, codec]
    done = subprocess.run(command, capture_output=True, text=True, env=own_environment())
    assert done.returncode == 0, done.stderr[-2000:]
    found = open_dataset(root, "arm", SPEC)
    assert found.check_cameras(2) == tuple(FEATURES)
    for ours, theirs in zip(found.episodes, index.episodes, strict=True):
        np.testing.assert_array_equal(ours.state, theirs.state)
        np.testing.assert_array_equal(ours.action, theirs.action)
        assert ours.instructions == theirs.instructions
    return found


@pytest.mark.slow  # an environment is made
@pytest.mark.timeout(1800)
def test_pictures_are_equal(pytestconfig: pytest.Config, tmp_path: Path, tiny_index: RldsIndex) -> None:
    found = written(pytestconfig, tmp_path, tiny_index, "image")
    for ours, theirs in zip(found.episodes, tiny_index.episodes, strict=True):
        for camera in FEATURES:
            for step in range(theirs.num_frames):
                np.testing.assert_array_equal(ours.image(camera, step), theirs.image(camera, step))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("codec", ["h264", "libsvtav1"])
def test_frames_of_a_video_are_the_right_ones(
    pytestconfig: pytest.Config, tmp_path: Path, tiny_index: RldsIndex, codec: str
) -> None:
    """lerobot's codecs lose a little (crf 30, half the resolution of colour): each frame is nearest to its own."""
    found = written(pytestconfig, tmp_path, tiny_index, "video", codec)
    errors = []
    for number, ours in enumerate(found.episodes):
        for camera in FEATURES:
            theirs = np.stack(
                [tiny_index.episodes[number].image(camera, step) for step in range(ours.num_frames)]
            ).astype(np.float32)
            for step in np.random.default_rng(number).permutation(ours.num_frames).tolist():
                distance = np.abs(ours.image(camera, step) - theirs).mean(axis=(1, 2, 3))
                assert int(distance.argmin()) == step
                errors.append(distance[step])
    assert np.mean(errors) < 8 and max(errors) < 16  # of 255
