"""Simulator processes that work on demonstrations of one task."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import LiberoTask

_environment: LiberoEnvironment | None = None
"""What this process simulates; made once, when the process starts."""


def open_pool(
    stack: contextlib.ExitStack, workers: int, task: LiberoTask, options: dict[str, Any]
) -> ProcessPoolExecutor:
    """Fresh processes for each task, because a process should never open a second renderer.

    Args:
        options: keyword arguments of each process's `LiberoEnvironment`.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _open_worker, (task, options))
    stack.callback(pool.shutdown, wait=True, cancel_futures=True)
    return pool


def worker_environment() -> LiberoEnvironment:
    """The environment of this simulator process."""
    assert _environment is not None
    return _environment


def _open_worker(task: LiberoTask, options: dict[str, Any]) -> None:
    global _environment
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: the processes are the parallelism
    _environment = LiberoEnvironment(task, **options)


def _end_with_parent() -> None:
    """A killed parent says no word to its pool, whose processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
