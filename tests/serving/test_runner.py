"""The chunk runner against a world in which it is known what has to be executed when (`scripted_world.py`)."""

import dataclasses
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from scripted_world import ROBOT, TICK_S, Policy, World

from prismatic.serving.ensembling import ensembled
from prismatic.serving.executed import Action, Dropped, Hold
from prismatic.serving.runner import ChunkRunner, RunnerSettings
from prismatic.vla.robots import LIBERO, Control, RobotSpec


def settings(**changes: Any) -> RunnerSettings:
    return RunnerSettings(**changes)


def dropped(world: World, reason: str) -> list[list[int]]:
    records = [record for record in world.runner.log if isinstance(record, Dropped)]
    return [list(record.actions) for record in records if record.reason.startswith(reason)]


def test_a_chunk_is_executed_whole_and_the_next_one_is_of_a_fresh_observation() -> None:
    for asynchronous in (False, True):
        world = World(settings(asynchronous=asynchronous))
        assert world.ticks(24) == "A" * 24 and world.policy.asked == 3
        actions = [record for record in world.runner.log if isinstance(record, Action)]
        assert [action.sources[0].index for action in actions] == list(range(8)) * 3
        assert max(action.age_s for action in actions) == pytest.approx(7 * TICK_S)


def test_fewer_actions_of_each_chunk() -> None:
    for asynchronous in (False, True):
        world = World(settings(asynchronous=asynchronous, open_loop_steps=3))
        assert world.ticks(9) == "A" * 9 and world.policy.asked == 3


def test_synchronously_the_robot_holds_while_it_waits() -> None:
    world = World(settings(asynchronous=False), latency_s=3 * TICK_S)
    assert world.ticks(22) == "...AAAAAAAA...AAAAAAAA"
    assert not dropped(world, "late"), "while it holds nothing is skipped"


def test_asynchronously_it_acts_on_while_it_waits_and_skips_what_has_been_executed() -> None:
    world = World(latency_s=3 * TICK_S)
    assert world.ticks(3 + 8 + 5 * 5) == "..." + "A" * (8 + 5 * 5), "the first chunk is waited for, no other"
    assert dropped(world, "late") == [[0, 1, 2]] * 5


def test_an_answer_that_takes_nearly_as_long_as_a_chunk_lasts() -> None:
    """Nothing can be executed that nobody foresaw: 8 actions a chunk, one request at a time."""
    world = World(latency_s=6 * TICK_S)
    assert world.ticks(32) == "......" + "A" * 10 + "...." + "A" * 8 + "...."


def test_the_rest_of_a_chunk_bridges_a_late_answer() -> None:
    world = World(settings(open_loop_steps=4, lead_steps=0), latency_s=3 * TICK_S)
    assert world.ticks(3 + 20) == "..." + "A" * 20


def test_one_slow_answer_does_not_make_the_next_ones_old() -> None:
    world = World(settings(hold_after_s=1.0), latency_s=8 * TICK_S)
    world.ticks(9)
    world.latency_s = TICK_S
    world.ticks(8)
    asked = world.policy.asked
    world.ticks(70)
    assert world.policy.asked - asked <= 12, "each chunk is good for 7 actions"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_answers_older_than_allowed_are_never_executed(asynchronous: bool) -> None:
    world = World(settings(asynchronous=asynchronous, hold_after_s=9.0, max_age_s=0.5))
    world.latency_s = 0.4
    assert world.ticks(12) == "........AAA.", "the fourth action of the chunk would be 0.55 s old"
    assert dropped(world, "stale")[0] == [3, 4, 5, 6, 7]
    world.latency_s = 2.0
    assert "A" not in world.ticks(100)[8:]
    assert [0, 1, 2, 3, 4, 5, 6, 7] in dropped(world, "stale")


