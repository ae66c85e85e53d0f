import os
import subprocess
import sys
import time

import pytest
import torch

from prismatic.machine import Machine
from prismatic.models import precision
from prismatic.models.precision import bf16_speedup, choose_dtype, computes_in_bf16


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("torch.float16", torch.float16)]
    + [(dtype, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)],
)
def test_a_dtype_is_what_was_asked_for(wanted, found):
    assert choose_dtype(wanted, "cpu").dtype == found


@pytest.mark.parametrize("wanted", ["bf16", "int8", torch.int8, 16])
def test_another_lists_the_choices(wanted):
    with pytest.raises(ValueError, match="is unknown; known: auto, bfloat16, float16, float32"):
        choose_dtype(wanted, "cpu")


def test_auto_means_bfloat16_where_it_was_measured_to_be_clearly_faster(monkeypatch):
    for speedup, expected in ((0.5, torch.float32), (1.1, torch.float32), (4.0, torch.bfloat16)):
        monkeypatch.setattr(precision, "bf16_speedup", lambda now=speedup: now)
        chosen = choose_dtype("auto", "cpu")
        assert chosen == choose_dtype(None, torch.device("cpu"), 10**6)
        assert chosen.dtype == expected and computes_in_bf16("cpu") == (expected == torch.bfloat16)
        assert f"bfloat16 runs at {speedup:.2f} times the speed of float32" in chosen.reason
    assert choose_dtype(None, "cuda").dtype == torch.bfloat16


def test_auto_means_bfloat16_where_float32_does_not_fit(monkeypatch):
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 0.5)
    monkeypatch.setattr(precision, "read_machine", lambda: Machine(2, memory_bytes=20 * 2**30))
    chosen = choose_dtype(None, "cpu", 7_500_000_000)
    assert chosen.dtype == torch.bfloat16
    assert chosen.reason == "float32 weights would take 27.9 GiB of the 20.0 GiB of memory left"
    assert choose_dtype(None, "cpu", 1_000_000_000).dtype == torch.float32
    assert choose_dtype("float32", "cpu", 7_500_000_000).dtype == torch.float32


def test_a_measurement_is_made_once_and_tells_which_is_faster():
    """On this machine, whatever it is: a larger product, timed here."""
    threads, speedup = torch.get_num_threads(), bf16_speedup()
    assert speedup == bf16_speedup() and 0 < speedup < 100 and torch.get_num_threads() == threads
    seconds = {}
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16) * 5:
            rows, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
            start = time.thread_time()
            torch.nn.functional.linear(rows, weight)
            seconds[dtype] = min(seconds.get(dtype, 1.0), time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert 1 / 2 < speedup / (seconds[torch.float32] / seconds[torch.bfloat16]) < 2


def test_what_is_chosen_does_not_depend_on_what_else_the_machine_does():
    burn = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        found = [bf16_speedup.__wrapped__() for _ in range(8)]
    finally:
        for each in burn:
            each.kill()
            each.wait()
    assert max(found) / min(found) < 2
