"""Many clients at once: everyone gets the policy's own answers to what he asked."""

import json
from copy import copy
from pathlib import Path

import pytest

from scripts.dev.measure_serving import WAYS, MeasureConfig, Samples, ServerProcess, load, main


@pytest.mark.parametrize("way", WAYS)
def test_eight_clients_at_once(way: str, server: ServerProcess, samples: Samples) -> None:
    seen = load(server, samples, way, clients=8, requests=80)
    assert (len(seen.seconds), seen.wrong, seen.failed) == (80, 0, [])


def test_an_answer_to_another_request_is_noticed(server: ServerProcess, samples: Samples) -> None:
    mixed_up = copy(samples)
    mixed_up.expected = [*samples.expected[1:], samples.expected[0]]
    seen = load(server, mixed_up, "http", clients=2, requests=4)
    assert (len(seen.seconds), seen.wrong, seen.failed) == (4, 4, [])


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("way", WAYS)
def test_sixty_four_clients_and_flat_memory(way: str, server_without_page: ServerProcess, samples: Samples) -> None:
    many = copy(samples)
    many.observations, many.expected = samples.observations * 8, samples.expected * 8
    first = load(server_without_page, many, way, clients=64, requests=640)
    later = load(server_without_page, many, way, clients=64, requests=1920)
    assert (first.wrong, first.failed, later.wrong, later.failed) == (0, [], 0, [])
    assert later.memory < first.memory + 16 * 2**20


@pytest.mark.slow  # two servers
def test_the_measurement_writes_what_it_shows(
    small_policy_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "serving.json"
    config = MeasureConfig(small_policy_directory, written, clients="1,4", requests=16, rounds=2, memory_requests=80)
    assert main(config) == 0
    found = json.loads(written.read_text())
    assert [(row["clients"], row["answers"], row["wrong"]) for row in found["loads"]] == [(1, 16, 0)] * 3 + [
        (4, 16, 0)
    ] * 3
    assert [pair[name]["answers"] for pair in found["batches"]["rounds"] for name in ("one", "several")] == [8] * 4
    assert len(found["memory"]) == 11 and found["memory"][-1]["answers"] == 80
    assert f"per_s: {found['batches']['ratios']['per_s'][0]}" in capsys.readouterr().out
