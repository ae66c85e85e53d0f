"""A policy server in a process of its own, and the same policy in this one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from prismatic.policy import Policy
from scripts.dev.measure_serving import Samples, ServerProcess

FLAGS = ("--device", "cpu", "--dtype", "float32", "--max_rate", "1000000", "--out_of_bounds", "allow")
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def server(small_policy_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Without a key, for clients of this machine."""
    started = ServerProcess(small_policy_directory, FLAGS, tmp_path_factory.mktemp("server") / "log")
    yield started
    assert started.end() == 0


@pytest.fixture(scope="session")
def server_without_page(
    small_policy_directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """Keeps no last minute for a page, whose memory grows until that minute is full."""
    flags = (*FLAGS, "--page", "False")
    started = ServerProcess(small_policy_directory, flags, tmp_path_factory.mktemp("server") / "log")
    yield started
    assert started.end() == 0


@pytest.fixture(scope="session")
def samples(small_policy_directory: Path) -> Samples:
    """Of eight clients, two observations each."""
    return Samples(Policy.from_pretrained(small_policy_directory, device="cpu", dtype="float32"), 8, 2, TOLERANCE)
