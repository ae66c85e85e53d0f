"""Files written a tensor at a time are the library's, and hold nothing that is not finite."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.lazy_tensors import LazyTensor, check_finite, save_finite, write_tensors


def test_the_bytes_are_those_that_the_library_writes(tmp_path: Path):
    tensors = {
        "b.weight": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(4, 2),
        "ä": torch.randn(7).half(),
        "transposed": torch.randn(4, 6).T,
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(2).double(),
        **{str(dtype): torch.arange(5).to(dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.int8)},
        "bytes": torch.arange(5).byte(),
        "flags": torch.tensor([True, False]),
        "eight": torch.randn(4).to(torch.float8_e4m3fn),
        "other eight": torch.randn(4).to(torch.float8_e5m2),
    }
    write_tensors(tmp_path / "ours", {name: LazyTensor.of(tensor) for name, tensor in tensors.items()})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_tensor_is_made_when_it_is_written_and_rounded_then(tmp_path: Path):
    value = torch.ones(3)
    lazy = LazyTensor.of(value).to(torch.bfloat16)
    value += 2**-10  # is lost in bfloat16
    value[0] = 5
    assert lazy.nbytes == 6
    write_tensors(tmp_path / "file", {"a": lazy})
    assert load_file(tmp_path / "file")["a"].tolist() == [5.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_named(bad: float, dtype: torch.dtype, tmp_path: Path):
    tensor = torch.zeros(1000, dtype=dtype)
    check_finite("w", tensor, tmp_path / "file")
    tensor[577] = bad
    with pytest.raises(FloatingPointError, match=r"'w', to be written to file, holds NaN or infinite values"):
        write_tensors(tmp_path / "file", {"w": LazyTensor.of(tensor)})
    with pytest.raises(FloatingPointError, match=r"'optimizer.state.3.exp_avg', to be written to state.pt"):
        save_finite({"step": 1, "optimizer": {"state": {3: {"exp_avg": tensor}}}}, tmp_path / "state.pt")
    with pytest.raises(FloatingPointError, match=r"'list.1'"):
        save_finite({"list": ["text", tensor]}, tmp_path / "state.pt")
    assert not (tmp_path / "state.pt").exists()
