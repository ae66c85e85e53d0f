"""The frame index against tensorflow-datasets reading the same shards, and its errors."""

import multiprocessing
import pickle
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest
from fixtures_rlds import encoded, hand_made, write_by_hand
from tensorflow_process import TensorFlow, read_rlds, write_shard

from prismatic.vla.datasets.catalog import get_dataset_spec
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.gripper import GRIPPERS
from prismatic.vla.images import decode_jpeg, encode_jpeg

NAME = "libero_tiny_no_noops"


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


GREY_JPEG = encoded(np.full((16, 16), 90, np.uint8), "JPEG")


def episode_features(steps: int = 9) -> dict[str, list]:
    return {
        "steps/observation/image": [GREY_JPEG] * steps,
        "steps/observation/wrist_image": [GREY_JPEG] * steps,
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
        ("steps/action", [1] * 63, ["'steps/action' holds integers, not floats", "byte 0", "dtype=np.float32"]),
        ("steps/action", [b"raw"] * 9, ["'steps/action' holds byte strings", "Write the dataset without `encoding`"]),
        ("steps/observation/state", [b"raw"] * 9, ["holds byte strings", "or train with --use_proprio False"]),
        ("steps/observation/state", None, ["lacks 'steps/observation/state'", "or train with --use_proprio False"]),
        ("steps/language_instruction", [1] * 9, ["'steps/language_instruction' holds integers", "expected text"]),
        (
            "steps/language_instruction",
            [b"a"] * 7 + [b"caf\xe9"] * 2,
            ["not written in UTF-8", "episode 0 of", "00001"],
        ),
        ("steps/observation/state", [float("nan")] * 72, ["NaN"]),
        ("steps/observation/image", [GREY_JPEG] * 8, ["8 images", "full_image", "9 steps"]),
        ("steps/language_instruction", [b"go"] * 5, ["5 sentences in 'steps/language_instruction' for 9 steps"]),
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
    assert "1 of 2 episodes without an instruction are left out" in caplog.text
    (episode,) = index.episodes
    assert episode.num_frames == 4 and index.spec.robot.name == "bridge"
    assert episode.state is not None
    np.testing.assert_array_equal(episode.state, states[1:5])
    np.testing.assert_allclose(episode.action[:, :6], states[2:, :6] - states[1:5, :6], atol=1e-6)
    for step in range(4):
        np.testing.assert_array_equal(
            decode_jpeg(episode.image_bytes("full_image", step)), decode_jpeg(encode_jpeg(pictures[step + 1]))
        )


@pytest.mark.parametrize("width", [0, 7, 10, 15])
def test_a_state_that_is_not_used_is_not_read(tmp_path: Path, width: int) -> None:
    write_by_hand(tmp_path, NAME, train=[hand_made(state_dim=width)])
    (episode,) = RldsIndex.open(tmp_path, NAME, use_state=False).episodes
    assert episode.state is None and episode.num_frames == 12
    with pytest.raises(ValueError, match="steps/observation/state.*or train with --use_proprio False"):
        RldsIndex.open(tmp_path, NAME)


def test_a_state_that_cannot_be_read_matters_only_where_it_is_used(tmp_path: Path) -> None:
    features = hand_made()
    for odd in (np.full(96, np.nan, np.float32), [b"raw"] * 12):
        write_by_hand(tmp_path, NAME, train=[{**features, "steps/observation/state": odd}])
        assert len(RldsIndex.open(tmp_path, NAME, use_state=False).episodes) == 1
        with pytest.raises(ValueError, match="steps/observation/state"):
            RldsIndex.open(tmp_path, NAME)


def test_every_step_has_its_own_sentence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changing = [b"reach for the cup"] * 4 + [b" "] * 3 + ["lift the \u676f".encode()] * 5
    episodes = [{**hand_made(), "steps/language_instruction": words} for words in (changing, [b""] * 12, [b"wipe"])]
    write_by_hand(tmp_path, NAME, train=episodes)
    index = RldsIndex.open(tmp_path, NAME)
    first, last = index.episodes
    assert first.instructions == ("reach for the cup",) * 4 + ("",) * 3 + ("lift the \u676f",) * 5
    assert first.instruction == "reach for the cup"
    assert first.chunk_starts(8).tolist() == [0, 1, 2, 3] and first.chunk_starts(5).tolist() == [0, 1, 2, 3, 7]
    assert last.instructions == ("wipe",) * 12, "one sentence stands for the whole episode"
    assert "1 of 3 episodes without an instruction are left out" in caplog.text
    assert "3 frames without an instruction are left out (episodes: 1)" in caplog.text
    write_by_hand(tmp_path, NAME, train=episodes[1:2])
    with pytest.raises(
        ValueError, match="none of the 1 episodes .* has an instruction in 'steps/language_instruction'"
    ):
        RldsIndex.open(tmp_path, NAME)


def test_steps_are_counted_by_the_actions_where_nothing_else_tells(tmp_path: Path) -> None:
    features = {**hand_made(), "steps/language_instruction": [b"wipe"]}
    missing = {name: values for name, values in features.items() if "image" not in name}
    tensors = {name: np.zeros(12 * 192, np.int64) if "image" in name else values for name, values in features.items()}
    for odd, words in ((missing, "lacks 'steps/observation/image'"), (tensors, "pictures stored as tensors")):
        write_by_hand(tmp_path, NAME, train=[odd])
        index = RldsIndex.open(tmp_path, NAME)
        assert index.episodes[0].instructions == ("wipe",) * 12
        with pytest.raises(ValueError, match=words):
            index.check_cameras(1)


def test_zero_bytes_are_no_words_and_written_bytes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    padded, empty = [b"wipe it\0\0"] * 12, [b"\0" * 12] * 12
    for words, expected in ((padded, "wipe it"), ([b"b'wipe it'"] * 12, "b'wipe it'")):
        episodes = [{**hand_made(), "steps/language_instruction": some} for some in (words, empty)]
        write_by_hand(tmp_path, NAME, train=episodes)
        caplog.clear()
        (episode,) = RldsIndex.open(tmp_path, NAME).episodes
        assert episode.instructions == (expected,) * 12
        assert "1 of 2 episodes without an instruction are left out" in caplog.text
        assert ("written by str(); write them with .decode()" in caplog.text) == expected.startswith("b'")


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        ([b""] * 12, "an empty string at step 0 .episode 0 of .*tfrecord-00000-of-00001"),
        (
            [encoded(np.zeros((8, 8), np.uint8), "PNG")] * 11 + [zlib.compress(bytes(99))],
            "zlib-compressed bytes at step 11",
        ),
        ([encoded(np.zeros((8, 8), np.uint8), "GIF")] * 12, "holds GIF at step 0"),
        ([bytes(192)] * 12, "no encoded picture"),
        (np.zeros(12 * 192, np.int64), "holds integers, not byte strings .*: pictures stored as tensors"),
        (np.zeros(12 * 192, np.float32), "holds floats, not byte strings"),
    ],
)
def test_pictures_of_another_kind_are_named_where_they_are_wanted(
    tmp_path: Path, pictures: list[bytes] | np.ndarray, words: str
) -> None:
    write_by_hand(tmp_path, NAME, train=[{**hand_made(), "steps/observation/wrist_image": pictures}])
    index = RldsIndex.open(tmp_path, NAME)
    assert index.check_cameras(1) == ("full_image",)
    with pytest.raises(ValueError, match=rf"'steps/observation/wrist_image'.*{words}.*tfds.features.Image"):
        index.check_cameras(2)


