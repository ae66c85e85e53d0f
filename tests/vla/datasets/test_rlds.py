"""The frame index against tensorflow-datasets reading the same shards, and its errors."""

import multiprocessing
import os
import pickle
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
from tensorflow_process import TensorFlow, read_rlds, write_shard

from prismatic.vla.datasets.catalog import get_dataset_spec
from prismatic.vla.datasets.rlds import RldsIndex, ShardFiles
from prismatic.vla.images import decode_jpeg, encode_jpeg

NAME = "libero_tiny_no_noops"


@pytest.fixture
def copied_root(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(tiny_root / NAME, tmp_path / NAME)
    return tmp_path


def only_shard(root: Path) -> Path:
    (shard,) = (root / NAME / "1.0.0").glob("*.tfrecord*")
    return shard


def test_equals_what_tensorflow_datasets_reads(tensorflow: TensorFlow, tiny_root: Path, tiny_index: RldsIndex) -> None:
    theirs = [episode["steps"] for episode in tensorflow(read_rlds, tiny_root / NAME / "1.0.0")]
    assert len(tiny_index.episodes) == len(theirs) == 3
    for ours, steps in zip(tiny_index.episodes, theirs, strict=True):
        assert ours.num_frames == len(steps) and ours.split == "train"
        assert ours.instruction == steps[0]["language_instruction"].decode()
        np.testing.assert_array_equal(ours.action, np.stack([step["action"] for step in steps]))
        assert ours.state is not None
        np.testing.assert_array_equal(ours.state, np.stack([step["observation"]["state"] for step in steps]))
        for camera, key in (("full_image", "image"), ("wrist_image", "wrist_image")):
            for t in (0, len(steps) - 1):
                np.testing.assert_array_equal(decode_jpeg(ours.image_bytes(camera, t)), steps[t]["observation"][key])


def test_another_process_reads_the_same_bytes_from_the_pickled_index(tiny_index: RldsIndex) -> None:
    episode = tiny_index.episodes[2]
    here = episode.image_bytes("wrist_image", 5)
    pickled = pickle.dumps(tiny_index)
    assert len(pickled) < episode.shards.paths[0].stat().st_size / 5  # no file contents travel along
    assert pickle.loads(pickled).episodes[2].image_bytes("wrist_image", 5) == here
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(methodcaller("image_bytes", "wrist_image", 5), episode).result(timeout=60) == here


def test_no_more_shards_stay_open_than_a_process_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[ShardFiles.__module__], "MAX_OPEN_SHARDS", 4)
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode() * 3)
    shards, descriptors = ShardFiles(paths), len(os.listdir("/proc/self/fd"))
    for number in [*range(20), *range(20)]:
        assert shards.bytes_of(number)[:] == str(number).encode() * 3
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 4


def test_several_shards_splits_and_versions(copied_root: Path, tiny_index: RldsIndex) -> None:
    shard = only_shard(copied_root)
    data, ends = shard.read_bytes(), [0]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 16 + int.from_bytes(data[ends[-1] : ends[-1] + 8], "little"))
    newer = shard.parents[1] / "1.10.0"
    newer.mkdir()
    (newer / f"{NAME}-train.tfrecord-00000-of-00002").write_bytes(data[: ends[1]])
    (newer / f"{NAME}-train.tfrecord-00001-of-00002").write_bytes(data[ends[1] : ends[2]])
    (newer / f"{NAME}-val.tfrecord-00000-of-00001").write_bytes(data[ends[2] :])
    index = RldsIndex.open(copied_root, NAME)
    assert index.directory == newer
    assert index.numbers_of("train") == [0, 1] and index.numbers_of("val") == [2]
    for ours, original in zip(index.episodes, tiny_index.episodes, strict=True):
        np.testing.assert_array_equal(ours.action, original.action)
        assert ours.image_bytes("full_image", 3) == original.image_bytes("full_image", 3)
    (newer / f"{NAME}-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="train.tfrecord-00001-of-00002 is missing"):
        RldsIndex.open(copied_root, NAME)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 5000])
def test_a_cut_off_shard_is_named_with_its_byte(copied_root: Path, tiny_index: RldsIndex, cut: int) -> None:
    shard = only_shard(copied_root)
    data = shard.read_bytes()
    shard.write_bytes(data[:-cut])
    first = int(tiny_index.episodes[2].image_ranges["full_image"][0, 0])
    with pytest.raises(ValueError, match="is cut off: the record that starts at byte") as error:
        RldsIndex.open(copied_root, NAME)
    assert str(shard) in str(error.value) and f"file's end at byte {len(data) - cut}." in str(error.value)
    start = int(str(error.value).split("starts at byte ")[1].split()[0])
    assert 0 < start < first


