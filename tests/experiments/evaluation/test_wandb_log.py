"""What Weights & Biases is told while an evaluation runs, read back from the file of an offline run."""

import time
from pathlib import Path

import pytest
from wandb_file import history, offline_files

from experiments.robot.libero.evaluation.plan import make_plan
from experiments.robot.libero.evaluation.wandb_log import WandbLog
from experiments.robot.libero.results.results import EpisodeRecord, Results
from experiments.robot.libero.settings.flags import EvaluationConfig

pytest.importorskip("wandb")


def episode(state: int, success: bool | None, policy_ms: list[float]) -> EpisodeRecord:
    return EpisodeRecord(
        "libero_goal", 1, "do_it", "do it", state, state, 7, success=success, invalid="x" if success is None else None,
        steps=40 + state, tokens_kept=[10, 20], num_visual_tokens=98, latency_ms=[60.0, 60.0], policy_ms=policy_ms,
        call_queries=[1, 1], jerk=2.5,
    )  # fmt: skip


def test_every_episode_is_logged_as_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    config = EvaluationConfig(
        pretrained_checkpoint="x", task_suite_name="libero_goal", task_ids="1", initial_states="0-2", use_wandb=True,
        control="blank_images", output_dir=str(tmp_path),
    )  # fmt: skip
    log = WandbLog(make_plan(config))
    ended = [episode(0, True, [12.0, 14.0]), episode(1, False, []), episode(2, None, [900.0, 900.0])]
    for record in ended:
        log.episode(record)
    log.finish(Results(episodes=ended))
    deadline = time.monotonic() + 60
    (file,) = offline_files(tmp_path)
    while len(rows := history(file)) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)  # another process writes the file
    assert [row["success_rate_so_far"] for row in rows[:3]] == [1.0, 0.5, 0.5]
    assert [row.get("episode/policy_ms") for row in rows[:3]] == [13.0, None, None]
    assert (rows[0]["episode/waiting_ms"], rows[0]["episode/tokens_kept"], rows[0]["episode/steps"]) == (47.0, 15.0, 40)
    assert "episode/tokens_kept" not in rows[2] and rows[2]["invalid_so_far"] == 1
    last = rows[3]
    assert (last["success_rate/do_it"], last["success_rate/all"], last["policy_ms"]) == (0.5, 0.5, 13.0)
    assert (last["mean_steps_to_success"], last["mean_jerk"], last["tokens_kept"]) == (40.0, 2.5, 15.0)


def test_without_the_flag_nothing_is_begun(tmp_path: Path) -> None:
    config = EvaluationConfig(
        pretrained_checkpoint="x", task_suite_name="libero_goal", task_ids="1", control="blank_images",
        output_dir=str(tmp_path),
    )  # fmt: skip
    log = WandbLog(make_plan(config))
    log.episode(episode(0, True, [12.0, 14.0]))
    log.close()
    assert not (tmp_path / "wandb").exists()
