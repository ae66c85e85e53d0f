"""How long `Policy.act` takes beside busy processes, by how idle computing threads wait: medians and worst calls.

    python scripts/dev/benchmark_policy.py                                   # a small untrained policy, made here
    python scripts/dev/benchmark_policy.py --checkpoint FOLDER --calls 500 --busy 2

Measures three ways in turn, each in a process of its own, over and over: torch's defaults, `OMP_WAIT_POLICY=PASSIVE`
(idle threads sleep instead of spinning) and one thread. `--busy` processes that compute without end run beside all of
them. Every way gets equally many calls, spread alike over the run, so that what else the machine does meets all alike.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `scripts` is no installed package

from lightvla.demo.small_model import SmallModelConfig, build
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.command_line import parse_or_exit
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.policy import Policy
from prismatic.vla.normalization import fit_statistics

WAYS: dict[str, dict[str, str]] = {
    "defaults": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
THREAD_VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")
BUSY = "while True: pass"


@dataclass
class BenchmarkConfig:
    """What to measure."""

    checkpoint: Path | None = None  # a policy's folder; None: a small untrained policy
    calls: int = 200  # measured calls of each way, in all
    rounds: int = 4  # processes that these calls are spread over
    busy: int = 1  # processes that compute beside
    camera_size: int = 256  # side of the pictures in pixels
    device: str = "cpu"
    output: Path | None = None  # JSON of all times
    measure_only: int = 0  # internal: measure so many calls in this process


def small_policy(folder: Path) -> Path:
    """An untrained policy at the demo's size."""
    checkpoint = load_checkpoint(build(SmallModelConfig(output_dir=folder / "base")))
    model = checkpoint.model
    width, robot = model.language_model.config.hidden_size, model.robot
    checkpoint.action_head = L1RegressionActionHead(width, robot.action_dim, robot.chunk_length)
    checkpoint.proprio_projector = ProprioProjector(width, robot.proprio_dim)
    draw = np.random.default_rng(0)
    actions, states = (draw.uniform(-1, 1, (100, size)) for size in (robot.action_dim, robot.proprio_dim))
    checkpoint.dataset_statistics = {"made_up": fit_statistics(actions, states, robot.action_mask, 1)}
    model.config.center_crop = True
    return save_checkpoint(folder / "policy", checkpoint, 0)


def measure(config: BenchmarkConfig) -> list[dict[str, float]]:
    """Seconds by stage of each call in this process, after five that are not counted; `resident_mib` is its peak."""
    policy = Policy.from_pretrained(config.checkpoint or "", device=config.device)
    draw, side, robot = np.random.default_rng(0), config.camera_size, policy.robot
    times = []
    for call in range(config.measure_only + 5):
        observation: dict[str, Any] = {
            camera: draw.integers(256, size=(side, side, 3), dtype=np.uint8) for camera in robot.cameras
        }
        observation[robot.state_key] = draw.uniform(-1, 1, robot.proprio_dim)
        timing = policy.act_batch([observation], ["put the bowl on the plate"]).timing
        if call >= 5:
            times.append(timing)
        time.sleep(0.01)  # as a robot that moves in between
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [{**timing, "resident_mib": peak} for timing in times]


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_own_process(config: BenchmarkConfig, way: str, calls: int) -> list[dict[str, float]]:
    """As `measure`, in a process with that way's environment."""
    environment = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES} | WAYS[way]
    command = [
        sys.executable,
        str(Path(__file__)),
        "--checkpoint",
        str(config.checkpoint),
        "--measure_only",
        str(calls),
    ]
    command += ["--camera_size", str(config.camera_size), "--device", config.device]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(config: BenchmarkConfig, console: Console) -> dict[str, list[dict[str, float]]]:
    """The times of every way."""
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with busy_processes(config.busy):
        for _ in track(range(config.rounds), "rounds", console=console):
            for way, found in times.items():
                found += in_own_process(config, way, max(config.calls // config.rounds, 1))
    return times


def show(times: dict[str, list[dict[str, float]]], console: Console) -> None:
    """Prints milliseconds of whole calls and of preparing the images: median, 99 % quantile, worst."""
    table = Table("way", "calls", "median", "99 %", "worst", "images", "99 %", "worst", "memory", title="milliseconds")
    for way, found in times.items():
        cells = []
        for stage in ("total", "preprocessing"):
            values = 1e3 * np.array([timing[stage] for timing in found])
            cells += [f"{value:.1f}" for value in (np.median(values), np.quantile(values, 0.99), values.max())]
        table.add_row(way, str(len(found)), *cells, f"{max(timing['resident_mib'] for timing in found):.0f} MiB")
    console.print(table)


def main() -> None:
    config = parse_or_exit(BenchmarkConfig)
    if config.measure_only:
        print(json.dumps(measure(config)))
        return
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        config.checkpoint = config.checkpoint or small_policy(Path(folder))
        times = run(config, console)
    show(times, console)
    if config.output is not None:
        config.output.write_text(json.dumps(times))


if __name__ == "__main__":
    main()
