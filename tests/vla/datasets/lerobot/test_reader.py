"""A LeRobot dataset equals the RLDS that it was made of, and what is wrong with one is said of its file."""

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fixtures_lerobot import LOSSLESS, LOSSY, Codec, encode_video, write_lerobot

from prismatic.vla.datasets.catalog import LAYOUTS, DatasetSpec
from prismatic.vla.datasets.dataset import train_and_val_episodes
from prismatic.vla.datasets.entries.opening import check_folder, open_dataset
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.stored.episode import UnreadableImage
from prismatic.vla.datasets.stored.index import DatasetIndex
from prismatic.vla.datasets.stored.turning import Turn
from prismatic.vla.gripper import GRIPPERS

SPEC = replace(LAYOUTS["libero"], name="arm", map_actions=GRIPPERS["libero"])
KINDS = [("v2.1", None), ("v3.0", None), ("v2.1", LOSSLESS), ("v3.0", LOSSLESS)]


def read(root: Path, spec: DatasetSpec = SPEC, **options: bool) -> DatasetIndex:
    return open_dataset(root, "arm", spec, **options)


@pytest.mark.parametrize(("version", "codec"), KINDS)
def test_pixels_states_actions_and_words_equal_those_of_the_rlds(
    tmp_path: Path, tiny_index: RldsIndex, version: str, codec: Codec | None
) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes, version, codec)
    index = read(tmp_path)
    assert index.check_cameras(2) == ("full_image", "wrist_image")
    assert [episode.num_frames for episode in index.episodes] == [12, 13, 14]
    rng = np.random.default_rng(0)
    for ours, theirs in zip(index.episodes, tiny_index.episodes, strict=True):
        np.testing.assert_array_equal(ours.state, theirs.state)
        np.testing.assert_array_equal(ours.action, theirs.action)
        assert ours.instructions == theirs.instructions
        for camera in ("full_image", "wrist_image"):
            for step in rng.permutation(ours.num_frames).tolist():
                np.testing.assert_array_equal(ours.image(camera, step), theirs.image(camera, step))
    theirs_of_all = dataset_statistics(tiny_index)
    assert dataset_statistics(index.with_checked_gripper()) == theirs_of_all


@pytest.mark.parametrize("gop", ["1", "7", "250"])
def test_a_lossy_video_is_read_at_random_as_it_is_from_the_front(
    tmp_path: Path, tiny_index: RldsIndex, gop: str, caplog: pytest.LogCaptureFixture
) -> None:
    codec = (*LOSSY[:2], {**LOSSY[2], "g": gop, "bf": "2"})
    write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", codec)
    episodes = read(tmp_path).episodes
    assert ("a key frame every" in caplog.text) == (gop == "250")
    front = [[episode.image("full_image", step) for step in range(episode.num_frames)] for episode in episodes]
    for number, step in np.random.default_rng(0).permutation(
        [(n, s) for n, e in enumerate(front) for s in range(len(e))]
    ):
        np.testing.assert_array_equal(episodes[number].image("full_image", step), front[number][step])
    for picture, stored in zip(front[2], range(14), strict=True):
        original = tiny_index.episodes[2].image("full_image", stored)
        assert np.abs(picture.astype(int) - original).mean() < 12  # colours at half the resolution; its neighbours: 30


def test_workers_open_files_of_their_own(tmp_path: Path, tiny_index: RldsIndex) -> None:
    for name, codec in (("video", LOSSLESS), ("picture", None)):
        write_lerobot(tmp_path / name / "arm", tiny_index.episodes, "v3.0", codec)
        episode = read(tmp_path / name).episodes[1]
        here = episode.image("wrist_image", 5)
        assert len(pickle.dumps(episode)) < 20_000
        with ProcessPoolExecutor(1) as pool:
            np.testing.assert_array_equal(pool.submit(episode.image, "wrist_image", 5).result(timeout=60), here)


