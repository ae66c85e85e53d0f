"""Frames of two backends: the numbers that are printed, and that software EGL and OSMesa draw alike."""

import os
import re
from ctypes.util import find_library

import numpy as np
import pytest

from experiments.robot.libero.simulator.backend import choose_backend
from scripts.dev.compare_renderers import UNUSABLE, compare, draw_with, main


def test_differences_are_counted() -> None:
    first = np.zeros((2, 5, 3), np.uint8)
    second = first.copy()
    second[0, 0] = (3, 0, 6)
    assert compare({"a": first}, {"a": first}) == ["a: equal", "all: equal"]
    line, _ = compare({"a": first}, {"a": second})
    assert line == "a: mean 0.3, largest 6 of 255, 6.67% of values differ"
    with pytest.raises(ValueError, match="the frames differ"):
        compare({"a": first}, {"b": first})


def test_a_backend_that_cannot_draw_is_named() -> None:
    with pytest.raises(RuntimeError, match="MUJOCO_GL=vulkan cannot draw here"):
        draw_with("vulkan", 64)


def test_the_command_names_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--backends", "vulkan,egl", "--resolution", "64"]) == UNUSABLE
    printed = capsys.readouterr()
    assert printed.err.startswith("error: MUJOCO_GL=vulkan cannot draw here: ") and printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_osmesa_draws_what_egl_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    if choose_backend() != "egl" or os.path.exists("/dev/nvidia0"):
        pytest.skip("software EGL is what is compared; this machine draws otherwise")
    if find_library("OSMesa") is None:
        pytest.skip("no OSMesa here: apt-get install libosmesa6")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "egl")  # as MuJoCo leaves it in a process that has drawn
    lines = compare(draw_with("egl", 128), draw_with("osmesa", 128))
    shares = [float(match[1]) for line in lines if (match := re.search(r"([\d.]+)% of values", line))]
    # Equal in one version of Mesa; between two, edges may fall to the other side.
    assert all(share < 1.0 for share in shares), "\n".join(lines)
