"""Malformed requests against a server, beside clients that go on asking properly."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving.malformed import Attack, all_kinds, look_at

from scripts.dev.measure_serving import Samples, ServerProcess, load

KEY = "0123456789abcdefghij"
MB = 2**20


@contextmanager
def clients_beside(server: ServerProcess, samples: Samples) -> Iterator[list[int]]:
    """Clients that ask until the block ends, by every protocol; how many right answers they got, each time."""
    done, rounds = threading.Event(), []

    def work() -> None:
        while not done.is_set():
            for way in ("PolicyClient", "http"):
                seen = load(server, samples, way, clients=2, requests=10)
                rounds.append(-1 if seen.failed or seen.wrong else len(seen.seconds))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield rounds
    finally:
        done.set()
        thread.join()


def test_each_is_refused_and_nobody_is_disturbed(server: ServerProcess, samples: Samples) -> None:
    attack = Attack(look_at(server.port), seed=16)
    number = 3 * len(list(all_kinds(attack.target)))
    before = server.memory()
    with clients_beside(server, samples) as rounds:
        attack.run(range(number))
    assert attack.faults == []
    assert len(attack.outcomes) == number > 250 and server.is_alive
    assert set(rounds) == {10}
    assert "Traceback" not in server.log.read_text()
    assert server.memory() < before + 128 * MB  # what messages of 16 MB leave behind once


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("key", [None, KEY], ids=["open", "with a key"])
def test_ten_thousand(key: str | None, small_policy_directory: Path, samples: Samples, tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--dtype", "float32", "--max_rate", "1000000", "--out_of_bounds", "allow")
    server = ServerProcess(
        small_policy_directory, flags, tmp_path / "log", **({"LIGHTVLA_API_KEY": key} if key else {})
    )
    try:
        target = look_at(server.port, key)
        attacks = [Attack(target, seed) for seed in range(4)]
        for attack in attacks:
            attack.run(range(250))
        before = server.memory()
        threads = [threading.Thread(target=attack.run, args=(range(250, 2500),)) for attack in attacks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [fault for attack in attacks for fault in attack.faults] == []
        assert sum(len(attack.outcomes) for attack in attacks) == 10_000
        assert server.is_alive and server.memory() < before + 64 * MB
        assert "Traceback" not in server.log.read_text()
    finally:
        assert server.end() == 0