def test_the_robot_is_held_within_the_limit_and_goes_on_only_when_it_is_armed_again() -> None:
    world = World()
    assert world.ticks(8) == "A" * 8
    gripper = world.runner.log[-1].values[6]  # type: ignore[union-attr]
    world.policy.trouble = lambda: ConnectionError("no policy server at ws://robot:8000")
    assert world.ticks(20) == "." * 10 + "!" * 10, "0.5 s at 20 Hz"
    world.policy.trouble = lambda: None
    assert world.ticks(40) == "!" * 40, "the server is back, and nobody has armed the robot"
    hold = world.runner.log[-1]
    assert isinstance(hold, Hold) and "no action for 0.55 s" in hold.reason and "no policy server" in hold.reason
    assert hold.values[6] == gripper
    (trip,) = world.runner.watchdog.history
    assert trip.reason == hold.reason and trip.time == pytest.approx(100 + 18 * TICK_S)
    world.runner.begin("count on")
    assert world.ticks(3) == "!!!", "another episode is no reason to move"
    world.runner.rearm()
    assert world.ticks(10) == "A" * 10


def test_what_was_asked_before_the_stop_is_not_executed_after_it() -> None:
    world = World(settings(lead_steps=8), latency_s=TICK_S)
    world.ticks(4)
    world.runner.stop("somebody pressed the button")
    assert world.ticks(5) == "!!!!!"
    assert dropped(world, "stopped")
    rearmed_at = world.time
    world.runner.rearm()
    assert world.ticks(10) == "." + "A" * 9
    after = [record for record in world.runner.log if isinstance(record, Action)][-9:]
    assert all(source.observed_at >= rearmed_at for action in after for source in action.sources)


def test_a_stop_that_is_taken_back_before_the_next_step_still_ends_the_plan() -> None:
    world = World(settings(lead_steps=8), latency_s=TICK_S)
    world.ticks(4)
    world.runner.stop("somebody pressed the button")
    world.runner.rearm()
    assert world.ticks(10) == "." + "A" * 9, "what was planned before the stop is asked anew"
    assert dropped(world, "stopped")


def test_a_camera_s_picture_from_before_the_rearming_is_not_acted_on() -> None:
    world = World()
    world.ticks(4)
    world.runner.stop("somebody pressed the button")
    world.tick()
    world.runner.rearm()
    rearmed_at = world.time
    for late in (2, 1, 0):
        seen_at = rearmed_at - late * TICK_S
        command = world.runner.step({"state": np.array([world.executed, seen_at])}, observed_at=seen_at)
        assert isinstance(command, Action) == (late == 0)
        world.time += TICK_S


def test_a_failed_request_is_asked_again_while_the_chunk_lasts() -> None:
    world = World(settings(lead_steps=4), latency_s=0.0)
    world.ticks(2)
    failures = iter([OSError("gone"), OSError("gone")])
    world.policy.trouble = lambda: next(failures, None)
    assert world.ticks(30) == "A" * 30
    assert len(dropped(world, "failed: gone")) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (np.full((8, 7), np.nan), "NaN or infinity"),
        (np.zeros((8, 6)), r"actions of shape \(8, 6\); expected \(chunk, 7\)"),
        (np.zeros((0, 7)), "shape"),
        ("error", "could not convert"),
    ],
)
def test_unusable_answers_are_failures(answer: Any, words: str) -> None:
    class Broken:
        def act(self, observation: Any, instruction: str) -> Any:
            return answer

    runner = ChunkRunner(Broken(), ROBOT)
    runner.begin("x")
    command = runner.step({"state": np.zeros(8)}, wait_s=5.0)
    assert isinstance(command, Hold)
    (record,) = [record for record in runner.log if isinstance(record, Dropped)]
    assert record.reason.startswith("failed") and pytest.raises(ValueError, match=words)
    with pytest.raises(ValueError, match=words):
        raise ValueError(record.reason)


