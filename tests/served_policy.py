"""Starts the real policy server, in threads of this process or as the command that users run."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter

from prismatic.policy import Policy
from prismatic.serving.server.application import build_application
from prismatic.serving.server.events import Watcher
from prismatic.serving.server.run import PolicyServer
from prismatic.serving.server.served import ServedPolicy
from prismatic.serving.settings import Secrets, ServerConfig

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def served(
    policy: Policy,
    watchers: Sequence[Watcher] = (),
    routers: Sequence[APIRouter] = (),
    api_key: str | None = None,
    **flags: Any,
) -> Iterator[PolicyServer]:
    """A policy behind a server that listens on a free port of this machine."""
    config = ServerConfig(**{"port": 0, **flags})
    application = build_application(ServedPolicy(policy, config), config, watchers, routers, Secrets(api_key))
    server = PolicyServer(application, config)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def serving_process(checkpoint: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`vla-scripts/deploy.py` of a checkpoint: the process and its address. Killed at the end, if it still runs."""
    command = [sys.executable, str(ROOT / "vla-scripts" / "deploy.py"), "--pretrained_checkpoint", str(checkpoint)]
    with subprocess.Popen([*command, "--port", "0", *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        said = list(_up_to_address(lines))
        rest = threading.Thread(target=lambda: said.extend(lines))
        rest.start()
        try:
            address = re.search(r"wss?://[\w.:]+", said[-1]) if said else None
            assert address is not None, "".join(said)
            yield process, address[0]
        finally:
            process.kill()
            rest.join()


def _up_to_address(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if "wss://" in line or "ws://" in line:
            return
