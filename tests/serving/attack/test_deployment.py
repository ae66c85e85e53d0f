"""The Dockerfile and the systemd unit: flags that the command takes, a key wherever the server can be reached."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prismatic.command_line import parse_flags
from prismatic.serving.settings import ServerConfig, check, is_this_machine
from scripts.dev.measure_serving import ServerProcess

ROOT = Path(__file__).resolve().parents[3]
UNIT = ROOT / "docs" / "examples" / "lightvla-serve.service"
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())


def instructions(word: str) -> list[str]:
    return re.findall(rf"^{word} (.+)$", DOCKERFILE, re.MULTILINE)


def unit(key: str) -> str:
    lines = re.sub(r"\\\n\s*", "", UNIT.read_text())
    return re.findall(rf"^{key}=(.*)$", lines, re.MULTILINE)[-1]


def flags_of(command: list[str]) -> ServerConfig:
    assert Path(command[0]).name == "lightvla" and command[1] == "serve"
    config = parse_flags(ServerConfig, command[2:])
    check(config)
    return config


def test_both_ask_for_a_key_and_shut_down_in_time() -> None:
    command = json.loads(instructions("ENTRYPOINT")[-1]) + json.loads(instructions("CMD")[-1])
    for config in (flags_of(command), flags_of(shlex.split(unit("ExecStart")))):
        assert not is_this_machine(config.host) and config.api_key_file is not None
        assert config.shutdown_s < float(unit("TimeoutStopSec"))
    assert str(config.port) in instructions("EXPOSE")
    assert instructions("USER")[-1] not in ("root", "0") and unit("DynamicUser") == "yes"


def test_the_image_is_made_of_what_is_installed() -> None:
    """What is copied is there and not ignored, and holds every package of pyproject.toml."""
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    copied = [name for line in instructions("COPY") if "--from" not in line for name in line.split()[:-1]]
    assert sorted(copied) == sorted(allowed) and all((ROOT / name).exists() for name in copied)
    packages = re.search(r"packages\.find\]\ninclude = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    assert packages is not None and {name.rstrip("*") for name in json.loads(packages[1])} <= set(copied)


def test_the_health_check_tells_a_server_from_none(server: ServerProcess) -> None:
    health = instructions("HEALTHCHECK")[-1].partition("CMD ")[2]
    program = json.loads(health)[2]
    assert ":8000/" in program
    for port, status in ((server.port, 0), (9, 1)):
        run = subprocess.run([sys.executable, "-c", program.replace(":8000/", f":{port}/")], capture_output=True)
        assert run.returncode == status


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    made = tmp_path / UNIT.name
    made.write_text(UNIT.read_text().replace(unit("ExecStart").split()[0], sys.executable))
    run = subprocess.run(["systemd-analyze", "verify", str(made)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
