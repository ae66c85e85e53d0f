import json
import os
import shutil
from pathlib import Path

import pytest
from fixtures_rlds import hand_made, write_by_hand

from prismatic.vla.datasets import checksums
from prismatic.vla.datasets.checksums import CACHE_FILE
from prismatic.vla.datasets.rlds import RldsIndex

NAME = "libero_tiny_no_noops"


@pytest.fixture
def copied(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one shard of a copy that a test may damage; caches go beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (shard,) = shutil.copytree(tiny_root / NAME, tmp_path / "a" / NAME).glob("*/*.tfrecord*")
    return shard


def root_of(shard: Path) -> Path:
    return shard.parents[2]


def damage(shard: Path, index: RldsIndex) -> None:
    """Change a byte of the second episode's pictures, and leave the times as they were."""
    times = shard.stat()
    data = bytearray(shard.read_bytes())
    data[int(index.episodes[1].image_ranges["wrist_image"][4].sum()) // 2] ^= 16
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("writable", [True, False])
def test_a_shard_is_compared_once(copied: Path, tmp_path: Path, writable: bool) -> None:
    beside, elsewhere = copied.with_name(CACHE_FILE), tmp_path / "cache" / "lightvla" / CACHE_FILE
    if not writable:
        beside.unlink(missing_ok=True)
        beside.mkdir()
    index = RldsIndex.open(root_of(copied), NAME)
    assert beside.is_file() == writable and elsewhere.is_file() != writable
    damage(copied, index)
    RldsIndex.open(root_of(copied), NAME)  # not read again
    os.utime(copied)
    RldsIndex.open(root_of(copied), NAME, compare=False)
    for _ in range(2):  # a damaged shard never passes
        with pytest.raises(ValueError, match=f"shard {copied} is damaged: .* differs from its checksum. Copy the"):
            RldsIndex.open(root_of(copied), NAME)


def test_a_copy_elsewhere_and_a_spoilt_cache_are_compared_anew(copied: Path, tmp_path: Path) -> None:
    index = RldsIndex.open(root_of(copied), NAME)
    damage(copied, index)
    shutil.copytree(root_of(copied), tmp_path / "b")  # times, too
    with pytest.raises(ValueError, match=f"shard {tmp_path / 'b'}.* is damaged"):
        RldsIndex.open(tmp_path / "b", NAME)
    for content in ("[1]", '{"cut', json.dumps({str(copied.parent): 3})):
        copied.with_name(CACHE_FILE).write_text(content)
        with pytest.raises(ValueError, match="is damaged"):
            RldsIndex.open(root_of(copied), NAME)


def test_a_cache_that_cannot_be_kept_is_said(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copied.with_name(CACHE_FILE).unlink(missing_ok=True)
    copied.with_name(CACHE_FILE).mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(RldsIndex.open(root_of(copied), NAME).episodes) == 3
    assert "cannot keep which shards were compared" in caplog.text and "comparing at every start" in caplog.text


def test_large_data_are_announced(
    copied: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checksums, "_PROGRESS_BAR_BYTES", 1000)
    caplog.set_level("INFO")
    RldsIndex.open(root_of(copied), NAME)
    RldsIndex.open(root_of(copied), NAME)
    assert caplog.text.count("GB with their checksums, once") == 1


def test_a_fingerprint_is_of_names_and_contents_wherever_they_lie(copied: Path, tiny_index: RldsIndex) -> None:
    first = RldsIndex.open(root_of(copied), NAME, use_state=False).fingerprint
    assert first == tiny_index.fingerprint and first.startswith("sha256:") and len(first) == 7 + 64
    copied.rename(renamed := copied.with_name(copied.name.replace("-train", "-val")))
    assert RldsIndex.open(root_of(renamed), NAME).fingerprint != first


def test_contents_without_checksums_are_hashed(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1, 0):
        write_by_hand(tmp_path, "libero_own", train=[hand_made(9), hand_made(9, seed)])
        found.append(RldsIndex.open(tmp_path, "libero_own").fingerprint)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("key", ["steps/action", "steps/observation/state"])
def test_values_that_are_no_numbers_are_named_with_their_step(tmp_path: Path, key: str) -> None:
    episodes = [hand_made(9), hand_made(9, 1)]
    episodes[1][key][5, 2] = float("inf")
    write_by_hand(tmp_path, "libero_own", train=episodes)
    with pytest.raises(ValueError, match=f"'{key}' of dataset 'libero_own' holds NaN or infinity at step 5 .episode 1"):
        RldsIndex.open(tmp_path, "libero_own")