def test_a_shard_cut_within_the_header_of_a_record_or_empty(copied_root: Path) -> None:
    shard = only_shard(copied_root)
    data = shard.read_bytes()
    second = 16 + int.from_bytes(data[:8], "little")
    shard.write_bytes(data[: second + 7])
    with pytest.raises(ValueError, match=f"starts at byte {second} "):
        RldsIndex.open(copied_root, NAME)
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match="cut off at byte 0"):
        RldsIndex.open(copied_root, NAME)


def test_a_damaged_shard_is_named_with_its_byte(copied_root: Path) -> None:
    shard = only_shard(copied_root)
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="no TFRecord starts at byte 0"):
        RldsIndex.open(copied_root, NAME)
    data[3] ^= 1
    data[12:40] = b"\xff" * 28
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="the record at byte 0 is no tf.train.Example"):
        RldsIndex.open(copied_root, NAME)


def test_missing_folders_and_shards_say_what_is_there(copied_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data folder .*nowhere does not exist"):
        RldsIndex.open(copied_root / "nowhere", NAME)
    with pytest.raises(FileNotFoundError, match=f"libero_goal_no_noops; .* holds {NAME}"):
        RldsIndex.open(copied_root, "libero_goal_no_noops")
    only_shard(copied_root).unlink()
    with pytest.raises(FileNotFoundError, match="has no shards .* it holds dataset_info.json"):
        RldsIndex.open(copied_root, NAME)


def episode_features(steps: int = 9) -> dict[str, list]:
    return {
        "steps/observation/image": [b"jpeg"] * steps,
        "steps/observation/wrist_image": [b"jpeg"] * steps,
        "steps/observation/state": [0.5] * steps * 8,
        "steps/action": [0.25] * steps * 7,
        "steps/language_instruction": [b"stack the blocks"] * steps,
        "steps/is_first": [1] + [0] * (steps - 1),
    }


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        ("steps/observation/state", [0.5] * 9 * 7, ["state", "7 values per step", "'libero' needs 8"]),
        ("steps/action", [0.5] * 9 * 14, ["action", "14 values per step", "needs 7"]),
        ("steps/action", None, ["lacks 'steps/action'", "steps/observation/image"]),
        ("steps/action", [1] * 63, ["'steps/action' does not hold floats", "byte 0"]),
        ("steps/observation/state", [float("nan")] * 72, ["NaN"]),
        ("steps/observation/image", [b"jpeg"] * 8, ["8 images", "full_image", "9 steps"]),
    ],
)
def test_features_that_do_not_fit_are_named(
    tensorflow: TensorFlow, tmp_path: Path, key: str, values: list | None, words: list[str]
) -> None:
    features = episode_features()
    del features[key]
    if values is not None:
        features[key] = values
    tensorflow(write_shard, tmp_path / NAME / "1.0.0" / f"{NAME}-train.tfrecord-00000-of-00001", features)
    with pytest.raises(ValueError) as error:
        RldsIndex.open(tmp_path, NAME)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_missing_camera_matters_only_when_it_is_wanted(tensorflow: TensorFlow, tmp_path: Path) -> None:
    features = episode_features()
    del features["steps/observation/wrist_image"]
    tensorflow(write_shard, tmp_path / NAME / "1.0.0" / f"{NAME}-train.tfrecord-00000-of-00001", features)
    index = RldsIndex.open(tmp_path, NAME)
    assert index.check_cameras(1) == ("full_image",)
    with pytest.raises(ValueError, match="lacks 'steps/observation/wrist_image'.*it has .*steps/observation/image"):
        index.check_cameras(2)
    with pytest.raises(ValueError, match="cannot serve 3 images"):
        get_dataset_spec(NAME).camera_keys(3)


def test_bridge_loses_its_first_and_last_step_and_episodes_without_a_sentence(
    tensorflow: TensorFlow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (6, 16, 16, 3), np.uint8)
    states, actions = rng.normal(size=(6, 7)).astype(np.float32), rng.uniform(size=(6, 7)).astype(np.float32)
    for number, sentence in enumerate((b"put the pot on the towel", b"")):
        features = {
            "steps/observation/image_0": [encode_jpeg(picture) for picture in pictures],
            "steps/observation/state": states.ravel().tolist(),
            "steps/action": actions.ravel().tolist(),
            "steps/language_instruction": [sentence] * 6,
        }
        shard = f"bridge_orig-train.tfrecord-0000{number}-of-00002"
        tensorflow(write_shard, tmp_path / "bridge_orig" / "1.0.0" / shard, features)
    index = RldsIndex.open(tmp_path, "bridge_orig")
    assert "1 episodes without an instruction are left out" in caplog.text
    (episode,) = index.episodes
    assert episode.num_frames == 4 and index.spec.robot.name == "bridge"
    assert episode.state is not None
    np.testing.assert_array_equal(episode.state, states[1:5])
    np.testing.assert_allclose(episode.action[:, :6], states[2:, :6] - states[1:5, :6], atol=1e-6)
    for step in range(4):
        np.testing.assert_array_equal(
            decode_jpeg(episode.image_bytes("full_image", step)), decode_jpeg(encode_jpeg(pictures[step + 1]))
        )
