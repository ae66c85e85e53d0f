"""Tensors that are made when they are written, so that a file of gigabytes takes the memory of its largest tensor."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

STORED_NAMES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What safetensors calls the dtypes, in the order in which it puts them into a file."""
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is known before it exists.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        make: makes it, on the CPU; called when it is written, perhaps on another thread.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "LazyTensor":
        """One that exists already, on whatever device."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu())

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values, rounded to `dtype` once they are made."""
        return LazyTensor(self.shape, dtype, lambda: self.make().to(dtype))

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The names in the order in which safetensors writes them: by dtype, then by name."""
    order = {dtype: place for place, dtype in enumerate(STORED_NAMES.values())}
    return sorted(tensors, key=lambda name: (order[tensors[name].dtype], name))


def file_header(tensors: Mapping[str, LazyTensor]) -> bytes:
    """What stands in a safetensors file before the tensors' bytes: its own length, and JSON that says what lies where.

    A file takes these bytes and the `nbytes` of its tensors.
    """
    names = {dtype: name for name, dtype in STORED_NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        offsets = [begin, begin := begin + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def write_tensors(file: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a safetensors file, the same bytes as the library writes, with one tensor in memory at a time.

    Raises FloatingPointError, and leaves half a file, where a tensor is not finite.
    """
    with file.open("wb") as stream:
        stream.write(file_header(tensors))
        for name in file_order(tensors):
            value = tensors[name].make().contiguous()
            assert (tuple(value.shape), value.dtype) == (tensors[name].shape, tensors[name].dtype), name
            check_finite(name, value, file)
            stream.write(value.reshape(-1).view(torch.uint8).numpy().data)  # without the interpreter's lock


def check_finite(name: str, tensor: torch.Tensor, file: Path) -> None:
    """Raises FloatingPointError where a tensor that is about to be written to `file` holds NaN or an infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.half()  # torch does not compare float8
    lowest, highest = torch.aminmax(values)  # both are NaN where any value is; takes no memory
    if not (torch.isfinite(lowest) and torch.isfinite(highest)):
        raise FloatingPointError(
            f"{name!r}, to be written to {file.name}, holds NaN or infinite values, so nothing was saved; go on from "
            "the last checkpoint, with a smaller learning rate or --max_grad_norm"
        )


def named_tensors(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors in nested dictionaries and lists, by a dotted name."""
    if isinstance(content, torch.Tensor):
        yield name, content
        return
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
        items = enumerate(content)
    for key, value in items:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def save_finite(content: Any, file: Path) -> None:
    """`torch.save` of plain data and tensors.

    Raises FloatingPointError for a tensor that is not finite, and OSError as the file system says it.
    """
    for name, tensor in named_tensors(content):
        check_finite(name, tensor, file)
    try:
        with file.open("wb") as stream:
            torch.save(content, stream)
    except RuntimeError as error:  # torch hides what the file system said
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
