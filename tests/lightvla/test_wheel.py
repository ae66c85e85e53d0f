"""A wheel installed alone, without this tree, can do what the tree can."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from lightvla.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("prismatic", "experiments", "lightvla")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, so that a forgotten `git add` shows."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in names:
        if name.split("/")[0] in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, *build], check=True, capture_output=True, text=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that holds the wheel, and sees this one's dependencies but not this tree."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # What stands in a .pth file is only appended to the path: the editable finder that lies there is not started.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = ["-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *install, str(wheel)], check=True, capture_output=True, text=True)
    return folder / "bin"


def run(bin_folder: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(bin_folder / words[0]), *words[1:]], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_every_file_that_a_package_reads_is_inside(wheel: Path) -> None:
    inside = set(ZipFile(wheel).namelist())
    kept = (".html", ".css", ".js", ".jinja", ".json", ".py")
    ours = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in kept and "logs" not in path.parts
    }
    assert not ours - inside


def test_commands_answer_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed, "python", "-c", "import lightvla, prismatic; print(lightvla.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent)
    listed = run(installed, "lightvla", cwd=tmp_path)
    assert listed.returncode == 0 and all(name in listed.stdout for name in COMMANDS)
    helped = run(installed, "lightvla", "eval", "--help", cwd=tmp_path)
    assert helped.returncode == 0 and "--pretrained_checkpoint TEXT" in helped.stdout


@pytest.mark.slow
def test_a_rollout_its_table_and_its_report_from_the_wheel(
    installed: Path, small_policy_directory: Path, tmp_path: Path
) -> None:
    checked = run(installed, "lightvla", "inspect", str(small_policy_directory), cwd=tmp_path)
    assert checked.returncode == 0 and "nothing wrong was found" in checked.stdout, checked.stderr
    words = f"""--pretrained_checkpoint {small_policy_directory} --task_suite_name libero_goal --task_ids 1
        --initial_states 30 --env_img_res 128 --renderer fast --num_envs 2 --output_dir run --record True"""
    done = run(installed, "lightvla", "eval", *words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [episode["success"] is None for episode in results["episodes"]] == [False]
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    table = run(installed, "lightvla", "compare", "run", "--format", "csv", cwd=tmp_path)
    assert table.returncode == 0 and "put the bowl on the stove" in table.stdout
    (record,) = (tmp_path / "run" / "records").glob("*.npz")
    replayed = run(installed, "lightvla", "replay", str(record), cwd=tmp_path)
    assert replayed.returncode == 0 and "as recorded" in replayed.stdout, replayed.stdout + replayed.stderr
    demo = run(installed, "lightvla", "demo", "--stage", "build", cwd=tmp_path)
    assert demo.returncode == 0 and (tmp_path / "demo" / "base" / "config.json").is_file(), demo.stdout + demo.stderr
