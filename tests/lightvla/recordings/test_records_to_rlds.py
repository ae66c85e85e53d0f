"""Recorded episodes as RLDS: what is read back, by our reader and by tensorflow-datasets, is what was recorded."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures_rlds import INSTRUCTIONS, tiny_episodes, write_tiny_rlds
from PIL import Image
from rich.console import Console
from tensorflow_process import TensorFlow, read_rlds

from lightvla.flags import records_to_rlds_parser
from lightvla.recordings.records_to_rlds import main
from prismatic.recordings.recording import Recording
from prismatic.recordings.steps import StepRecorder
from prismatic.vla.datasets.catalog import DatasetSpec, get_dataset_spec
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec, read_spec_file
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.writer import NewEpisode, RldsWriter
from prismatic.vla.images import decode_image, decode_jpeg, encode_jpeg
from prismatic.vla.robots import LIBERO

SIZE = (24, 40)  # height, width: not square, so that mixed-up axes show


def convert(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, str]:
    status = main(records_to_rlds_parser().parse_args(list(map(str, command))), Console(width=1000))
    said = capsys.readouterr()
    return status, said.out if status == 0 else said.err


def smooth(rng: np.random.Generator, steps: int) -> np.ndarray:
    return rng.integers(0, 256, (steps, SIZE[0] // 8, SIZE[1] // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)


def record_episode(
    folder: Path, seed: int, steps: int = 12, success: bool | None = True
) -> tuple[Path, dict[str, np.ndarray]]:
    """Record a made-up episode as a robot does: its file, and cameras, states and actions as they went in."""
    rng = np.random.default_rng(seed)
    given = {**{camera: smooth(rng, steps) for camera in LIBERO.cameras}, "state": rng.normal(size=(steps, 8))}
    actions = rng.uniform(-1, 1, (steps, 7))
    actions[:, 6] = np.arange(steps) // 3 % 2
    with StepRecorder(folder, LIBERO).episode(INSTRUCTIONS[seed % 2], f"{seed:02d}") as episode:
        for step in range(steps):
            episode.step({key: values[step] for key, values in given.items()}, actions[step])
        episode.success = success
    return episode.paths[0], {**given, "actions": actions}


def write_frames(folder: Path, steps: int = 10, seed: int = 0, suffix: str = "png") -> dict[str, np.ndarray]:
    """A folder of frames, whose gripper is 1 where it is closed."""
    rng = np.random.default_rng(seed)
    given = {camera: smooth(rng, steps) for camera in LIBERO.cameras}
    for camera, pictures in given.items():
        (folder / camera).mkdir(parents=True)
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(folder / camera / f"{number:06d}.{suffix}")
    given |= {"states": rng.normal(size=(steps, 8)), "actions": rng.uniform(-1, 1, (steps, 7))}
    given["actions"][:, 6] = np.arange(steps) // 3 % 2
    np.save(folder / "states.npy", given["states"])
    np.save(folder / "actions.npy", given["actions"])
    (folder / "instruction.txt").write_text("lift it\n")
    return given


def test_records_are_read_back_as_they_were_recorded(
    tensorflow: TensorFlow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [record_episode(tmp_path / "records", seed, 12 + seed)[1] for seed in range(3)]
    status, said = convert(
        capsys, tmp_path / "records", "--dataset_name", "kitchen", "--robot", "libero",
        "--output_dir", tmp_path / "data", "--val_fraction", "0.3",
    )  # fmt: skip
    assert status == 0, said
    assert "3 episodes, 39 frames, of which 18 begin a chunk of 8 actions; 2 instructions" in said
    assert "cameras: full_image 40 x 24, wrist_image 40 x 24" in said and "split val: 1 episode" in said
    assert "--dataset_name kitchen --robot libero --gripper open1 --num_images_in_input 2" in said
    index = RldsIndex.open(tmp_path / "data", "kitchen", get_dataset_spec("kitchen", "libero", "open1"))
    assert sorted(episode.split for episode in index.episodes) == ["train", "train", "val"]
    by_length = {episode.num_frames: episode for episode in index.with_checked_gripper().episodes}
    for seed, expected in enumerate(given):
        episode = by_length[12 + seed]
        assert episode.instruction == INSTRUCTIONS[seed % 2]
        np.testing.assert_array_equal(episode.state, expected["state"].astype(np.float32))
        np.testing.assert_array_equal(index.spec.map_actions(episode.action), expected["actions"].astype(np.float32))
        for camera in LIBERO.cameras:
            for step, picture in enumerate(expected[camera]):
                np.testing.assert_array_equal(episode.image(camera, step), decode_jpeg(encode_jpeg(picture)))
    found = tensorflow(read_rlds, index.directory)
    assert len(found) == 2 and all(episode["path"].endswith(".npz") for episode in found)
    for episode in found:
        steps, expected = episode["steps"], given[len(episode["steps"]) - 12]
        np.testing.assert_array_equal([s["action"] for s in steps], expected["actions"].astype(np.float32))
        np.testing.assert_array_equal([s["observation"]["state"] for s in steps], expected["state"].astype(np.float32))
        pictures = np.stack([step["observation"]["wrist_image"] for step in steps]).astype(int)
        assert pictures.shape[1:] == (*SIZE, 3) and np.abs(pictures - expected["wrist_image"]).mean() < 8
        assert [bool(step["is_first"]) for step in steps] == [True] + [False] * (len(steps) - 1)
        assert [bool(step["is_last"]) for step in steps] == [False] * (len(steps) - 1) + [True]


def test_a_name_of_libero_stores_what_the_simulator_executes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, given = record_episode(tmp_path / "records", 0)
    status, said = convert(
        capsys, tmp_path / "records", "--dataset_name", "libero_mine", "--output_dir", tmp_path / "data"
    )
    assert status == 0 and "--dataset_name libero_mine --num_images" in said
    index = RldsIndex.open(tmp_path / "data", "libero_mine").with_checked_gripper()
    (episode,) = index.episodes
    np.testing.assert_array_equal(episode.action[:, 6], np.where(given["actions"][:, 6] > 0.5, -1, 1))
    np.testing.assert_array_equal(index.spec.map_actions(episode.action), given["actions"].astype(np.float32))


@pytest.mark.parametrize(("suffix", "turn"), [("png", 0), ("jpg", 0), ("png", 180), ("jpg", 90)])
def test_folders_of_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, turn: int) -> None:
    given = write_frames(tmp_path / "frames" / "a", 10, 0, suffix)
    write_frames(tmp_path / "frames" / "b", 9, 1, suffix)
    status, said = convert(
        capsys, tmp_path / "frames", "--dataset_name", "kitchen", "--robot", "libero",
        "--output_dir", tmp_path / "data", "--gripper", "closed1", "--rotate", turn,
    )  # fmt: skip
    assert status == 0, said
    index = RldsIndex.open(tmp_path / "data", "kitchen", get_dataset_spec("kitchen", "libero", "open1"))
    first = index.episodes[0]
    np.testing.assert_array_equal(first.state, given["states"].astype(np.float32))
    np.testing.assert_array_equal(first.action[:, :6], given["actions"][:, :6].astype(np.float32))
    np.testing.assert_array_equal(first.action[:, 6], 1 - given["actions"][:, 6])
    for step in range(10):
        file = tmp_path / "frames" / "a" / "wrist_image" / f"{step:06d}.{suffix}"
        if suffix == "jpg" and not turn:
            assert first.image_bytes("wrist_image", step) == file.read_bytes()
        else:
            picture = Image.fromarray(decode_image(file.read_bytes()))
            turned = np.asarray(picture.rotate(turn, expand=True))
            np.testing.assert_array_equal(first.image("wrist_image", step), decode_jpeg(encode_jpeg(turned)))


def test_a_robot_that_a_file_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = write_frames(tmp_path / "episode")
    for old, new in (("full_image", "front"), ("wrist_image", "hand")):
        (tmp_path / "episode" / old).rename(tmp_path / "episode" / new)
    file = tmp_path / "lab.yaml"
    text = (
        "robot: {name: lab_arm, cameras: [front, hand], proprio_dim: 8, action_dim: 7, chunk_length: 6,\n"
        "  action_mask: [true, true, true, true, true, true, false]}\n"
        "image_keys: {front: steps/rgb, hand: steps/rgb_hand}\nstate_key: steps/joints\n"
    )
    flags = ("--dataset_name", "lab", "--output_dir", tmp_path / "data", "--dataset_spec", file, "--gripper", "closed1")
    for gripper, stored in (("", [1.0, 0.0]), ("gripper: width:0,0.08\n", [0.08, 0.0])):
        file.write_text(text + gripper)
        status, said = convert(capsys, tmp_path / "episode", *flags, "--replace")
        assert status == 0 and f"--dataset_spec {file}" in said, said
        assert ("--gripper open1" in said) == (not gripper)
        spec = find_dataset_spec("lab", file=read_spec_file(file), gripper=None if gripper else "open1")
        (episode,) = RldsIndex.open(tmp_path / "data", "lab", spec).with_checked_gripper().episodes
        np.testing.assert_allclose(episode.action[[0, 3], 6], stored, atol=1e-6)
        np.testing.assert_allclose(spec.map_actions(episode.action)[:, 6], 1 - given["actions"][:, 6], atol=1e-6)
        np.testing.assert_allclose(episode.state, given["states"], atol=1e-6)
    for wrong, message in (
        (text + "rotate_pictures: 180\n", "lab.yaml turns pictures where they are read"),
        (text.replace("steps/joints", "joints"), "RLDS names features steps/..., not joints"),
    ):
        file.write_text(wrong)
        status, said = convert(capsys, tmp_path / "episode", *flags, "--replace")
        assert status == 2 and message in said


def test_only_what_succeeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, success in enumerate((True, False, True)):
        record_episode(tmp_path / "records", seed, success=success)
    command = [tmp_path / "records", "--dataset_name", "libero_mine", "--output_dir", tmp_path / "data"]
    status, said = convert(capsys, *command, "--only_success")
    assert status == 0 and "2 episodes, 24 frames" in said and "left out: 1 episode that did not reach" in said
    status, said = convert(capsys, *command)
    assert status == 2 and "is there already; give --replace" in said
    record_episode(tmp_path / "records", 3, success=None)
    status, said = convert(capsys, *command, "--only_success", "--replace")
    assert status == 2 and "1 of 4 episodes do not say whether they reached their goal" in said
    assert convert(capsys, *command, "--replace")[0] == 0
    assert len(RldsIndex.open(tmp_path / "data", "libero_mine").episodes) == 4


def change(path: Path, **parts: Any) -> None:
    recording = Recording.load(path)
    for name, value in parts.items():
        setattr(recording, name, value)
    recording.save(path)


def queries_only(path: Path) -> None:
    change(path, steps=3 * np.arange(12), actions=np.zeros((40, 7)))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: change(path, steps=None, actions=None), "does not say which actions were executed"),
        (queries_only, r"holds pictures at its 12 policy queries only, of 40 control steps, .*--record_steps FOLDER"),
        (lambda path: change(path, actions=np.full((12, 7), np.nan)), "actions hold NaN or infinity at step 0"),
        (
            lambda path: change(path, states=np.zeros((12, 7))),
            r"states are \(12, 7\); robot 'libero' and 12 steps need",
        ),
        (lambda path: change(path, instruction=" "), "has no instruction"),
        (lambda path: path.write_bytes(b"PK"), "is no episode record, or is damaged"),
    ],
)
def test_records_that_training_cannot_use_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    record_episode(tmp_path / "records", 0)
    damage(record_episode(tmp_path / "records", 1)[0])
    command = [tmp_path / "records", "--dataset_name", "libero_mine", "--output_dir", tmp_path / "data"]
    status, said = convert(capsys, *command)
    assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert re.search(words, said), said
    assert not (tmp_path / "data").exists()


def drop_frame(folder: Path) -> None:
    (folder / "full_image" / "000004.png").unlink()


def rename_frame(folder: Path) -> None:
    (folder / "full_image" / "000009.png").rename(folder / "full_image" / "000010.png")


def other_size(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "full_image" / "000004.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_frame, "full_image holds 9 pictures .* for 10 actions"),
        (rename_frame, r"000010\.png is where frame 000009 is expected"),
        (other_size, r"pictures of several sizes \(000000\.png 40 x 24, 000004\.png 8 x 8\)"),
        (lambda f: (f / "full_image" / "000004.png").write_bytes(b"x"), r"000004\.png is no picture that can be read"),
        (lambda f: (f / "instruction.txt").unlink(), r"instruction\.txt is missing"),
        (lambda f: (f / "states.npy").unlink(), r"states\.npy is missing"),
        (lambda f: np.save(f / "states.npy", np.array([{}])), r"states\.npy is no array of numbers"),
        (lambda f: np.save(f / "actions.npy", np.zeros((10, 6))), r"actions are \(10, 6\); robot 'libero'"),
        (lambda f: (f / "success.txt").write_text("maybe"), r"success\.txt says 'maybe'; expected true or false"),
        (lambda f: (f / "full_image").rename(f / "front"), r"lacks the camera 'full_image'; it has \['wrist_image'\]"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    write_frames(tmp_path / "frames")
    damage(tmp_path / "frames")
    status, said = convert(
        capsys, tmp_path / "frames", "--dataset_name", "libero_mine", "--output_dir", tmp_path / "data", "--gripper",
        "closed1",
    )  # fmt: skip
    assert status == 2 and said.count("\n") == 1 and re.search(words, said), said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset_name", "Kitchen 1"], "'Kitchen 1' cannot name a dataset"),
        (["--dataset_name", "kitchen"], "unknown dataset 'kitchen'"),
        (["--dataset_name", "kitchen", "--robot", "martian"], "unknown robot 'martian'"),
        (["--dataset_name", "libero_mine"], "nothing says how actions.npy stores the gripper; .* Pass --gripper"),
        (["--dataset_name", "libero_mine", "--gripper", "libero"], "stored values run from 0 to 1; 'libero' means"),
        (["--dataset_name", "libero_mine", "--gripper", "up"], "expected libero"),
        (["--dataset_name", "libero_mine", "--gripper", "closed1", "--val_fraction", "1"], "expected 0 to less than 1"),
        (["--dataset_name", "libero_mine", "--gripper", "closed1", "--only_success"], "1 of 1 episodes do not say"),
    ],
)
def test_flags_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    write_frames(tmp_path / "frames")
    status, said = convert(capsys, tmp_path / "frames", "--output_dir", tmp_path / "data", *flags)
    assert status == 2 and re.search(words, said), said
    status, said = convert(capsys, tmp_path / "nothing", "--dataset_name", "libero_mine")
    assert status == 2 and "nothing does not exist" in said
    twice = [tmp_path / "frames", tmp_path / "frames" / ".." / "frames"]
    status, said = convert(capsys, *twice, "--dataset_name", "libero_mine", "--gripper", "closed1")
    assert status == 2 and "frames is named twice" in said
    (tmp_path / "file").touch()
    status, said = convert(
        capsys, tmp_path / "frames", "--output_dir", tmp_path / "file", "--dataset_name", "libero_mine"
    )
    assert status == 2 and "file is a file; expected the folder" in said


@pytest.mark.slow
def test_what_the_writer_writes_is_what_tensorflow_datasets_writes(tensorflow: TensorFlow, tmp_path: Path) -> None:
    """The features' description to the letter, and every feature of every step."""
    theirs = write_tiny_rlds(tmp_path / "theirs", "libero_tiny", episodes=3)
    spec, episodes = DatasetSpec("libero_tiny"), tiny_episodes(3)
    with RldsWriter(tmp_path / "ours", spec, dict.fromkeys(LIBERO.cameras, (64, 64)), shard_bytes=1) as writer:
        for episode in episodes:
            pictures = {
                camera: [encode_jpeg(np.asarray(picture)) for picture in rows]
                for camera, rows in (("full_image", episode.images), ("wrist_image", episode.wrist_images))
            }
            path = episode.metadata["file_path"]
            writer.add(NewEpisode(pictures, episode.states, episode.actions, episode.language, path))
    ours = writer.directory
    assert json.loads((ours / "features.json").read_text()) == json.loads((theirs / "features.json").read_text())
    assert len(list(ours.glob("libero_tiny-train.tfrecord-*-of-00003"))) == 3
    read = [sorted(tensorflow(read_rlds, folder), key=lambda e: e["path"]) for folder in (ours, theirs)]
    for mine, other in zip(*read, strict=True):
        assert mine["path"] == other["path"] and len(mine["steps"]) == len(other["steps"])
        for step, expected in zip(mine["steps"], other["steps"], strict=True):
            pictures = step.pop("observation"), expected.pop("observation")
            np.testing.assert_array_equal(pictures[0]["state"], pictures[1]["state"])
            assert step.keys() == expected.keys()
            for key, value in step.items():
                np.testing.assert_array_equal(value, expected[key])
            for camera in ("image", "wrist_image"):
                difference = pictures[0][camera].astype(int) - pictures[1][camera]
                assert np.abs(difference).mean() < 3, "two JPEG encoders"