def test_whatever_the_network_does_nothing_but_the_right_action_is_executed() -> None:
    """`World.tick` asserts for every action that it is the one foreseen for this control step, and fresh."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        world = World(
            settings(
                asynchronous=bool(rng.integers(2)),
                open_loop_steps=int(rng.integers(1, 9)),
                lead_steps=[None, 0, 3, 8][rng.integers(4)],
                max_age_s=float(rng.choice([0.2, 0.8])),
                ensemble_decay=[None, 0.0][rng.integers(2)],
            )
        )
        world.policy.trouble = lambda rng=rng: OSError("gone") if rng.random() < 0.2 else None
        for _ in range(150):
            world.latency_s = float(rng.choice([0.0, 0.02, 0.1, 0.3, 2.0], p=[0.4, 0.2, 0.2, 0.15, 0.05]))
            world.tick(blind_s=float(rng.choice([0.0, 0.3], p=[0.97, 0.03])))
            if rng.random() < 0.05:
                world.runner.rearm()
        assert world.executed > 10, seed


def test_observations_that_are_older_than_the_control_step() -> None:
    """A camera's picture is 2 control steps old: the 2 actions executed since then are skipped."""
    taken: list[tuple[float, int]] = []
    world = World()
    for _ in range(40):
        taken.append((world.time, world.executed))
        seen_at, state = taken[max(len(taken) - 3, 0)]
        command = world.runner.step({"state": np.array([state, seen_at])}, observed_at=seen_at)
        assert isinstance(command, Action) and command.values[0] == world.executed
        assert command.age_s == pytest.approx(world.time - command.values[1])
        world.executed += 1
        world.time += TICK_S
    with pytest.raises(ValueError, match="1.000 s in the future"):
        world.runner.step({"state": np.zeros(8)}, observed_at=world.time + 1)


def test_ensembling_is_the_weighted_average_of_what_was_foreseen() -> None:
    rng = np.random.default_rng(0)
    answers: list[np.ndarray] = []

    class Random:
        def act(self, observation: Any, instruction: str) -> np.ndarray:
            answers.append(rng.normal(size=(8, 7)))
            answers[-1][:, 6] = rng.integers(0, 2, 8)
            return answers[-1]

    world = World(settings(open_loop_steps=1, ensemble_decay=0.3))
    world.runner._asker._policy = Random()  # type: ignore[attr-defined]
    for step in range(20):
        command = world.runner.step({"state": np.zeros(8)})
        world.time += TICK_S
        expected, total, votes = np.zeros(7), 0.0, 0.0
        for rank, query in enumerate(range(max(0, step - 7), step + 1)):  # by hand, the oldest first
            weight = np.exp(-0.3 * rank)
            expected += weight * answers[query][step - query]
            votes += weight * (1 if answers[query][step - query][6] else -1)
            total += weight
        assert isinstance(command, Action) and len(command.sources) == min(step + 1, 8)
        np.testing.assert_allclose(command.values[:6], expected[:6] / total)
        assert command.values[6] == (votes > 0), "a gripper takes what most of the weight says, nothing between"


def test_the_median_of_grippers_is_one_of_the_commands() -> None:
    foreseen = np.array([[0.1], [0.8], [0.9]])
    assert ensembled(foreseen, 0.0, [0]) == [0.8]
    assert ensembled(foreseen, 5.0, [0]) == [0.1], "nearly all of the weight is the oldest's"
    assert ensembled(foreseen, 0.0)[0] == pytest.approx(0.6)


def test_actions_beyond_the_limits_are_cut_or_stop_the_robot() -> None:
    robot = dataclasses.replace(LIBERO, control=Control("delta", (6,), 0.5, ((-1.0, 1.0),) * 6 + (None,)))

    class Wild:
        def act(self, observation: Any, instruction: str) -> np.ndarray:
            return np.tile([0.5, -3.0, 0, 0, 0, 1.5, 2.0], (8, 1))

    runner = ChunkRunner(Wild(), robot)
    runner.begin("x")
    command = runner.step({"state": np.zeros(8)}, wait_s=5.0)
    assert isinstance(command, Action) and command.limited == (1, 5)
    assert command.values.tolist() == [0.5, -1, 0, 0, 0, 1, 2]

    runner = ChunkRunner(Wild(), robot, settings(over_limits="refuse"))
    runner.begin("x")
    command = runner.step({"state": np.zeros(8)}, wait_s=5.0)
    assert isinstance(command, Hold) and command.needs_rearm
    assert "limits in dimensions [1, 5]" in command.reason and command.values.tolist() == [0] * 6 + [0.5]