def test_pictures_of_parquet_files_are_copied_once(
    tmp_path: Path, tiny_index: RldsIndex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes)
    with caplog.at_level(logging.INFO, "prismatic"):
        read(tmp_path)
        assert caplog.text.count("copying the pictures") == 2
        read(tmp_path)
        assert caplog.text.count("copying the pictures") == 2
        stored = [path for path in (folder / "lightvla_pictures").iterdir() if path.suffix == ".bin"]
        stored[0].write_bytes(stored[0].read_bytes()[:-1])  # cut off: made anew
        read(tmp_path).check_cameras(2)
        assert caplog.text.count("copying the pictures") == 3
    shutil.rmtree(folder / "lightvla_pictures")
    (folder / "lightvla_pictures").write_text("in the way, as a folder that cannot be written would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = read(tmp_path)
    np.testing.assert_array_equal(
        index.episodes[0].image("full_image", 3), tiny_index.episodes[0].image("full_image", 3)
    )
    assert [*(tmp_path / "cache").rglob("*.bin")]


def test_turned_pictures(tmp_path: Path, tiny_index: RldsIndex) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes)
    spec = replace(SPEC, turns={"full_image": Turn(180), "wrist_image": Turn(90, mirror=True)})
    episode, original = read(tmp_path, spec).episodes[0], tiny_index.episodes[0]
    np.testing.assert_array_equal(episode.image("full_image", 4), original.image("full_image", 4)[::-1, ::-1])
    np.testing.assert_array_equal(episode.image("wrist_image", 4), original.image("wrist_image", 4).transpose(1, 0, 2))


def test_names_of_published_datasets_are_found(tmp_path: Path, tiny_index: RldsIndex) -> None:
    names = {"full_image": "image", "wrist_image": "image2"}
    write_lerobot(tmp_path / "arm", tiny_index.episodes, names=names)
    index = read(tmp_path)
    assert index.spec.image_keys == names and index.spec.state_key == "observation.state"
    assert index.labels["state"][3:6] == ("roll", "pitch", "yaw")


def test_splits_and_the_fingerprint(tmp_path: Path, tiny_index: RldsIndex) -> None:
    def held_out(info: dict) -> dict:
        return info | {"splits": {"train": "0:2", "val": "2:3"}}

    write_lerobot(tmp_path / "one" / "arm", tiny_index.episodes, changed=held_out)
    write_lerobot(tmp_path / "two" / "arm", tiny_index.episodes)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert train_and_val_episodes(one) == ([0, 1], [2])
    assert sorted(map(len, train_and_val_episodes(two, 0.3))) == [1, 2]
    assert one.fingerprint == two.fingerprint and one.fingerprint.startswith("sha256:")
    episodes = [replace(episode, action=episode.action + 1) for episode in tiny_index.episodes]
    write_lerobot(tmp_path / "three" / "arm", episodes)
    assert read(tmp_path / "three").fingerprint != one.fingerprint


def test_another_rate_than_the_robots_is_told(
    tmp_path: Path, tiny_index: RldsIndex, caplog: pytest.LogCaptureFixture
) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes, fps=10)
    assert read(tmp_path).fps == 10
    assert "10 frames per second, and robot 'libero' is controlled at 20 Hz" in caplog.text


def test_the_gripper_is_asked_for(tmp_path: Path, tiny_index: RldsIndex) -> None:
    episodes = [replace(e, action=np.where(np.arange(7) < 6, e.action, e.action > 0)) for e in tiny_index.episodes]
    write_lerobot(tmp_path / "arm", episodes)
    with pytest.raises(ValueError, match="nothing says how the gripper is stored.*0 to 1.*--gripper open1"):
        read(tmp_path, replace(LAYOUTS["libero"], name="arm")).with_checked_gripper()


@pytest.mark.parametrize("version", ["v1.6", "v4.0", None])
def test_other_versions_are_refused(tmp_path: Path, tiny_index: RldsIndex, version: str | None) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes, changed=lambda info: info | {"codebase_version": version})
    for look in (lambda: read(tmp_path), lambda: check_folder(tmp_path, SPEC)):
        with pytest.raises(
            ValueError, match=rf"version {version!r}, and v2.0, v2.1, v3.0 are read: convert it"
        ) as told:
            look()
        assert "\n" not in str(told.value)


def _rows_lack(folder: Path) -> None:
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 11), path)


def _frames_lack(folder: Path) -> None:
    path = folder / "videos" / "chunk-000" / "observation.images.image" / "episode_000001.mp4"
    encode_video(path, [np.zeros((64, 64, 3), np.uint8)] * 12, LOSSLESS, 20)


