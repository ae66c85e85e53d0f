"""Processes that save, are killed inside a save, and start again, while others read: `python FILE POLICY RUNS KILLS`.

Ends with one line of JSON. The processes are forked, so that all share what took seconds to import.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch

from prismatic.checkpoints.atomic_folder import remove_leftovers
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.manifest import is_complete
from prismatic.checkpoints.saving import load_training_state, save_checkpoint

READERS = 3


def newest(runs: Path) -> Path | None:
    """The folder of the highest step, by its name alone."""
    steps = [
        (int(match[1]), path) for path in runs.glob("*") if (match := re.fullmatch(r"run--(\d+)_chkpt", path.name))
    ]
    return max(steps)[1] if steps else None


def write(runs: Path, checkpoint: Checkpoint) -> None:
    """Save step after step behind the newest, until killed."""
    while True:
        folder = newest(runs)
        step = 1 if folder is None else int(load_training_state(folder)["step"]) + 1
        with torch.no_grad():
            checkpoint.model.projector.fc1.bias.fill_(step)
        state = {"step": step, "parameters": {"a": torch.full((100_000,), float(step))}}
        save_checkpoint(runs / f"run--{step}_chkpt", checkpoint, step, training_state=state)


def read(runs: Path, stop: Path, evaluates: bool) -> int:
    """Read the newest checkpoint over and over, as a rank that resumes or as an evaluation; returns how often."""
    reads = 0
    while not stop.exists():
        if (folder := newest(runs)) is None:
            continue
        step = int(folder.name.split("--")[1].split("_")[0])
        assert is_complete(folder), folder
        if evaluates:
            bias = load_checkpoint(folder).model.projector.fc1.bias
            assert (bias == torch.tensor(step).to(bias.dtype)).all(), (folder, bias)
        else:
            state = load_training_state(folder)
            assert state["step"] == step and (state["parameters"]["a"] == step).all()
        reads += 1
    return reads


def start(job, told: Path | None = None) -> int:
    """A forked process that ends with `job`; what it returns or raises is written to `told`."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        result = job()
        status = 0
    except BaseException as error:
        result = repr(error)
    if told is not None:
        told.write_text(json.dumps(result))
    os._exit(status)


def main(policy: Path, runs: Path, kills: int) -> None:
    """Kill so many writers, each at a random moment after it has begun to write."""
    torch.set_num_threads(1)  # threads do not live on in a forked process
    checkpoint = load_checkpoint(policy)
    runs.mkdir()
    stop = runs.with_name("stop")
    told = [runs.with_name(f"reader-{index}.json") for index in range(READERS)]
    readers = [start(lambda i=i: read(runs, stop, evaluates=i == 0), told[i]) for i in range(READERS)]
    draw, inside, removed = random.Random(0), 0, 0
    for _ in range(kills):
        before = newest(runs)
        writer = start(lambda: write(runs, checkpoint))
        while newest(runs) == before or not list(runs.glob(".*.saving")):  # one save is done, the next has begun
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        inside += len(list(runs.glob(".*.saving")))
        removed += len(remove_leftovers(runs, "run--*_chkpt"))
    stop.touch()
    for reader in readers:
        os.waitpid(reader, 0)
    results = [json.loads(file.read_text()) for file in told]
    summary = {
        "errors": [result for result in results if not isinstance(result, int)],
        "reads": [result for result in results if isinstance(result, int)],
        "killed_inside": inside,
        "removed": removed,
        "saved": len(list(runs.glob("run--*_chkpt"))),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
