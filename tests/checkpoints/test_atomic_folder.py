"""Folders appear whole or not at all, whatever happens to who writes them; readers read."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prismatic.checkpoints.atomic_folder import new_folder, remove_leftovers, staging_folder
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.manifest import (
    MANIFEST_FILE,
    is_complete,
    list_again,
    manifest_problems,
    read_manifest,
    write_manifest,
)
from prismatic.checkpoints.saving import load_training_state, save_checkpoint
from prismatic.models.lora import FOLDER, attach_lora, save_adapter


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "new" / "run--1_chkpt"
    with new_folder(target) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "a").write_text("a")
        assert not target.exists() and staging.name.startswith(".run--1_chkpt.")
    assert (target / "part" / "a").read_text() == "a" and os.listdir(target.parent) == [target.name]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other") as staging:
        (staging / "a").write_text("a")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["new"]


def test_nothing_is_replaced(tmp_path: Path):
    target = tmp_path / "run"
    (target / "kept").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="run exists and is not empty; remove it, or give"), new_folder(target):
        pass
    quicker = tmp_path / "quicker"
    with pytest.raises(FileExistsError, match="quicker exists and is not empty"), new_folder(quicker):
        (quicker / "kept").mkdir(parents=True)  # by another process, meanwhile
    assert os.listdir(target) == os.listdir(quicker) == ["kept"] and sorted(os.listdir(tmp_path)) == ["quicker", "run"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with new_folder(empty) as staging:
        (staging / "a").touch()
    assert os.listdir(empty) == ["a"]


def test_leftovers_are_those_of_dead_writers(tmp_path: Path):
    code = (
        "import os, sys, pathlib\nfrom prismatic.checkpoints.atomic_folder import staging_folder\n"
        "with staging_folder(pathlib.Path(sys.argv[1]), 'run--1_chkpt'):\n    os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (dead,) = tmp_path.iterdir()
    (dead / "model.safetensors").write_bytes(b"half")
    again = dead.with_name(f".run--2_chkpt.{os.getpid()}-1@{socket.gethostname()}.saving")  # its number came again
    other = dead.with_name(".run--3_chkpt.1-1@another-machine.saving")
    again.mkdir()
    other.mkdir()
    (tmp_path / ".somebody.saving").mkdir()
    with staging_folder(tmp_path, "run--4_chkpt") as alive:
        assert remove_leftovers(tmp_path, "else*") == []
        assert remove_leftovers(tmp_path, "run--*_chkpt") == [dead, again] and other.is_dir()
        assert remove_leftovers(tmp_path, of_all_hosts=True) == [other] and alive.is_dir()
    assert os.listdir(tmp_path) == [".somebody.saving"]
    assert remove_leftovers(tmp_path / "nowhere") == []


def test_a_manifest_tells_what_is_not_as_written(small_policy_directory: Path, tmp_path: Path):
    checkpoint = load_checkpoint(small_policy_directory)
    state, facts = {"step": 7}, {"val_loss": 0.25}
    folder = save_checkpoint(tmp_path / "run", checkpoint, 7, training_state=state, facts=facts)
    manifest = read_manifest(folder)
    assert manifest is not None and (manifest.step, manifest.facts) == (7, facts)
    held = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert manifest.files == {name: size for name, size in held.items() if name != MANIFEST_FILE}
    assert is_complete(folder)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    (folder / "training_state" / "state.pt").unlink()
    size = held["model.safetensors"]
    assert manifest_problems(folder) == [
        f"model.safetensors has {size + 1} bytes, manifest.json says {size}; copy the checkpoint again",
        "training_state/state.pt is missing, which manifest.json lists; copy the checkpoint again",
    ]
    (folder / "config.json").write_text("{")
    assert "config.json has 1 bytes" in manifest_problems(folder)[0]
    (folder / "config.json").write_text('{"edited": "by hand"}')
    list_again(folder, {"training_state/state.pt"}, {"model.safetensors": size + 1})
    assert is_complete(folder)
    for content in ("{", "[]", "{}", '{"step": 1, "files": {"a": "b"}}'):
        (folder / MANIFEST_FILE).write_text(content)
        assert not is_complete(folder)
    (folder / MANIFEST_FILE).unlink()
    assert not is_complete(folder), "published checkpoints have none"
    write_manifest(folder, "latest")
    assert is_complete(folder)


def poisoned(checkpoint: Checkpoint, part: str) -> dict:
    """What to save besides, with one NaN in one part."""
    nan = torch.tensor(float("nan"))
    with torch.no_grad():
        if part == "weights":
            checkpoint.model.language_model.lm_head.weight[3, 3] = nan
        elif part == "action_head":
            checkpoint.action_head.model.fc2.bias[1] = nan
        elif part == "adapter":
            config = attach_lora(checkpoint.model, 2)
            layer = "language_model.model.layers.0.mlp.up_proj"
            checkpoint.model.get_submodule(layer).lora_B["default"].weight[0, 0] = nan
            return {"weights": {}, "extra": lambda folder: save_adapter(checkpoint.model, config, folder / FOLDER, "x")}
    moments = {"exp_avg": nan.repeat(3) if part == "training_state" else torch.zeros(3)}
    return {"training_state": {"step": 2, "optimizer": {"state": {0: moments}}}}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weights", "'language_model.lm_head.weight', to be written to model.safetensors, holds NaN"),
        ("action_head", "'model.fc2.bias', to be written to action_head--2_checkpoint.pt, holds NaN"),
        ("training_state", "'optimizer.state.0.exp_avg', to be written to state.pt, holds NaN"),
        ("adapter", r"up_proj.lora_B.weight', to be written to adapter_model.safetensors, holds NaN"),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(small_policy_directory: Path, tmp_path: Path, part, message):
    checkpoint = load_checkpoint(small_policy_directory)
    with pytest.raises(FloatingPointError, match=message):
        save_checkpoint(tmp_path / "run--2_chkpt", checkpoint, 2, **poisoned(checkpoint, part))
    assert not os.listdir(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, less than the small model takes."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_a_full_or_read_only_disk_is_said_and_nothing_is_left(small_policy_directory: Path, small_disk: Path):
    checkpoint = load_checkpoint(small_policy_directory)
    full = "the disk is full, so run--1_chkpt was not written; free some space"
    large = {"step": 1, "parameters": {"a": torch.zeros(1_000_000)}}
    for given in ({}, {"weights": {}, "training_state": large}):
        with pytest.raises(OSError, match=full):
            save_checkpoint(small_disk / "run--1_chkpt", checkpoint, 1, **given)
        assert not os.listdir(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        save_checkpoint(small_disk / "run--1_chkpt", checkpoint, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what they have loaded")
@pytest.mark.slow
def test_readers_never_fail_or_write_while_writers_are_killed(small_policy_directory: Path, tmp_path: Path):
    driver = Path(__file__).parent / "saves_and_kills.py"
    command = [sys.executable, str(driver), str(small_policy_directory), str(tmp_path / "runs"), "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["errors"] == [] and all(reads > 3 for reads in told["reads"])
    assert told["killed_inside"] >= 6 and told["removed"] == told["killed_inside"]
    found = sorted((tmp_path / "runs").iterdir())
    assert len(found) == told["saved"] >= 8 and all(path.name.endswith("_chkpt") for path in found)
    for folder in found:
        manifest = read_manifest(folder)
        assert manifest is not None and is_complete(folder)
        held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert held == {*manifest.files, MANIFEST_FILE}, "readers wrote"
        assert load_training_state(folder)["step"] == manifest.step
