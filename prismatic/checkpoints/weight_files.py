"""The weights of a checkpoint as files: what their headers say, a fingerprint of their bytes, writing them in shards.

Nothing here holds more than one tensor in memory.
"""

import hashlib
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track
from safetensors import SafetensorError, safe_open

from prismatic.lazy_tensors import STORED_NAMES, LazyTensor, write_tensors
from prismatic.stored_files import refuse_placeholder

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_SHARD_SIZE = "5GB"
_LENGTH_BYTES = 8
_HASHING_THREADS = 8
_READ_AHEAD = 1 << 20  # Linux takes no more of one request than a disk takes at a time
_PROGRESS_BAR_BYTES = 1 << 30  # takes about two seconds to hash


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, by its file's header.

    Attributes:
        file: the safetensors file.
        dtype: as safetensors names it (`BF16`, `F32`, ...).
        shape: of the tensor.
        start, stop: its first byte in the file and the one behind its last.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_values(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; reads the header only.

    Raises:
        ValueError: for a file that is cut off or too long, a placeholder of git-lfs, and what the library refuses.
    """
    refuse_placeholder(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        begin = _LENGTH_BYTES + int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < begin:
            raise ValueError(f"{file} is cut off inside its header ({size} bytes); copy or download it again")
        content = stream.read(begin - _LENGTH_BYTES)
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        why = _wrong_length(content, begin, size) or f"is not a safetensors file ({error})"
        raise ValueError(f"{file} {why}; copy or download it again") from error
    header = json.loads(content)
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            file, entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
        )
        for name, entry in header.items()
    }


def _wrong_length(header: bytes, begin: int, size: int) -> str | None:
    """That a file is shorter or longer than its readable header says; None where it is something else."""
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        needed = begin + max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    if size > needed:
        return f"has {size} bytes instead of {needed}"
    return f"is cut off: {size} of {needed} bytes are there" if size < needed else None


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of all weight files of a model by name. Raises ValueError as `read_header` does."""
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def read_ahead(files: Sequence[Path]) -> None:
    """Ask the system to read large files into its memory, in order and from now on, beside what this process does.

    Weights are mapped: without this they come page by page, when the first action first touches them.
    """
    if not hasattr(os, "posix_fadvise") or sum(file.stat().st_size for file in files) < _PROGRESS_BAR_BYTES:
        return
    threading.Thread(target=_ask_for, args=(files,), name="read-ahead", daemon=True).start()


def _ask_for(files: Sequence[Path]) -> None:
    with suppress(OSError):  # whoever needs the weights will say what is wrong
        for file in files:
            with file.open("rb") as stream:
                for start in range(0, file.stat().st_size, _READ_AHEAD):
                    os.posix_fadvise(stream.fileno(), start, _READ_AHEAD, os.POSIX_FADV_WILLNEED)


def num_values(files: Sequence[Path]) -> int:
    """Parameters of a model, by the headers of its weight files."""
    return sum(tensor.num_values for tensor in stored_tensors(files).values())


def fingerprint(files: Sequence[Path], purpose: str = "the base model") -> str:
    """`sha256:` and 64 hexadecimal digits that stand for a model's weights.

    Hashed are name, dtype, shape and the SHA-256 of the bytes of every tensor, in the order of names. So two models
    have the same fingerprint exactly if they are equal tensor by tensor, however they are split into files. Every byte
    is read once, and several tensors are hashed at a time. `purpose` is for the progress bar.
    """
    tensors = stored_tensors(files)
    with ExitStack() as stack:
        views: dict[Path, mmap.mmap] = {}
        for file in files:
            stream = stack.enter_context(file.open("rb"))
            views[file] = stack.enter_context(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))

        def line(name: str) -> str:
            tensor = tensors[name]
            with memoryview(views[tensor.file]) as view, view[tensor.start : tensor.stop] as part:
                digest = hashlib.sha256(part).hexdigest()
            return f"{name} {tensor.dtype} {list(tensor.shape)} {digest}\n"

        with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as threads:
            done = threads.map(line, sorted(tensors))
            quiet = sum(tensor.stop - tensor.start for tensor in tensors.values()) < _PROGRESS_BAR_BYTES
            lines = list(track(done, f"hashing {purpose}", len(tensors), transient=True, disable=quiet))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def tensor_reader(files: Sequence[Path]) -> Iterator[Callable[[str], torch.Tensor]]:
    """Within the block, a function from a tensor's name to the tensor, read from its file when called."""
    tensors = stored_tensors(files)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        yield lambda name: opened[tensors[name].file].get_tensor(name)


@contextmanager
def stored_weights(files: Sequence[Path]) -> Iterator[dict[str, LazyTensor]]:
    """Within the block, the tensors of a model's files by name, each read when it is made."""
    with tensor_reader(files) as read:
        yield {
            name: LazyTensor(tensor.shape, STORED_NAMES[tensor.dtype], partial(read, name))
            for name, tensor in stored_tensors(files).items()
        }


def split_into_shards(weights: Mapping[str, LazyTensor]) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, as published checkpoints are split: in order, up to 5 GB a file."""
    sizes = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in weights.items()}
    return split_torch_state_dict_into_shards(sizes, max_shard_size=_SHARD_SIZE).filename_to_tensors


def write_shards(
    folder: Path, shards: Mapping[str, Sequence[str]], weights: Mapping[str, LazyTensor], description: str | None
) -> None:
    """Write weight files one after the other, a tensor at a time, and an index unless all is in the one plain file.

    Args:
        folder: where to.
        shards: file name -> names of the tensors in it.
        weights: by name.
        description: of the progress bar; None: there is none, as another may run meanwhile.
    """
    quiet = description is None or sum(value.nbytes for value in weights.values()) < _PROGRESS_BAR_BYTES
    for file, names in track(shards.items(), description=description or "", transient=True, disable=quiet):
        write_tensors(folder / file, {name: weights[name] for name in names})
    if list(shards) != [SINGLE_FILE]:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(weights[name].nbytes for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
