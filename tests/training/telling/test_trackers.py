"""Weights & Biases offline, as it is installed; what is said of trackers that cannot be had."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
from wandb_file import history, offline_files

from prismatic.training.config import FinetuneConfig
from prismatic.training.preflight import check_flags
from prismatic.training.telling.trackers import Wandb, kept_id
from prismatic.training.telling.values import Named, flat


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "tracking"),
    [
        ({}, "none"),
        ({"use_wandb": True}, "wandb"),
        ({"tracker": "wandb"}, "wandb"),
        ({"tracker": "wandb", "use_wandb": True}, "wandb"),
        ({"tracker": "none"}, "none"),
    ],
)
def test_both_names_of_the_flag_mean_the_same(offline: None, given: dict[str, Any], tracking: str) -> None:
    config = FinetuneConfig(**given)
    assert config.tracking == tracking
    check_flags(config)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tracker": "mlflow"}, "--tracker 'mlflow' is unknown; choose one of wandb, trackio, none"),
        ({"tracker": "trackio", "use_wandb": True}, "--use_wandb True with --tracker trackio; leave one of them out"),
        ({"tracker": "none", "use_wandb": True}, "--use_wandb True with --tracker none; leave one of them out"),
    ],
)
def test_what_no_tracker_can_do_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_flags(FinetuneConfig(**given))


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_a_tracker_that_is_not_installed_is_named() -> None:
    with pytest.raises(ValueError, match="^--tracker trackio needs trackio, .*: pip install trackio$"):
        check_flags(FinetuneConfig(tracker="trackio"))


def told(run: Path, file: int, least: int) -> list[dict[str, Any]]:
    """Of one of the offline files, which another process writes."""
    deadline = time.monotonic() + 60
    while len(rows := history(offline_files(run)[file])) < least and time.monotonic() < deadline:
        time.sleep(0.2)
    return rows


def test_a_run_that_goes_on_goes_on_at_wandb(offline: None, tmp_path: Path) -> None:
    config = FinetuneConfig(run_root_dir=tmp_path, run_id_override="run", tracker="wandb")
    config.run_dir.mkdir()
    for resume_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        sink = Wandb(config, resume_step)
        for step in steps:
            sink.write(step, {"loss": 1.0 / step, "val_l1_dimensions": Named(("x", "rot x"), (0.25, 0.5))})
        sink.close()
    first, second = offline_files(config.run_dir)
    kept = json.loads((config.run_dir / "tracker.json").read_text())["wandb"]
    assert first.name == second.name == f"run-{kept}.wandb"
    assert [row["_step"] for row in told(config.run_dir, 0, 3)] == [1, 2, 3]
    rows = told(config.run_dir, 1, 2)
    assert [row["_step"] for row in rows] == [3, 4] and rows[1]["loss"] == 0.25
    assert rows[1]["val_l1_dimensions/x"] == 0.25 and rows[1]["val_l1_dimensions/rot x"] == 0.5


def test_one_that_begins_anew_has_an_id_of_its_own(tmp_path: Path) -> None:
    first = kept_id(tmp_path, 0)
    assert kept_id(tmp_path, 5) == first != kept_id(tmp_path, 0)


@pytest.mark.parametrize("content", ['{"wandb', "{}", "[]"])
def test_an_id_that_cannot_be_read_costs_no_run(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tracker.json").write_text(content)
    made = kept_id(tmp_path, 5)
    assert "does not hold the run's id" in caplog.text and kept_id(tmp_path, 6) == made


def test_lists_have_the_names_of_their_dimensions() -> None:
    values = {"loss": 1.0, "kept": [2.0, 3.0], "l1": Named(("x", "gripper"), (0.5, 0.25))}
    assert flat(values) == {"loss": 1.0, "kept/0": 2.0, "kept/1": 3.0, "l1/x": 0.5, "l1/gripper": 0.25}
    assert json.loads(json.dumps(values))["l1"] == [0.5, 0.25]
