"""Small results files with real videos beside them, and what a report makes of them."""

import hashlib
from pathlib import Path

import numpy as np

from experiments.robot.libero.reports.evaluation import load_evaluations
from experiments.robot.libero.reports.page import report_data
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import FILE_NAME, EpisodeRecord, Results
from prismatic.pictures.images import encode_png
from prismatic.report.data import ReportData, Table
from prismatic.report.media import MediaFiles

POLICY = {
    "checkpoint": "runs/small",
    "parameters": 1_700_000,
    "pruner": "lightvla",
    "robot": {"control_rate_hz": 20.0, "open_loop_steps": 8},
    "assumptions": ["two images are read"],
}
CONFIG = {"task_suite_name": "libero_goal", "num_steps_wait": 10, "env_img_res": 128, "wide_starts_m": 0.06}
RUN = {"command": ["eval.py", "--seed", "7", "--note", "a b"], "complete": True, "seed": 7, "seconds": 61.0}


def digest(what: object) -> str:
    """A hash as results hold them: 64 hexadecimal digits, equal for what is written alike."""
    return hashlib.sha256(str(what).encode()).hexdigest()


def episode(task: int, trial: int, success: bool | None, **more: object) -> EpisodeRecord:
    """A rollout of three queries whose stages take 1, 2, 3 and 4 ms of 15, behind 45 ms of waiting."""
    base = {"suite": "libero_goal", "task_index": task, "task_name": f"put_it_in_place_{task}", "instruction": "do it"}
    invalid = None if success is not None else "Traceback (most recent call last):\n  x\nValueError: the bowl fell"
    given = {"initial_state": trial, "trial": trial, "seed": 7, "success": success, "invalid": invalid, "steps": 20}
    stages = {"preprocessing": 1.0, "vision": 2.0, "pruner": 3.0, "llm": 4.0, "total": 11.0}
    queries = {"tokens_kept": [12, 10, 8], "num_visual_tokens": 98, "latency_ms": [60.0] * 3}
    queries |= {"policy_ms": [15.0] * 3, "call_queries": [1] * 3}
    times = {"stage_ms": {name: [time] * 3 for name, time in stages.items()}}
    return EpisodeRecord(**{**base, **given, **queries, **times, **more})  # type: ignore[arg-type]


def save(folder: Path, episodes: list[EpisodeRecord], videos: Path | None = None, **parts: dict) -> Path:
    """A results file with a video and a picture for each rollout that has an outcome, where `videos` gives one."""
    for record in episodes:
        if videos is not None and record.invalid is None:
            record.video = f"videos/task{record.task_index} trial{record.trial}.mp4"
            path = folder / record.video
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(videos.read_bytes())
            path.with_suffix(".png").write_bytes(encode_png(np.full((8, 8, 3), 128, np.uint8)))
    results = Results(
        {**RUN, **parts.get("run", {})},
        {**CONFIG, **parts.get("config", {})},
        {**POLICY, **parts.get("policy", {})},
        collect_versions(),
        episodes,
    )
    results.save(folder / FILE_NAME)
    return folder


def data_of(*folders: Path, room: int = 10**8) -> ReportData:
    return report_data(load_evaluations(folders), MediaFiles(folders[0], room))


def tables(data: ReportData) -> dict[str, Table]:
    return {block.title: block for section in data.sections for block in section.blocks if isinstance(block, Table)}


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in (*table.cells, *table.total_cells)]
