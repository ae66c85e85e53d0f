"""Shards of a dataset: several of them, and those that are missing, damaged or of another kind."""

import gzip
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.shards import ShardFiles

NAME = "libero_tiny_no_noops"


@pytest.fixture
def copied_root(tiny_root: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(tiny_root / NAME, tmp_path / NAME)
    return tmp_path


def only_shard(root: Path) -> Path:
    (shard,) = (root / NAME / "1.0.0").glob("*.tfrecord*")
    return shard


def test_no_more_shards_stay_open_than_a_process_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[ShardFiles.__module__], "MAX_OPEN_SHARDS", 4)
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(path.name.encode() * 3)
    shards, descriptors = ShardFiles(paths), len(os.listdir("/proc/self/fd"))
    for number in [*range(20), *range(20)]:
        assert shards.bytes_of(number)[:] == str(number).encode() * 3
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 4


def test_several_shards_splits_and_versions(
    copied_root: Path, tiny_index: RldsIndex, caplog: pytest.LogCaptureFixture
) -> None:
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
    assert "has the versions 1.0.0, 1.10.0; the newest is read" in caplog.text
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


def test_changed_bytes_are_found_by_the_records_checksum(copied_root: Path, tiny_index: RldsIndex) -> None:
    shard = only_shard(copied_root)
    original = shard.read_bytes()
    second = 16 + int.from_bytes(original[:8], "little")
    first_byte, stop = tiny_index.episodes[1].image_ranges["wrist_image"][4]
    for place in (int(first_byte + stop) // 2, original.find(tiny_index.episodes[1].action.tobytes()) + 40):
        assert place > second
        damaged = bytearray(original)
        damaged[place] ^= 16
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{shard} is damaged: the record at byte {second} .*its checksum. Copy"):
            RldsIndex.open(copied_root, NAME)


def test_a_compressed_shard_is_named(copied_root: Path) -> None:
    shard = only_shard(copied_root)
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match=rf"shard {shard} is compressed by gzip; decompress it"):
        RldsIndex.open(copied_root, NAME)


def test_missing_folders_and_shards_say_what_is_there(copied_root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data folder .*nowhere does not exist"):
        RldsIndex.open(copied_root / "nowhere", NAME)
    with pytest.raises(FileNotFoundError, match=f"libero_goal_no_noops; .* holds {NAME}"):
        RldsIndex.open(copied_root, "libero_goal_no_noops")
    only_shard(copied_root).unlink()
    with pytest.raises(FileNotFoundError, match="has no shards .* it holds dataset_info.json"):
        RldsIndex.open(copied_root, NAME)


def test_two_sets_of_shards_are_refused(copied_root: Path) -> None:
    shard = only_shard(copied_root)
    for other in (
        f"{NAME}-train.tfrecord-00000-of-00002",
        f"{NAME}-train.tfrecord",
        "other-train.tfrecord-00000-of-00001",
    ):
        second = shutil.copyfile(shard, shard.with_name(other))
        if other.endswith("2"):
            shutil.copyfile(shard, shard.with_name(other.replace("00000-of", "00001-of")))
        with pytest.raises(ValueError, match=rf"two sets of shards of the split 'train': .*{other}.*Move the files"):
            RldsIndex.open(copied_root, NAME)
        for path in set(shard.parent.glob("*.tfrecord*")) - {shard}:
            path.unlink()
        assert not second.exists()
    other = Path(shutil.copyfile(shard, shard.with_name("other-val.tfrecord-00000-of-00001")))
    with pytest.raises(ValueError, match=rf"holds shards of several datasets \({NAME}, other\); move all but one's"):
        RldsIndex.open(copied_root, NAME)
    other.unlink()
    shutil.copyfile(shard, shard.parents[1] / shard.name)
    with pytest.raises(ValueError, match=r"holds shards and a version's folder \(1.0.0\)"):
        RldsIndex.open(copied_root, NAME)


def test_a_placeholder_of_git_lfs_is_named(copied_root: Path) -> None:
    shard = only_shard(copied_root)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 302242674\n")
    with pytest.raises(ValueError, match=f"shard {shard} is a placeholder that git-lfs left; run `git lfs pull`"):
        RldsIndex.open(copied_root, NAME)


def test_a_home_folder_is_found(copied_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copied_root.parent))
    assert len(RldsIndex.open(f"~/{copied_root.name}", NAME).episodes) == 3


def test_a_process_lets_go_of_what_it_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that it has read through it maps no more than it is allowed to, and reads the same again."""
    content = np.random.default_rng(0).bytes(32 << 20)
    (tmp_path / "a-train.tfrecord").write_bytes(content)
    monkeypatch.setattr("prismatic.vla.datasets.shards.MAPPED_BYTES", 4 << 20)

    def mapped() -> int:
        text = Path("/proc/self/smaps").read_text().partition("a-train.tfrecord")[2]
        return int(text.partition("Rss:")[2].split()[0]) * 1024

    shards = ShardFiles([tmp_path / "a-train.tfrecord"])
    for start in range(0, len(content), 1 << 20):
        assert shards.read(0, start, start + (1 << 20)) == content[start : start + (1 << 20)]
        assert mapped() <= 8 << 20
    assert len(shards.bytes_of(0)[:]) == len(content) and mapped() == len(content)
    shards.let_go()
    assert mapped() == 0 and shards.read(0, 5, 9) == content[5:9]
