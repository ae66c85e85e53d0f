"""Times of stages against a clock beside them."""

import time

import pytest
import torch

from prismatic.models.stage_clock import StageClock


def test_a_stage_inside_another_interrupts_it():
    clock = StageClock(torch.device("cpu"))
    start = time.perf_counter()
    with clock.stage("vision"):
        time.sleep(0.01)
        with clock.stage("pruner"):
            time.sleep(0.03)
        time.sleep(0.01)
    time.sleep(0.02)
    for _ in range(2):
        with clock.stage("llm"):
            time.sleep(0.01)
    together = time.perf_counter() - start
    seconds = clock.seconds()
    assert list(seconds) == ["vision", "pruner", "llm"]
    assert seconds["vision"] >= 0.02 and seconds["pruner"] >= 0.03 and seconds["llm"] >= 0.02
    assert sum(seconds.values()) <= together - 0.02, "what is in no stage counts nowhere"


def test_stages_end_where_an_error_leaves_them():
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), clock.stage("vision"), clock.stage("pruner"):
        _ = 1 / 0
    time.sleep(0.02)
    assert sum(clock.seconds().values()) < 0.02
    assert StageClock(torch.device("cpu")).seconds() == {"vision": 0, "pruner": 0, "llm": 0}


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_before_the_end():
    device = torch.device("cuda")
    clock = StageClock(device)
    x = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        x @ x
    torch.cuda.synchronize()
    start = time.perf_counter()
    with clock.stage("llm"):
        for _ in range(100):
            x @ x
    launched = time.perf_counter() - start
    seconds = clock.seconds()["llm"]
    together = time.perf_counter() - start
    assert launched < seconds <= together