def test_an_arm_with_absolute_actions_is_not_sent_off_faster_than_it_may() -> None:
    control = Control("absolute", grippers=(1,), bounds=((-1.0, 1.0), None), max_change=(0.25, None))
    robot = RobotSpec("arm", proprio_dim=2, action_dim=2, chunk_length=4, open_loop_steps=4, control=control)

    class Far:
        def act(self, observation: Any, instruction: str) -> np.ndarray:
            return np.tile([1.5, 0.0], (4, 1))

    now = [0.0]
    runner = ChunkRunner(Far(), robot, settings(max_age_s=9.0), clock=lambda: now[0])
    runner.begin("x")
    standing = {"state": np.array([0.2, 1.0])}
    values = [runner.step(standing, wait_s=5.0).values.tolist() for _ in range(4)]
    np.testing.assert_allclose(values, [[0.45, 0], [0.7, 0], [0.95, 0], [1, 0]])
    now[0] += 1
    command = runner.step(standing)
    assert isinstance(command, Hold) and command.values.tolist() == [1, 0], "the last command, not where it started"


def test_step_returns_at_once_or_after_the_time_it_was_given() -> None:
    answer = threading.Event()

    class Slow(Policy):
        def act(self, observation: Any, instruction: str) -> np.ndarray:
            answer.wait(20)
            return super().act(observation, instruction)

    runner = ChunkRunner(Slow(), ROBOT, settings(hold_after_s=30.0, max_age_s=30.0))
    runner.begin("x")
    state = np.zeros(8)
    began = time.monotonic()
    assert isinstance(runner.step({"state": state}), Hold)
    at_once = time.monotonic() - began
    assert isinstance(runner.step({"state": state}, wait_s=0.3), Hold)
    assert at_once < 0.25 < 0.3 <= time.monotonic() - began
    state[:] = 99  # the caller's buffer is overwritten by the next picture
    answer.set()
    command = runner.step({"state": state}, wait_s=10.0)
    assert isinstance(command, Action) and command.values[0] == 0


def test_everything_goes_to_the_callback_too() -> None:
    records: list[Any] = []
    runner = ChunkRunner(Policy(), ROBOT, on_record=records.append)
    runner.begin("x")
    command = runner.step({"state": np.zeros(8)}, wait_s=5.0)
    assert records == list(runner.log) == [command]


@pytest.mark.parametrize(
    ("robot", "changes", "words"),
    [
        (ROBOT, {"open_loop_steps": 9}, "open_loop_steps 9 of chunks of 8"),
        (ROBOT, {"open_loop_steps": 0}, "expected 1 or more"),
        (ROBOT, {"over_limits": "ignore"}, "expected 'clip' or 'refuse'"),
        (ROBOT, {"max_age_s": float("nan")}, "max_age_s nan"),
        (ROBOT, {"hold_after_s": 0.0}, "expected more than 0"),
        (ROBOT, {"lead_steps": -1}, "lead_steps -1"),
        (RobotSpec("arm"), {}, "robot 'arm' does not say how it executes actions"),
        (dataclasses.replace(LIBERO, action_dim=6), {}, "7 bounds for actions of 6 dimensions"),
    ],
)
def test_settings_that_cannot_be(robot: RobotSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChunkRunner(Policy(), robot, RunnerSettings(**changes))


def test_it_has_to_be_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"call begin\(instruction\) first"):
        ChunkRunner(Policy(), ROBOT).step({"state": np.zeros(8)})


def test_a_robot_s_computer_needs_neither_torch_nor_a_web_server() -> None:
    modules = [f"prismatic.serving.{name}" for name in ("client", "runner", "watchdog", "action_limits", "asking")]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "heavy = {'torch', 'timm', 'transformers', 'fastapi', 'uvicorn', 'PIL', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
