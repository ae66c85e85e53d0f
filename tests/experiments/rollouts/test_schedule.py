"""Which start comes next, checked against small plans worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.evaluation.evaluate import shares
from experiments.robot.libero.rollouts.rollout import new_record
from experiments.robot.libero.rollouts.schedule import Schedule
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.simulator.tasks import LiberoTask


def starts(*counts: int) -> list[list[Start]]:
    """As many starts of tasks 0, 1, ... as `counts` says."""
    tasks = [
        LiberoTask("libero_goal", index, f"task_{index}", "do it", Path("x.bddl"), (), np.zeros((9, 3)))
        for index in range(len(counts))
    ]
    return [
        [Start(task, task.language, trial, trial, 7) for trial in range(count)]
        for task, count in zip(tasks, counts, strict=True)
    ]


def where(start: Start | None) -> tuple[int, int] | None:
    return None if start is None else (start.task.index, start.trial)


def settle(schedule: Schedule, start: Start) -> None:
    """The rollout has ended, one way or the other."""
    assert schedule.settle(start, new_record(start, "none"))


def test_a_worker_stays_with_its_task_and_then_takes_the_fullest_unattended_one() -> None:
    schedule = Schedule(starts(2, 3, 4))
    first = schedule.take()
    second = schedule.take()
    assert (where(first), where(second)) == ((2, 0), (1, 0))
    assert first is not None and second is not None
    settle(schedule, first)
    third = schedule.take(first)
    assert third is not None and where(third) == (2, 1)
    settle(schedule, third)
    # The worker of task 1 goes on to its end, then to task 0, which nobody works on, rather than to task 2.
    for expected in [(1, 1), (1, 2), (0, 0), (0, 1)]:
        settle(schedule, second)
        second = schedule.take(second)
        assert where(second) == expected and second is not None


def test_every_start_is_taken_exactly_once() -> None:
    plan = starts(3, 0, 5, 1)
    schedule = Schedule(plan)
    taken: list[Start] = []
    workers: list[Start | None] = [None, None, None]
    rng = np.random.default_rng(0)
    while not schedule.is_done:
        number = int(rng.integers(3))
        before = workers[number]
        if before is not None and before not in taken:
            settle(schedule, before)
            taken.append(before)
        workers[number] = schedule.take(before)
    assert sorted(start.key for start in taken) == sorted(start.key for task in plan for start in task)


def test_a_start_is_tried_again_so_many_times_only(caplog: pytest.LogCaptureFixture) -> None:
    schedule = Schedule(starts(1), max_attempts=3)
    for attempt in (1, 2, 3):
        start = schedule.take()
        assert start is not None and not schedule.is_done
        record = new_record(start, "none")
        record.invalid = "Traceback\nValueError: boom\n"
        assert schedule.settle(start, record) is (attempt == 3) and record.attempts == attempt
    assert schedule.take() is None and schedule.is_done
    said = [record.getMessage() for record in caplog.records]
    assert [text.rpartition(" ")[2] for text in said] == ["repeated", "repeated", "invalid"]
    assert said[1].startswith("task 0, initial state 0, attempt 2: ValueError: boom; ")


def test_processes_share_what_is_left() -> None:
    plan = starts(5, 4)
    dealt = [shares(plan, set(), rank, 3) for rank in range(3)]
    keys = sorted(start.key for share in dealt for task in share for start in task)
    assert keys == sorted(start.key for task in plan for start in task)
    assert [[len(task) for task in share] for share in dealt] == [[2, 1], [2, 1], [1, 2]]
    done = {start.key for task in dealt[0] for start in task}  # the first process had done all of its part
    again = [shares(plan, done, rank, 3) for rank in range(3)]
    left = sorted(start.key for share in again for task in share for start in task)
    assert left == sorted(set(keys) - done)
    assert [sum(map(len, share)) for share in again] == [2, 2, 2]
