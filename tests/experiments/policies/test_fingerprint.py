"""Which weights a checkpoint holds does not depend on where it lies, and nothing about them changes unnoticed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.robot.libero.policies.fingerprint import checkpoint_fingerprint


@pytest.fixture
def checkpoint(small_policy_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_policy_directory, tmp_path / "checkpoint"))


def test_copies_and_links_have_the_same_one(small_policy_directory: Path, checkpoint: Path, tmp_path: Path) -> None:
    found = checkpoint_fingerprint(small_policy_directory, tmp_path / "cache")
    assert found.startswith("sha256:") and len(found) == 71
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") == found
    (tmp_path / "link").symlink_to(checkpoint)
    assert checkpoint_fingerprint(tmp_path / "link", tmp_path / "cache") == found
    (head,) = checkpoint.glob("action_head--*.pt")
    head.rename(checkpoint / "action_head--latest_checkpoint.pt")
    (checkpoint / "config.json").write_text("{}")
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") == found


@pytest.mark.parametrize(
    "pattern", ["*.safetensors", "action_head--*.pt", "proprio_projector--*.pt", "*statistics.json"]
)
def test_another_byte_is_another_one_whatever_the_dates_say(checkpoint: Path, tmp_path: Path, pattern: str) -> None:
    before = checkpoint_fingerprint(checkpoint, tmp_path / "cache")
    (file,) = checkpoint.glob(pattern)
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as stream:  # in place: the same inode
        stream.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (times.st_size, times.st_mtime_ns, times.st_ino)
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") != before


def test_files_split_anew_are_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint_fingerprint(checkpoint, tmp_path / "cache")
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, checkpoint / f"model-{number}.safetensors")
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") == before


def test_it_is_computed_once(checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoint_fingerprint(checkpoint, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text().replace(before, "sha256:kept"))
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") == "sha256:kept"
    (head,) = checkpoint.glob("action_head--*.pt")
    torch.save({**torch.load(head), "more": torch.zeros(1)}, head)
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") not in (before, "sha256:kept")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": 3}'])
def test_a_damaged_or_impossible_cache_costs_time_only(checkpoint: Path, tmp_path: Path, content: str) -> None:
    before = checkpoint_fingerprint(checkpoint, tmp_path / "cache")
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(content)
    assert checkpoint_fingerprint(checkpoint, tmp_path / "cache") == before
    (tmp_path / "file").write_text("")
    assert checkpoint_fingerprint(checkpoint, tmp_path / "file") == before