def _no_video(folder: Path) -> None:
    path = folder / "videos" / "chunk-000" / "observation.images.image" / "episode_000001.mp4"
    path.write_bytes(path.read_bytes()[:300])


def _missing(folder: Path) -> None:
    (folder / "videos" / "chunk-000" / "observation.images.image" / "episode_000001.mp4").unlink()


def _damaged_table(folder: Path) -> None:
    path = folder / "data" / "chunk-000" / "episode_000001.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def _no_task(folder: Path) -> None:
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "wait"}\n')


def _fewer(folder: Path) -> None:
    path = folder / "meta" / "episodes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_rows_lack, r"episode 1 has 11 rows in .*episode_000001.parquet, and meta says 13"),
        (_frames_lack, r"image/episode_000001.mp4 has 12 frames, and its episodes have 13 rows"),
        (_no_video, r"image/episode_000001.mp4 cannot be opened"),
        (_missing, r"image/episode_000001.mp4 is missing"),
        (_damaged_table, r"episode_000001.parquet cannot be read"),
        (_no_task, r"episode 1 in .*episode_000001.parquet has task_index 1, which .* has no task for"),
        (_fewer, r"info.json says total_episodes 3, and meta/episodes lists 2"),
    ],
)
def test_what_is_damaged_or_disagrees_is_named(
    tmp_path: Path, tiny_index: RldsIndex, damage: Callable[[Path], None], told: str
) -> None:
    damage(write_lerobot(tmp_path / "arm", tiny_index.episodes, "v2.1", LOSSLESS))
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        read(tmp_path)


def test_a_frame_that_does_not_decode_names_its_video(tmp_path: Path, tiny_index: RldsIndex) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", LOSSLESS)
    path = folder / "videos" / "observation.images.image" / "chunk-000" / "file-000.mp4"
    data = bytearray(path.read_bytes())
    data[2000 : len(data) // 2] = bytes(len(data) // 2 - 2000)
    path.write_bytes(data)
    index = read(tmp_path)
    with pytest.raises(UnreadableImage, match=r"camera 'full_image' of episode 0, step 6: video .*file-000.mp4 at 0.3"):
        index.episodes[0].image("full_image", 6)
    index.episodes[0].image("wrist_image", 6)


def test_frames_off_their_time_are_refused(tmp_path: Path, tiny_index: RldsIndex) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, "v2.1", LOSSLESS)
    pictures = [tiny_index.episodes[0].image("full_image", step) for step in range(12)]
    path = folder / "videos" / "chunk-000" / "observation.images.image" / "episode_000000.mp4"
    encode_video(path, pictures, LOSSLESS, 30)
    with pytest.raises(UnreadableImage, match=r"episode_000000.mp4 at 0.2500 s: no frame lies there within 0.0001 s"):
        read(tmp_path).episodes[0].image("full_image", 5)


def test_features_that_lack_are_listed(tmp_path: Path, tiny_index: RldsIndex) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes)
    spec = replace(SPEC, image_keys={"full_image": "observation.images.front"})
    with pytest.raises(ValueError, match="pictures are observation.images.image, observation.images.wrist_image"):
        read(tmp_path, spec)
    half = replace(SPEC, image_keys={**SPEC.image_keys, "wrist_image": "observation.images.hand"})
    with pytest.raises(ValueError, match=r"lacks 'observation.images.hand'.*it has observation.images.image, observ"):
        read(tmp_path, half).check_cameras(2)
    with pytest.raises(ValueError, match="lacks 'torques'; .*info.json has .*observation.state, action"):
        read(tmp_path, replace(SPEC, action_key="torques"))
    with pytest.raises(ValueError, match="8 values per frame, but robot 'libero' needs 9"):
        read(tmp_path, replace(SPEC, robot=replace(SPEC.robot, proprio_dim=9)))
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"]["observation.images.image"]["dtype"] = "float32"
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="'observation.images.image' holds float32"):
        read(tmp_path)


@pytest.mark.parametrize("library", ["av", "pyarrow"])
def test_a_library_that_lacks_is_named(
    tmp_path: Path, tiny_index: RldsIndex, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    import importlib.util

    write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", LOSSLESS)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == library else found(name, *rest)
    )
    with pytest.raises(
        ValueError, match=f"reading a LeRobot dataset needs {library}: pip install 'lightvla\\[data\\]'"
    ):
        check_folder(tmp_path, SPEC)
