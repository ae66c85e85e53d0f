import pytest
import torch

from prismatic.models.precision import computes_in_bf16, inference_dtype


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("torch.float16", torch.float16)]
    + [(dtype, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)],
)
def test_a_dtype_is_what_was_asked_for(wanted, found):
    assert inference_dtype(wanted, "cpu") == found


@pytest.mark.parametrize("wanted", ["bf16", "int8", torch.int8, 16])
def test_another_lists_the_choices(wanted):
    with pytest.raises(ValueError, match="is unknown; known: auto, bfloat16, float16, float32"):
        inference_dtype(wanted, "cpu")


def test_auto_asks_the_processor():
    """Linux lists a CPU's instructions; where it lists those for bfloat16, that is what `auto` means."""
    try:
        with open("/proc/cpuinfo") as stream:
            flags = next(line for line in stream if line.startswith("flags")).split()
    except (OSError, StopIteration):
        pytest.skip("this system does not list the instructions of its CPU")
    has_instructions = bool({"avx512_bf16", "amx_bf16"} & set(flags))
    assert computes_in_bf16("cpu") == has_instructions
    expected = torch.bfloat16 if has_instructions else torch.float32
    assert inference_dtype(None, "cpu") == inference_dtype("auto", torch.device("cpu")) == expected
    assert inference_dtype(None, "cuda") == torch.bfloat16
