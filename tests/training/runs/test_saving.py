"""Saves that cannot be, and what is left then."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prismatic.checkpoints.manifest import is_complete
from prismatic.training.build import build
from prismatic.training.distributed import Ranks
from prismatic.training.loop import BadInput, finetune, train
from prismatic.training.runs.saving import HostCopy
from prismatic.training.runs.writer import BackgroundWriter

EVERY_STEP = {"save_freq": 100, "save_minutes": 1e-9}
"""Saves that a plan does not foresee."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system was refused")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def whole_checkpoints(config) -> list[str]:
    folder = config.run_dir / "checkpoints"
    assert not list(folder.glob(".*.saving"))
    return sorted(path.name for path in folder.glob("*_chkpt") if is_complete(path))


@pytest.mark.parametrize("background", ["True", "False"])
def test_a_full_disk_ends_the_run_in_one_sentence(flags, small_disk: Path, background):
    with pytest.raises(BadInput, match=r"the run's 30 checkpoints of .* take .*--keep_last n"):
        finetune(flags(run_root_dir=small_disk, max_steps=30, save_freq=1))
    config = flags(run_root_dir=small_disk, max_steps=30, **EVERY_STEP, save_in_background=background)
    with pytest.raises(BadInput, match=r"the checkpoint of step \d+ takes \d MB, and \d MB are free in .*keep_last 1"):
        finetune(config)
    whole = whole_checkpoints(config)
    assert whole and (config.run_dir / "checkpoints" / "latest").resolve().name in whole
    config.keep_last = 1
    finetune(config)
    assert len(whole_checkpoints(config)) == 2


def test_a_disk_that_fills_up_meanwhile_ends_the_run_at_the_next_step(flags, small_disk: Path, monkeypatch):
    config = flags(run_root_dir=small_disk, max_steps=40, **EVERY_STEP, save_in_background="True")
    monkeypatch.setattr("prismatic.training.runs.saving.Saver._make_room", lambda *_: None)
    with pytest.raises(BadInput, match="the disk is full, so run--.* was not written"):
        finetune(config)
    assert whole_checkpoints(config)


def test_a_weight_that_is_not_finite_is_not_saved(flags, tmp_path: Path):
    config = flags(save_freq=2, max_steps=8, save_in_background="False")
    run = build(config, Ranks(0, 1, torch.device("cpu")))
    name = "model.projector.fc1.weight"
    update = run.training.optimizer.step

    def step(*_):
        update()
        if run.training.step + 1 == 6:  # just before the third save, when no loss has seen it
            run.training.trained[name].data.view(-1)[0] = float("nan")

    run.training.optimizer.step = step
    config.run_dir.mkdir(parents=True)
    with pytest.raises(FloatingPointError, match="'projector.fc1.weight'.* holds NaN or infinite values"):
        train(run)
    assert whole_checkpoints(config) == ["run--2_chkpt", "run--4_chkpt"]
    assert (config.run_dir / "checkpoints" / "latest").resolve().name == "run--4_chkpt"


def test_a_copy_keeps_its_values_and_its_buffers():
    copy = HostCopy()
    content = {"a": torch.ones(3), "b": [{"c": torch.zeros(2, dtype=torch.bfloat16)}, 5], "betas": (0.9, 0.99)}
    first = copy(content)
    content["a"].add_(1)
    assert first["a"].tolist() == [1, 1, 1] and first["b"][1] == 5 and first["betas"] == (0.9, 0.99)
    again = copy(content)
    assert again["a"].data_ptr() == first["a"].data_ptr() and again["a"].tolist() == [2, 2, 2]
    assert again["b"][0]["c"].dtype == torch.bfloat16


def test_an_error_of_the_writer_is_raised_where_somebody_waits():
    writer = BackgroundWriter()
    writer.start(lambda: [][0])
    while writer.busy:
        pass
    assert writer.failed
    with pytest.raises(IndexError):
        writer.wait()
    writer.start(lambda: None)
    writer.wait()
    assert not writer.failed


def test_a_resumed_run_holds_no_file_of_its_checkpoint(flags):
    """One that is mapped keeps its room on the disk when the checkpoint is removed."""
    seen = []

    class Maps:
        def is_due(self, step):
            return True

        def rewind(self, step):
            pass

        def __call__(self, step, policy, stop):
            seen.append("training_state" in Path("/proc/self/maps").read_text())
            return {}

    assert (finetune(flags(run_id_override="held", max_steps=2)) / "training_state").is_dir()
    finetune(flags(run_id_override="held", max_steps=4, resume=True), [Maps()])
    assert seen == [False, False]
