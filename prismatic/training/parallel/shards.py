"""Tensors that are divided among the processes of a run, each holding its rows; any other tensor is whole everywhere.

The one place that knows torch's `DTensor`: the others ask for a tensor's own part, or for all of it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it, itself: perhaps no row at all, and the tensor where it is not divided."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, divided as `like` is; every process has all of it, so nothing is exchanged."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    # A copy, which does not keep the whole one in memory.
    return distribute_tensor(whole.detach(), like.device_mesh, like.placements, src_data_rank=None).clone()


def total_norm(norm: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """() the norm of what all processes hold of tensors that are divided as `like` is, from that of one's own parts.

    All processes call it.
    """
    if not isinstance(like, DTensor):
        return norm
    squares = norm.double().square()
    dist.all_reduce(squares, group=like.device_mesh.get_group())
    return squares.sqrt().to(norm.dtype)


def gathered(content: Any, keep: bool) -> Any:
    """The same dictionaries and lists around whole tensors on the host, copies that nothing changes any more.

    All processes call it with the same content. One tensor after another is put together and let go again, so a device
    holds one of them at a time, and the host of a process that does not keep them none.

    Args:
        content: nested dictionaries, lists and tensors.
        keep: whether this process wants them; None stands in their places where not.
    """
    if isinstance(content, torch.Tensor):
        whole = content.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        return whole.to("cpu", copy=True) if keep else None
    if isinstance(content, Mapping):
        return {key: gathered(value, keep) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(gathered(value, keep) for value in content)
    return content
