"""Which rollouts pair: the same task, start and draw, whatever place they have in their evaluation."""

from dataclasses import replace

import pytest
from paired_results import results, rollout, task_with

from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.results.results import EpisodeRecord, Results

MOVED = {"radius_m": 0.06, "seed": 7, "split": "evaluation", "trial": 0, "moved": "goal"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suite": "libero_object"}, "suite: libero_goal against libero_object"),
        ({"task_index": 4}, "task: 1 against 4"),
        ({"seed": 8}, "seed: 7 against 8"),
        ({"initial_state": 30}, "initial state: 0, 1, 2, 3 and 2 more against 30"),
        ({"displacement": MOVED}, "displacement: none against moved goal, radius_m 0.06, seed 7"),
    ],
)
def test_without_a_common_start_it_says_what_differs(change: dict, words: str) -> None:
    first = [rollout(1, state, True) for state in range(6)]
    second = [replace(first[0], **change)]
    with pytest.raises(ValueError, match=words) as error:
        compare([results(first)], [results(second)], ("ours", "theirs"))
    assert "ours and theirs share no episode" in str(error.value) and str(error.value).count(" against ") == 1


def test_starts_from_another_file_of_states_do_not_pair() -> None:
    first, second = task_with((1, 1, 0, 0))
    with pytest.raises(ValueError, match="file of initial states: DEFAULT against mine.json"):
        compare([results(first)], [results(second, initial_states_path="mine.json")])


def with_states(episodes: list[EpisodeRecord], path: str, digest: str | None) -> Results:
    found = results(episodes, initial_states_path=path)
    found.run["protocol"] = {"initial_states_sha256": digest} if digest else {}
    return found


def test_a_file_of_states_is_its_content() -> None:
    first, second = task_with((1, 1, 0, 0))
    found = compare([with_states(first, "a.json", "12" * 32)], [with_states(second, "copy/a.json", "12" * 32)])
    assert found.pairing.counted == 2 and found.warnings == ()
    with pytest.raises(ValueError, match=f"file of initial states: SHA-256 {'12' * 32} against SHA-256 {'34' * 32}"):
        compare([with_states(first, "a.json", "12" * 32)], [with_states(second, "a.json", "34" * 32)])
    with pytest.raises(ValueError, match=f"file of initial states: SHA-256 {'12' * 32} against a.json"):
        compare([with_states(first, "a.json", "12" * 32)], [with_states(second, "a.json", None)])
    unknown = compare([with_states(first, "a.json", None)], [with_states(second, "a.json", None)])
    assert unknown.warnings == ("what a.json held was not recorded; rollouts are paired by its name",)


def test_the_same_displacement_pairs() -> None:
    first = [rollout(1, 0, True, displacement=MOVED), rollout(1, 1, True, displacement=MOVED)]
    second = [rollout(1, 0, False, displacement=dict(reversed(MOVED.items()))), rollout(1, 1, False)]
    assert compare([results(first)], [results(second)]).overall.counts == (0, 1, 0, 0)


def test_starts_that_never_meet_although_every_part_does() -> None:
    with pytest.raises(ValueError, match="no combination of task"):
        compare(
            [results([rollout(1, 0, True), rollout(2, 1, True)])], [results([rollout(1, 1, True), rollout(2, 0, True)])]
        )


def test_a_start_counts_once() -> None:
    first, second = task_with((3, 0, 0, 0))
    with pytest.raises(ValueError, match="theirs has libero_goal task 1, initial state 0, seed 7 twice"):
        compare([results(first)], [results(second), results(second[:1])], ("ours", "theirs"))


def test_nothing_valid_and_nothing_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="1 episode in common, and each is invalid"):
        compare([results([rollout(1, 0, None)])], [results([rollout(1, 0, True)])])
    with pytest.raises(ValueError, match="second has no rollouts"):
        compare([results([rollout(1, 0, True)])], [results([])])


@pytest.mark.parametrize(("part", "words"), [("bddl_sha256", "BDDL file"), ("init_states_sha256", "initial states")])
def test_other_tasks_under_the_same_name_are_not_paired(part: str, words: str) -> None:
    first = [rollout(task, state, True) for task in (1, 2) for state in range(6)]
    second = [
        rollout(task, state, True, **({part: "another"} if task == 2 else {})) for task in (1, 2) for state in range(6)
    ]
    found = compare([results(first)], [results(second)], ("A", "B"))
    assert [row.name for row in found.tasks] == ["do task 1"] and found.pairing.counted == 6
    (warning,) = found.warnings
    assert warning.startswith(f"not the same task: libero_goal task 2 had other {words}")
    with pytest.raises(ValueError, match=rf"A and B share no episode.*{words}.*\(SHA-256\): .* against another"):
        compare([results(first[6:])], [results(second[6:])], ("A", "B"))


@pytest.mark.parametrize("missing", [("bddl_sha256", "init_states_sha256"), ("bddl_sha256",), ("init_states_sha256",)])
def test_results_without_hashes_pair_by_number_and_say_so(missing: tuple[str, ...]) -> None:
    first = [rollout(1, state, True) for state in range(6)]
    old = [rollout(1, state, False, **dict.fromkeys(missing)) for state in range(6)]
    found = compare([results(first)], [results(old)], ("A", "B"))
    assert found.overall.counts == (0, 6, 0, 0)
    assert found.warnings == (
        "no hashes of the tasks' files are recorded for all of libero_goal; tasks are paired by their number",
    )


def test_the_tasks_own_initial_states_do_not_count_where_a_file_gave_them() -> None:
    sides = [[rollout(1, state, True, init_states_sha256=own) for state in range(6)] for own in ("one", "two")]
    digest = {"initial_states_sha256": "5eed"}
    given = [results(side, initial_states_path="states.json") for side in sides]
    for result in given:
        result.run["protocol"] = digest
    found = compare(given[:1], given[1:], ("A", "B"))
    assert found.pairing.counted == 6 and found.warnings == ()