def test_a_first_picture_that_cannot_be_decoded_is_said_at_once(tmp_path: Path) -> None:
    features = hand_made(image_format="PNG")
    features["steps/observation/wrist_image"][0] = features["steps/observation/wrist_image"][0][:60]
    write_by_hand(tmp_path, NAME, train=[features])
    with pytest.raises(ValueError, match="'wrist_image' at byte .*step 0.*cannot decode 60 bytes as PNG"):
        RldsIndex.open(tmp_path, NAME).check_cameras(2)


def test_encodings_may_be_mixed_within_an_episode(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (16, 16, 3), np.uint8) for _ in range(12)]
    stored = [encoded(picture, "JPEG" if step % 2 else "PNG") for step, picture in enumerate(pictures)]
    write_by_hand(tmp_path, NAME, train=[{**hand_made(), "steps/observation/image": stored}])
    index = RldsIndex.open(tmp_path, NAME)
    assert index.check_cameras(2) == ("full_image", "wrist_image")
    for step in range(12):
        expected = decode_jpeg(stored[step]) if step % 2 else pictures[step]
        np.testing.assert_array_equal(index.episodes[0].image("full_image", step), expected)


def test_the_gripper_is_compared_with_what_is_said_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_by_hand(tmp_path, "franka", train=[hand_made(12, gripper=(1, 0)), hand_made(15, gripper=(1, 0))])

    def check(name: str, *said: str) -> str:
        caplog.clear()
        RldsIndex.open(tmp_path, name, get_dataset_spec(name, *said)).with_checked_gripper()
        return caplog.text

    with pytest.raises(ValueError, match="dataset 'franka', robot 'libero': nothing says how .* Pass --gripper open1"):
        check("franka", "libero")
    with pytest.raises(ValueError, match="'libero' means -1 to 1. Pass --gripper open1 where 0 is closed or"):
        check("franka", "libero", "libero")
    write_by_hand(tmp_path, "franka_signed", train=[hand_made(12, gripper=(-1, 1))])
    index = RldsIndex.open(tmp_path, "franka_signed", get_dataset_spec("franka_signed", "libero"))
    assert index.with_checked_gripper().spec.map_actions == GRIPPERS["libero"]
    assert "WARNING" in caplog.text and "Pass --gripper libero if that is right, --gripper width:-1,1" in caplog.text
    told = check("franka", "libero", "open1")
    assert "stored 0 to 1, read as open1: 0 (closed) to 1 (open), open in 56 % of the steps" in told
    assert "WARNING" not in told
    write_by_hand(tmp_path, "libero_still", train=[hand_made(gripper=(-1, -1))])
    assert "so the policy learns one position" in check("libero_still")
    own = replace(get_dataset_spec("franka", "libero"), map_actions=lambda actions: actions * 2)
    RldsIndex.open(tmp_path, "franka", own).with_checked_gripper()
    assert "map_actions makes values from 0 to 2, where 0 should be closed and 1 open" in caplog.text
