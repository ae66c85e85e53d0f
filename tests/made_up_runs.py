"""Runs' folders, written by what writes them in training, without a training; and their pages, read back."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report_page import Page, write_video

from prismatic.training.config import FinetuneConfig
from prismatic.training.logging import JsonLines
from prismatic.training.runs.record import record_start
from prismatic.training.runs.saving import Facts
from prismatic.vla.robots import LIBERO, RobotSpec


def training_line(step: int) -> dict[str, Any]:
    return {
        "loss": 1 / step, "l1_current": 0.5 / step, "l1_next": 1.1 / step, "tokens_kept": 40.0 - step / 10,
        "tokens_kept_min": 20.0, "tokens_kept_max": 60.0, "tokens_kept_per_image": [15.0, 25.0 - step / 10],
        "host_peak_gb": 1.25, "learning_rate": 5e-4, "noise_scale": 1 - step / 200, "grad_norm": 2 / step,
        "bad_samples": 0.0, "step_time_s": 0.5, "data_wait_s": 0.1, "samples_per_s": 16.0, "loss_spike": 0.0,
    }  # fmt: skip


def write_run(folder: Path, steps: int = 100, robot: RobotSpec = LIBERO, **flags: Any) -> FinetuneConfig:
    """A run that has come to a step, with a validation every 20 steps; nobody holds it, and it has not ended."""
    config = FinetuneConfig(
        run_root_dir=folder, run_id_override=flags.pop("name", "run"), **{"max_steps": 200, "device": "cpu", **flags}
    )
    config.run_dir.mkdir(parents=True)
    facts = Facts("/models/base", "sha256:base", {"libero_tiny_no_noops": "sha256:data"}, 200, 8, {"bf16": False})
    record_start(config, facts, robot, 0, 1, "cpu", [])
    lines = JsonLines(config.run_dir / "metrics.jsonl")
    for step in range(1, steps + 1):
        lines.write(step, training_line(step))
        if step % 20 == 0:
            errors = [round(0.1 + 0.01 * n + 1 / step, 6) for n in range(robot.action_dim)]
            lines.write(step, {
                "val_loss": 0.5 + (step - 60) ** 2 / 1e4, "val_l1_current": 0.4, "val_l1_next": 0.5,
                "val_tokens_kept": 38.0, "val_frames": 90.0, "val_l1_dimensions": errors,
                "val_l1_current_dimensions": [error / 2 for error in errors],
            })  # fmt: skip
    lines.close()
    return config


def add_pictures_and_rollouts(run: Path) -> None:
    """As a run leaves them that draws what it keeps, and rolls out."""
    kept = run / "pictures" / "kept"
    kept.mkdir(parents=True)
    steps = (10, 100)
    for step in steps:
        Image.fromarray(np.full((32, 48, 3), step, np.uint8)).save(kept / f"step_{step:08d}.webp")
    Image.fromarray(np.full((32, 96, 3), 90, np.uint8)).save(run / "pictures" / "strip.webp")
    write_video(run / "pictures" / "kept.mp4")
    listed = [
        {"step": step, "file": f"kept/step_{step:08d}.webp", "tokens_kept": [[20, 21], [20, 20]]} for step in steps
    ]
    (run / "pictures" / "pictures.json").write_text(json.dumps(listed))
    (run / "rollouts" / "50").mkdir(parents=True)
    write_video(run / "rollouts" / "50" / "a b.mp4")
    task = {"suite": "libero_goal", "task": 1, "instruction": "open the drawer"}
    rollouts = [
        {"step": 50, **task, "initial_state": 3, "success": True, "steps": 80, "video": "rollouts/50/a b.mp4"},
        {"step": 50, **task, "initial_state": 4, "success": False, "steps": 300, "video": None},
        {"step": 100, **task, "initial_state": 3, "success": True, "steps": 60, "video": None},
    ]
    text = "".join(json.dumps(item) + "\n" for item in rollouts)
    (run / "rollouts.jsonl").write_text(text + '{"step": 100, "ta')


def read(page: Path) -> Page:
    return Page(page.read_text())


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", " ".join(read(page).text))


class Rows(HTMLParser):
    """The rows of all tables, as lists of texts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def row(self, name: str) -> list[str]:
        (found,) = (row[1:] for row in self.rows if row and row[0] == name)
        return found
