"""Many clients at once: everyone gets the policy's own answers to what he asked."""

from copy import copy

import pytest

from scripts.dev.measure_serving import WAYS, Questions, ServerProcess, load


@pytest.mark.parametrize("way", WAYS)
def test_eight_clients_at_once(way: str, server: ServerProcess, questions: Questions) -> None:
    seen = load(server, questions, way, clients=8, requests=80)
    assert (len(seen.seconds), seen.wrong, seen.failed) == (80, 0, [])


def test_an_answer_to_another_question_is_noticed(server: ServerProcess, questions: Questions) -> None:
    mixed_up = copy(questions)
    mixed_up.expected = [*questions.expected[1:], questions.expected[0]]
    seen = load(server, mixed_up, "http", clients=2, requests=4)
    assert (len(seen.seconds), seen.wrong, seen.failed) == (4, 4, [])


@pytest.mark.slow  # a minute
@pytest.mark.parametrize("way", WAYS)
def test_sixty_four_clients_and_flat_memory(way: str, server: ServerProcess, questions: Questions) -> None:
    many = copy(questions)
    many.observations, many.expected = questions.observations * 8, questions.expected * 8
    first = load(server, many, way, clients=64, requests=640)
    later = load(server, many, way, clients=64, requests=1920)
    assert (first.wrong, first.failed, later.wrong, later.failed) == (0, [], 0, [])
    assert later.memory < first.memory + 16 * 2**20
