import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from prismatic.checkpoints.files import resolve
from prismatic.checkpoints.manifest import write_manifest
from prismatic.training.runs import folder as run_folder
from prismatic.training.runs.folder import RunFolder


def write(run: RunFolder, step: int, loss: float | None = None) -> Path:
    """A checkpoint as far as its place in the run's folder is concerned."""
    folder = run.checkpoint_dir(step)
    (folder / "training_state").mkdir(parents=True)
    torch.save({"step": step}, folder / "training_state" / "state.pt")
    (folder / "config.json").write_text("{}")
    write_manifest(folder, step, {} if loss is None else {"validation_loss": loss})
    run.point("latest", folder)
    return folder


def test_the_newest_whole_checkpoint_is_the_one_to_go_on_from(tmp_path: Path, caplog):
    run = RunFolder(tmp_path / "run")
    assert run.saved() == {} and run.newest_state() is None
    folders = {step: write(run, step) for step in (5, 20, 100)}
    assert list(run.saved()) == [5, 20, 100]
    (folders[100] / "config.json").unlink()
    found = run.newest_state()
    assert (
        found is not None and found[0] == folders[20] and "100_chkpt is left out: config.json is missing" in caplog.text
    )
    (folders[20] / "training_state" / "state.pt").write_bytes(b"PK\3\4" + b"x" * 100)
    write_manifest(folders[20], 20)
    found = run.newest_state()
    assert found is not None and found[0] == folders[5] and "20_chkpt is left out" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"--resume 7: .* no checkpoint of that step \(5, 20\)"):
        run.newest_state(7)


def test_checkpoints_of_earlier_versions_are_found(tmp_path: Path):
    for name, step in (("run--7_chkpt", 7), ("run", 9), ("run--x--8_chkpt", 8)):
        (tmp_path / name / "training_state").mkdir(parents=True)
        torch.save({"step": step}, tmp_path / name / "training_state" / "state.pt")
    assert RunFolder(tmp_path / "run").saved() == {7: tmp_path / "run--7_chkpt", 9: tmp_path / "run"}


def test_going_back_sets_aside_what_an_earlier_version_wrote(tmp_path: Path):
    for step in (2, 4):
        (tmp_path / f"run--{step}_chkpt" / "training_state").mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    run.go_back_to(2)
    assert [*run.saved()] == [2] and (run.checkpoints / "superseded" / "run--4_chkpt").is_dir()


def test_pointers_and_published_places_lead_to_checkpoints(tmp_path: Path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    first, second = write(run, 1, loss=0.5), write(run, 2, loss=0.7)
    run.point("best", first)
    assert resolve(tmp_path / "run") == resolve(run.checkpoints / "latest") == second
    assert resolve(run.checkpoints / "best") == first
    assert resolve(tmp_path / "run--1_chkpt") == first, "where the published code would put it"
    monkeypatch.chdir(tmp_path)
    assert resolve("run") == Path("run/checkpoints/run--2_chkpt")
    with pytest.raises(FileNotFoundError, match="run--3_chkpt does not exist"):
        resolve(tmp_path / "run--3_chkpt")


def test_room_is_made_for_the_next_one(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4), (4, 0.3), (5, 0.6)):
        write(run, step, loss)
    run.make_room(0, keep_best=False)
    assert list(run.saved()) == [1, 2, 3, 4, 5]
    run.make_room(2, keep_best=True)
    assert list(run.saved()) == [2, 4, 5], "the best is the first of two equal ones"
    run.make_room(1, keep_best=False)
    assert list(run.saved()) == [5] and sorted(path.name for path in run.checkpoints.iterdir()) == [
        "latest", "run--5_chkpt",
    ]  # fmt: skip


def test_going_back_sets_later_ones_aside(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    for step in (1, 2, 3):
        write(run, step)
    run.go_back_to(2)
    assert list(run.saved()) == [1, 2] and resolve(run.path).name == "run--2_chkpt"
    assert [path.name for path in (run.checkpoints / "superseded").iterdir()] == ["run--3_chkpt"]
    write(run, 3)
    run.go_back_to(2)
    assert len(list((run.checkpoints / "superseded").iterdir())) == 2, "nothing is overwritten"


def test_going_back_behind_the_best_leads_to_the_best_that_is_left(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    for step, loss in ((1, 0.7), (2, 0.5), (3, 0.6), (4, 0.3)):
        write(run, step, loss)
    run.point("best", run.checkpoint_dir(4))
    run.go_back_to(3)
    assert resolve(run.checkpoints / "best") == run.checkpoint_dir(2)
    run.point("best", run.checkpoint_dir(3))
    run.go_back_to(3)
    assert resolve(run.checkpoints / "best") == run.checkpoint_dir(3), "it is still there"
    for step in (1, 2):
        write_manifest(run.checkpoint_dir(step), step)  # saved before there were validation losses
    run.go_back_to(2)
    assert not (run.checkpoints / "best").is_symlink()


def hold(path: Path, held) -> None:
    with RunFolder(path).held():
        held.set()
        signal.pause()


def test_one_process_trains_a_run(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.1)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", held))
    other.start()
    assert held.wait(60)
    with (
        pytest.raises(ValueError, match=f"process {other.pid} on .* is training the run"),
        RunFolder(tmp_path / "run").held(),
    ):
        pass
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with RunFolder(tmp_path / "run").held():
        pass  # who is dead holds nothing
