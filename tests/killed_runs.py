"""Runs that are killed: processes of one run, forked from this one so that they start in a moment."""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.command_status import PREEMPTED
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import finetune
from prismatic.training.preemption import Preempted

_CONTEXT = multiprocessing.get_context("fork")
_START_S = 120.0


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _train(make: Callable[[], FinetuneConfig], environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        torch.set_num_threads(1)
        try:
            finetune(make())
        except Preempted:
            os._exit(PREEMPTED)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)


def start(make: Callable[[], FinetuneConfig], ranks: int, log: Path) -> list[BaseProcess]:
    """The processes of a run, as torchrun starts them. `make` gives the flags, in the process."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        process = _CONTEXT.Process(target=_train, args=(make, environment if ranks > 1 else {}, log))
        process.start()
        processes.append(process)
    return processes


def end(processes: Sequence[BaseProcess], number: int = signal.SIGKILL) -> list[int | None]:
    """Send a signal to all that live, wait, and return the exit statuses."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, number)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def wait_until(reached: Callable[[], bool], processes: Sequence[BaseProcess]) -> bool:
    """Wait for something; False where the processes ended before."""
    deadline = time.monotonic() + _START_S
    while not reached():
        if not any(process.is_alive() for process in processes):
            return False
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.002)
    return True


def steps_done(config: FinetuneConfig) -> int:
    """The last step in the run's metrics."""
    file = config.run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def _has_reached(config: FinetuneConfig, step: int) -> bool:
    return steps_done(config) >= step


def is_saving(config: FinetuneConfig) -> bool:
    """Whether a checkpoint is being written."""
    return any(config.checkpoint_dir(0).parent.glob(".*.saving"))


def read_for_ever(run: Path, failures) -> None:
    """An evaluator: loads the newest checkpoint again and again, and tells what goes wrong."""
    torch.set_num_threads(1)
    while True:
        if (run / "checkpoints" / "latest").exists():
            try:
                load_checkpoint(run)
            except BaseException as error:
                failures.put(f"{type(error).__name__}: {error}")
        time.sleep(0.01)


def kill_again_and_again(
    make: Callable[[], FinetuneConfig], ranks: int, kills: int, log: Path, seed: int = 0
) -> tuple[int, int, list[str]]:
    """SIGKILL a run at random moments, every second one inside a save, start it again, and let it finish at last.

    Returns:
        How often it was killed, how often a save was under way then, and what an evaluator met that read meanwhile.
    """
    config, draws = make(), random.Random(seed)
    failures = _CONTEXT.SimpleQueue()
    reader = _CONTEXT.Process(target=read_for_ever, args=(config.run_dir, failures), daemon=True)
    reader.start()
    done = inside = 0
    while done < kills:
        processes = start(make, ranks, log)
        at_step = steps_done(config) + 1
        if done % 2:
            going = wait_until(lambda: is_saving(config), processes)
            time.sleep(draws.random() * 0.02)
        else:
            going = wait_until(partial(_has_reached, config, at_step), processes)
            time.sleep(draws.random() * 0.5)
        inside += is_saving(config)
        statuses = end(processes)
        if not going or 0 in statuses:
            assert set(statuses) <= {0, -signal.SIGKILL}, (statuses, log.read_text()[-5000:])
            if set(statuses) == {0}:
                break
        done += 1
    statuses = end(start(make, ranks, log), 0)
    assert set(statuses) == {0}, (statuses, log.read_text()[-5000:])
    reader.kill()
    found = []
    while not failures.empty():
        found.append(failures.get())
    return done, inside, found
