"""One process or many: the same calls work under torchrun (nccl on GPUs, gloo on CPUs) and without it."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from prismatic.command_line import named_by_node, several_nodes

EXCHANGE_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another one inside a step, before it gives up: what hangs is noticed."""
SAVE_TIMEOUT = timedelta(hours=6)
"""How long the others wait at a barrier, unless asked otherwise: one process merges and writes a whole checkpoint."""

PATIENCE = timedelta(seconds=30)
"""How long a process that cannot go on tries to tell the others so."""


class ElsewhereError(RuntimeError):
    """Another process cannot go on, so neither can this one."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, among how many, and the device it computes on.

    Attributes:
        rank: 0 is the main process.
        world_size: number of processes.
        device: this process computes on it.
        waiting: group with a long timeout for `barrier`; None: the default group.
    """

    rank: int
    world_size: int
    device: torch.device
    waiting: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes, also for one that writes a checkpoint meanwhile."""
        if self.world_size > 1:
            dist.barrier(self.waiting)

    @contextmanager
    def together(self, *errors: type[Exception]) -> Iterator[None]:
        """An error of these kinds that one process raises inside is raised by all, after all have left the block.

        Raises:
            ElsewhereError: in a process that has none itself, with the words of the first that has.
        """
        own: Exception | None = None
        try:
            yield
        except errors as error:
            own = error
        words = None if own is None else named_by_node(str(own) or type(own).__name__)
        for rank, what in enumerate(self.gather(words)):
            if own is not None:
                raise own
            if what is not None:
                where = " " if what.startswith("on node ") else ": "
                raise ElsewhereError(f"process {rank} of {self.world_size}{where}{what}")

    def gather(self, value: Any) -> list[Any]:
        """What every process passes, in order of rank; pickled, between processes of one run only.

        Waits as long as `barrier`.
        """
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self.waiting)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """What the main process passes, in all of them; pickled, between processes of one run only.

        Waits as long as `barrier`.
        """
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.waiting)
        return held[0]

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Which of the flags are set in at least one process. Waits as long as `barrier`.

        On the CPU, so that a GPU's work goes on meanwhile.
        """
        if self.world_size == 1:
            return list(flags)
        numbers = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.waiting)
        return [value > 0 for value in numbers.tolist()]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of `values` over all processes; `values` itself is left alone."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum of `values` over all processes."""
        if self.world_size == 1:
            return values
        largest = values.to(self.device, copy=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise mean of `values` over all processes."""
        return self.sum(values) / self.world_size


def withdraw(device_name: str, message: str) -> None:
    """Tell processes on other nodes, which wait for this one, why it ends. On its own node torchrun ends them.

    They must be at, or on their way to, their first `Ranks.together`. Gives up after half a minute.

    Args:
        device_name: as in `ranks`.
        message: names the node (`named_by_node`).
    """
    if not several_nodes() or not _is_awaited():
        return
    # An error here: nobody is there, or nobody any more.
    with suppress(RuntimeError, ValueError), ranks(device_name, PATIENCE, PATIENCE) as group:
        group.gather(message)


def _is_awaited() -> bool:
    """Whether somebody listens where processes meet (asked before, since torch complains of it at length)."""
    if os.environ.get("RANK") == "0":
        return True  # the others come here
    address = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        try:
            socket.create_connection(address, timeout=5).close()
            return True
        except OSError:
            time.sleep(1)
    return False


def resolve_device(name: str) -> torch.device:
    """`auto` takes this process's own GPU if there is one, `cpu` and `cuda` say so.

    Raises:
        ValueError: for another name, for `cuda` on a machine without a usable GPU, or with more processes than GPUs.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {name!r} is unknown; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError(
            "device 'cuda' was asked for, but torch sees no GPU; pass --device cpu or install a CUDA torch"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    processes, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > count:
        raise ValueError(f"{processes} processes cannot share {count} GPUs; pass --nproc-per-node {count} or less")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _meeting_place(timeout: timedelta) -> dict[str, Any]:
    """Where processes that torchrun has started again meet: apart from those of the try before.

    torchrun keeps one store for all tries, in which they find the addresses of processes that are dead by now. On
    several nodes the tries are not counted alike; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each its own store.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or several_nodes():
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    return {"store": dist.PrefixStore(f"try {attempt}", store), "rank": rank, "world_size": world_size}


@contextmanager
def ranks(
    device_name: str, save_timeout: timedelta = SAVE_TIMEOUT, exchange_timeout: timedelta = EXCHANGE_TIMEOUT
) -> Iterator[Ranks]:
    """Join torchrun's process group if its variables are set, and leave it at the end.

    Args:
        device_name: as in `resolve_device`.
        save_timeout: how long a barrier waits, as others do while the main process writes a checkpoint.
        exchange_timeout: how long everything else waits. The barrier has a group of its own, so that a process that
            hangs inside a step is noticed much sooner than the longest save takes.
    """
    device = resolve_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Ranks(0, 1, device)
        return
    is_gpu = device.type == "cuda"
    backend = "nccl" if is_gpu else "gloo"
    dist.init_process_group(
        backend, timeout=exchange_timeout, device_id=device if is_gpu else None, **_meeting_place(exchange_timeout)
    )
    try:
        waiting = dist.new_group(backend="gloo", timeout=save_timeout)  # on the CPU: GPUs are idle meanwhile
        assert isinstance(waiting, dist.ProcessGroup)
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, waiting)
    finally:
        dist.destroy_process_group()
