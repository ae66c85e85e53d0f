import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from prismatic.training.distributed import Ranks
from prismatic.training.logging import JsonLines, RunLog, TensorBoard, Window
from prismatic.training.step import StepMetrics

ALONE = Ranks(0, 1, torch.device("cpu"))


def metrics(loss: float, kept: list[list[int]]) -> StepMetrics:
    value = torch.tensor(loss)
    return StepMetrics(value, value / 2, value / 4, torch.tensor(kept), torch.full((2, 7), loss))


def test_a_window_averages_micro_steps_and_samples():
    window = Window()
    window.add(metrics(1.0, [[1, 2], [3, 4]]))
    window.add(metrics(3.0, [[5, 6], [7, 8]]))
    values = window.flush(ALONE)
    assert (values["loss"], values["l1_current"], values["l1_next"]) == (2.0, 1.0, 0.5)
    assert values["tokens_kept"] == 9.0 and values["tokens_kept_per_image"] == [4.0, 5.0]
    assert (values["tokens_kept_min"], values["tokens_kept_max"]) == (3.0, 15.0)
    window.add(metrics(5.0, [[1, 1]]))
    assert window.flush(ALONE)["loss"] == 5.0


def test_json_lines_of_a_resumed_run_continue_behind_its_step(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    first.close()
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed while writing
    second = JsonLines(path, resume_step=2)
    second.write(3, {"loss": 30.0})
    second.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 30.0},
    ]


def test_lines_that_hold_no_step_are_dropped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "lo\n\xff\n[1]\n{"loss": 1}\n{"step": 2, "loss": 2.0}\n')
    JsonLines(path, resume_step=2).close()
    assert json.loads(path.read_text()) == {"step": 2, "loss": 2.0}
    assert [f"line {number}," in caplog.text for number in (1, 2, 3, 4, 5)] == [True] * 4 + [False]


def test_a_sink_on_a_full_disk_keeps_no_other_open(flags, monkeypatch, caplog: pytest.LogCaptureFixture):
    with RunLog(flags(), ALONE, 0) as run_log:
        sinks = [sink for _, sink in run_log._sinks]
        sinks[0].close()
        sinks[0]._file = open("/dev/full", "w")  # noqa: SIM115
        sinks[0]._file.write("x")
    assert "may be missing in JsonLines: [Errno 28]" in caplog.text
    assert sinks[1]._records.closed


def test_tensorboard_reads_back_what_was_written(tmp_path: Path):
    writer = TensorBoard(tmp_path)
    writer.write(1, {"loss": 0.5, "tokens_kept_per_image": [3.0, 4.0]})
    writer.write(2, {"loss": 0.25})
    writer.close()
    program = """
import sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")  # read without TensorFlow: it takes seconds to import
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]).Reload()
print(events.Tags()["scalars"], [(e.step, e.value) for e in events.Scalars("loss")])
"""
    shown = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == (
        "['loss', 'tokens_kept_per_image/0', 'tokens_kept_per_image/1'] [(1, 0.5), (2, 0.25)]"
    )


def test_tensorboard_reads_back_a_picture(tmp_path: Path):
    picture = np.random.default_rng(0).integers(0, 255, (6, 4, 3), dtype=np.uint8)
    writer = TensorBoard(tmp_path)
    writer.write_picture(50, "kept_tokens", picture)
    writer.close()
    program = """
import io, sys, types
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")  # read without TensorFlow: it takes seconds to import
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
(event,) = EventAccumulator(sys.argv[1]).Reload().Images("kept_tokens")
print(event.step, event.width, event.height, np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).tolist())
"""
    shown = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"50 4 6 {picture.tolist()}"


def test_every_frequency_has_its_own_window(flags):
    config = flags(log_freq=2, tensorboard_log_freq=3, max_steps=6)
    with RunLog(config, ALONE, 0) as run_log:
        for step in range(1, 7):
            run_log.add(metrics(float(step), [[1, 1]]), waited=0.0)
            run_log.step(step, {"learning_rate": 1e-3, "noise_scale": 0.0})
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (4, 3.5), (6, 5.5)]


def test_a_run_that_goes_back_tells_its_steps_anew(flags):
    config = flags(log_freq=1, tensorboard_log_freq=2, max_steps=4)
    with RunLog(config, ALONE, 0) as run_log:
        for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0)):
            run_log.add(metrics(loss, [[1, 1]]), waited=0.0)
            run_log.step(step, {"learning_rate": 1e-3})
        run_log.add(metrics(9.0, [[1, 1]]), waited=0.0)
        run_log.rewind(1)
        run_log.step(2, {"learning_rate": 1e-3, "skipped_steps": 1})  # a step without metrics
        run_log.add(metrics(5.0, [[1, 1]]), waited=0.0)
        run_log.step(3, {"learning_rate": 1e-3})
    told = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("loss")) for line in told] == [(1, 1.0), (2, None), (3, 5.0)]
