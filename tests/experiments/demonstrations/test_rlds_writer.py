"""The RLDS writer against tensorflow-datasets' own reader."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorflow_process import INSTALLED, TensorFlow, read_rlds

from experiments.robot.libero.demonstrations.rlds_writer import Episode, write_rlds

pytestmark = pytest.mark.skipif(not INSTALLED, reason="TensorFlow or tensorflow-datasets is not installed")

SIZE = 32


def make_episode(seed: int, steps: int = 10, encoded: bool = False) -> Episode:
    rng = np.random.default_rng(seed)
    pictures = np.repeat(np.repeat(rng.integers(0, 256, (2, steps, 4, 4, 3), dtype=np.uint8), 8, axis=2), 8, axis=3)
    images = [[to_jpeg(picture) for picture in camera] for camera in pictures] if encoded else list(pictures)
    states, actions = rng.normal(size=(steps, 8)), rng.normal(size=(steps, 7))
    return Episode(images[0], images[1], states, actions, f"task {seed}", {"file_path": f"demo/{seed}"})


def to_jpeg(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def test_what_is_written_is_read_back_in_the_published_format(tensorflow: TensorFlow, tmp_path: Path) -> None:
    written = [make_episode(seed, steps=10 + seed) for seed in range(3)]
    folder = write_rlds(tmp_path / "data", "libero_tiny", iter(written), SIZE)

    assert folder == tmp_path / "data" / "libero_tiny" / "1.0.0"
    assert {path.name for path in folder.iterdir()} >= {"features.json", "dataset_info.json"}
    assert list(folder.glob("libero_tiny-train.tfrecord-*"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["libero_tiny"]
    episodes = sorted(tensorflow(read_rlds, folder), key=lambda episode: episode["path"])
    for episode, found in zip(written, episodes, strict=True):
        steps = found["steps"]
        assert found["path"] == episode.metadata["file_path"]
        assert len(steps) == len(episode.actions)
        assert {step["language_instruction"].decode() for step in steps} == {episode.language}
        np.testing.assert_array_equal([step["action"] for step in steps], episode.actions.astype(np.float32))
        states = [step["observation"]["state"] for step in steps]
        np.testing.assert_array_equal(states, episode.states.astype(np.float32))
        pictures = np.stack([step["observation"]["wrist_image"] for step in steps]).astype(int)
        assert np.abs(pictures - np.stack(episode.wrist_images)).mean() < 8
        assert [step["is_first"] for step in steps] == [True] + [False] * (len(steps) - 1)
        assert [step["is_last"] for step in steps] == [False] * (len(steps) - 1) + [True]


def test_jpeg_bytes_are_stored_as_they_are_and_an_old_dataset_is_replaced(tmp_path: Path) -> None:
    old = tmp_path / "data" / "libero_tiny" / "1.0.0" / "libero_tiny-train.tfrecord-00007-of-00008"
    old.parent.mkdir(parents=True)
    old.touch()
    episode = make_episode(0, encoded=True)
    folder = write_rlds(tmp_path / "data", "libero_tiny", [episode], SIZE)
    stored = b"".join(path.read_bytes() for path in folder.glob("*.tfrecord-*"))
    assert all(image in stored for image in (*episode.images, *episode.wrist_images))
    assert not old.exists()


def test_a_failure_leaves_the_old_dataset(tmp_path: Path) -> None:
    old = tmp_path / "libero_tiny" / "1.0.0" / "features.json"
    old.parent.mkdir(parents=True)
    old.touch()

    def interrupted() -> Iterator[Episode]:
        yield make_episode(3)
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match="would have no episodes"):
        write_rlds(tmp_path, "libero_tiny", [], SIZE)
    with pytest.raises(KeyboardInterrupt):
        write_rlds(tmp_path, "libero_tiny", interrupted(), SIZE)
    with pytest.raises(RuntimeError, match="could not write 'libero_tiny'"):
        write_rlds(tmp_path, "libero_tiny", [make_episode(4)], SIZE * 2)  # the pictures have another size
    assert old.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["libero_tiny"]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot name a dataset"):
        write_rlds(tmp_path / "data", "Libero-Tiny", [make_episode(0)], SIZE)
    good = make_episode(0)
    short = Episode(good.images, good.wrist_images[:-1], good.states, good.actions, "x")
    with pytest.raises(ValueError, match="as many images"):
        write_rlds(tmp_path / "data", "libero_tiny", [short], SIZE)
    narrow = Episode(good.images, good.wrist_images, good.states[:, :7], good.actions, "x")
    with pytest.raises(ValueError, match=r"expected states \(10, 8\)"):
        write_rlds(tmp_path / "data", "libero_tiny", [narrow], SIZE)
