"""Build the virtual environment: `make setup` runs this with the system's Python.

Standard library only, because nothing is installed yet; syntax that an old interpreter can still parse, so that it
gets a message and not a traceback.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 10), (3, 13)
LOCK = "requirements.lock"
UNTRIED = (
    "Python {version} has not been tried. Training, inference and evaluation install there, evaluation with a newer "
    "MuJoCo (SETUP.md); TensorFlow does not, so `make demo` and writing RLDS data do not work there."
)
# Measured on Linux x86-64 with Python 3.10 to 3.13: the sum of the lock file's wheels, and .venv afterwards.
SIZE = "The first installation downloads about 4.4 GB (PyTorch with CUDA is most of it) and takes 10 GB on disk."
EGL_PACKAGES = ["libegl1", "libegl-mesa0", "libgl1-mesa-dri", "libgl1", "libglib2.0-0"]
OSMESA_PACKAGES = ["libosmesa6", "libglib2.0-0"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_PACKAGES = ["chromium"]
BACKENDS = {"egl": EGL_PACKAGES, "osmesa": OSMESA_PACKAGES}
RENDER_ONE_FRAME = "from experiments.robot.libero.simulator.backend import check_rendering; print(check_rendering())"


def say(text):
    print(f"[setup] {text}", flush=True)


def stop(text):
    sys.exit(f"[setup] {text}")


def check_python():
    """Stop if this interpreter is too old for the dependencies; say what a newer one than the tried ones lacks."""
    if sys.version_info[:2] < OLDEST:
        stop(
            f"{sys.executable} is Python {platform.python_version()}; {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]} is needed. Choose one with: make setup PYTHON=python3.11"
        )
    if sys.version_info[:2] > NEWEST:
        say(UNTRIED.format(version=f"{sys.version_info[0]}.{sys.version_info[1]}"))


def missing_packages(packages):
    """Those of the Debian packages that are not installed; none on another system."""
    if shutil.which("dpkg-query") is None:
        return []
    query = ["dpkg-query", "-W", "-f", "${db:Status-Status}"]
    states = {name: subprocess.run([*query, name], capture_output=True, text=True).stdout for name in packages}
    return [name for name, state in states.items() if state != "installed"]


def install_command(packages):
    """The command that installs Debian packages here, or None where this user cannot install any."""
    if shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        prefix = []
    elif shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        prefix = ["sudo", "-n"]
    else:
        return None
    return [*prefix, "apt-get", "install", "-y", "--no-upgrade", "--no-install-recommends", *packages]


def install_packages(packages):
    """Install those of the packages that are missing, if this user may; what is there stays at its version.

    Returns whether anything was installed.
    """
    packages = missing_packages(packages)
    command = install_command(packages)
    if not packages or command is None:
        return False
    say("installing Debian packages: " + " ".join(packages))
    update = [*command[: command.index("apt-get") + 1], "update", "-qq"]
    subprocess.run(update)  # an unreachable mirror shows in the next command
    return subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}).returncode == 0


def make_environment(venv):
    """Create the virtual environment unless it is there; returns its interpreter."""
    python = venv / "bin" / "python"
    if python.exists():
        return python
    try:
        import ensurepip  # noqa: F401  (Debian ships it apart from Python)
    except ImportError:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        if not install_packages([package]):
            stop(f"this Python cannot make virtual environments. Run: sudo apt-get install -y {package}")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    return python


def install(python):
    """Install the exact versions of the lock file, then this repository on top of them."""
    say(f"installing the versions of {LOCK} with pip")
    steps = [["-r", LOCK], ["--no-deps", "--no-build-isolation", "-e", "."]]
    for step in steps:
        if subprocess.run([str(python), "-m", "pip", "install", *step], cwd=ROOT).returncode != 0:
            stop("pip failed; its message is above. `make setup` carries on where it stopped.")


def render(python, backend):
    """Render one frame of the simulator in a process of its own: a process cannot change its OpenGL backend.

    Returns (the renderer's name or None, the last lines of the error).
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if backend is not None:
        environment["MUJOCO_GL"] = backend
    result = subprocess.run(
        [str(python), "-c", RENDER_ONE_FRAME], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if result.returncode == 0:
        return result.stdout.strip().splitlines()[-1], ""
    return None, "\n".join(result.stderr.strip().splitlines()[-6:])


def check_rendering(python):
    """Render one frame; install what is missing if that is possible, else stop with the command that does it."""
    chosen = os.environ.get("MUJOCO_GL")
    attempts: list[tuple[str | None, list[str]]] = list(BACKENDS.items())
    if chosen or sys.platform != "linux":
        attempts = [(chosen, BACKENDS.get(chosen or "", []))]
    say("rendering one frame of the simulator")
    for backend, packages in attempts:
        name, error = render(python, backend)
        if name is None and packages and install_packages(packages):
            name, error = render(python, backend)
        if name is not None:
            say(f"the simulator renders ({name})")
            if backend == "osmesa" and not chosen:
                say("EGL is not available; set MUJOCO_GL=osmesa in the shell that runs the simulator")
            return
        say(f"no frame with MUJOCO_GL={backend}:\n{error}")
    stop(
        "everything is installed, but the simulator cannot render. On Debian or Ubuntu run:\n"
        f"    sudo apt-get update && sudo apt-get install -y {' '.join(EGL_PACKAGES)}\n"
        f"or, for slower rendering without EGL: sudo apt-get install -y {' '.join(OSMESA_PACKAGES)}\n"
        "and then `make setup` again. Training and inference work without it."
    )


def find_browser():
    """The path of an installed Chromium or Chrome, or None."""
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def check_browser():
    """See to a browser for the tests of the reports: install one if this user may, else say how."""
    if find_browser() is None:
        install_packages(BROWSER_PACKAGES)
    browser = find_browser()
    if browser is not None:
        say(f"the tests of the reports use {browser}")
        return
    say(
        "no Chromium was found: the tests that open reports in a browser will be skipped. On Debian run:\n"
        f"    sudo apt-get update && sudo apt-get install -y {' '.join(BROWSER_PACKAGES)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--check-only", action="store_true", help="only render one frame, with an existing environment")
    arguments = parser.parse_args()
    check_python()
    if not arguments.check_only:
        if not arguments.venv.exists():
            say(SIZE)
        install(make_environment(arguments.venv.absolute()))
    check_rendering(arguments.venv.absolute() / "bin" / "python")
    if not arguments.check_only:
        check_browser()
        say(f"done. Commands run in this environment: . {arguments.venv}/bin/activate")


if __name__ == "__main__":
    main()
