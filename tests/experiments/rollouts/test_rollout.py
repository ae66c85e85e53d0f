"""Rollouts in the real simulator, with policies whose every action is known."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery, query_seed
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.rollout import BLANK_LEVEL, RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start, start_text
from experiments.robot.libero.rollouts.video import RolloutRecorder
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from experiments.robot.libero.simulator.wide_starts import Displacement
from prismatic.pictures.frame import Caption, compose_frame

STOVE, PLATE = 1, 8  # tasks of libero_goal that share a scene
TOKENS = 2 * 9


class Watched(LiberoEnvironment):
    """Notes what was rendered and done."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.frames = 0
        self.actions: list[np.ndarray] = []

    def frame(self, camera: str = "full_image") -> np.ndarray:
        self.frames += 1
        return super().frame(camera)

    def step_policy(self, action: Any) -> bool:
        self.actions.append(np.asarray(action))
        return super().step_policy(action)


class HoldsStill:
    """Returns chunks that do not move; the k-th action of a chunk is marked by a tiny turn of k micro units."""

    def __init__(self) -> None:
        self.queries: list[PolicyQuery] = []

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.queries += queries
        actions = np.zeros((8, 7))
        actions[:, 5] = np.arange(8) * 1e-6
        actions[:, 6] = 1.0
        kept = np.isin(np.arange(TOKENS), [0, 4, 9])
        return [ActionChunk(actions, kept, kept.astype(np.float32), {"total": 2.5})]


class Shakes(HoldsStill):
    """Leaves the robot with velocities that no simulation survives."""

    def __init__(self, environment: LiberoEnvironment) -> None:
        super().__init__()
        self.environment = environment

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.environment.data.qvel[:] = 1e11
        return super().query(queries)


class Breaks:
    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        raise RuntimeError("the policy broke")


@pytest.fixture(scope="module")
def environment() -> Iterator[Watched]:
    with Watched(load_task("libero_goal", STOVE), resolution=64, renderer="fast", settle_steps=4) as environment:
        yield environment


@pytest.fixture
def start() -> Start:
    task = load_task("libero_goal", STOVE)
    return Start(task=task, instruction=task.language, initial_state=3, trial=2, seed=7)


def state_with_bowl_on_plate(environment: Watched, start: Start) -> np.ndarray:
    """The start's initial state, but the bowl stands on the plate."""
    state = start.task.init_states[start.initial_state].copy()
    address = {
        name: 1
        + environment.model.jnt_qposadr[environment.model.joint(environment.inner.objects_dict[name].joints[-1]).id]
        for name in ("akita_black_bowl_1", "plate_1")
    }
    bowl, plate = address["akita_black_bowl_1"], address["plate_1"]
    state[bowl : bowl + 2] = state[plate : plate + 2]
    state[bowl + 2] = state[plate + 2] + 0.03
    return state


def roll(environment: Watched, policy: Any, start: Start, **settings: Any) -> EpisodeRecord:
    environment.frames = 0
    environment.actions.clear()
    observers = settings.pop("observers", ())
    return run_episode(environment, policy, start, RolloutSettings(**{"max_steps": 20, **settings}), observers)


def test_a_policy_query_per_chunk_and_nothing_else_is_rendered(environment: Watched, start: Start) -> None:
    policy = HoldsStill()
    record = roll(environment, policy, start)
    assert record.invalid is None and record.success is False and record.other_success is None
    assert record.steps == len(environment.actions) == 20
    assert len(policy.queries) == len(record.tokens_kept) == len(record.latency_ms) == 3
    assert record.stage_ms == {"total": [2.5, 2.5, 2.5]}
    assert environment.frames == 3 * 2
    assert record.tokens_kept == [3, 3, 3] and record.num_visual_tokens == TOKENS
    assert [query.instruction for query in policy.queries] == [start.task.language] * 3
    assert [query.seed for query in policy.queries] == [query_seed(7, "libero_goal", STOVE, 3, 2, k) for k in range(3)]
    assert set(policy.queries[0].observation) == {"full_image", "wrist_image", "state"}
    assert (record.initial_state, record.trial, record.seed) == (3, 2, 7)


def test_every_query_of_an_evaluation_has_its_own_seed() -> None:
    seeds = [query_seed(seed, "libero_goal", *where) for seed, *where in itertools.product(range(4), repeat=5)]
    assert len(set(seeds)) == 4**5


def test_a_simulation_that_goes_astray_is_no_failure(
    environment: Watched, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    before = roll(environment, HoldsStill(), start)
    record = roll(environment, Shakes(environment), start)
    assert record.success is None and "became unstable" in (record.invalid or "")
    after = roll(environment, HoldsStill(), start)
    assert (after.invalid, after.steps, after.actions_sha256) == (None, before.steps, before.actions_sha256)


def test_equal_actions_have_equal_hashes(environment: Watched, start: Start) -> None:
    first, again = (roll(environment, HoldsStill(), start) for _ in range(2))
    shorter = roll(environment, HoldsStill(), start, open_loop_steps=4)
    assert first.actions_sha256 == again.actions_sha256 != shorter.actions_sha256
    assert first.actions_sha256 is not None and len(first.actions_sha256) == 64


def test_rendering_every_step_changes_nothing_else(environment: Watched, start: Start) -> None:
    record = roll(environment, HoldsStill(), start)
    wasteful = roll(environment, HoldsStill(), start, render_every_step=True)
    assert environment.frames == 2 * 20
    assert wasteful.actions_sha256 == record.actions_sha256 and wasteful.steps == record.steps


def test_only_the_first_actions_of_a_chunk_run(environment: Watched, start: Start) -> None:
    roll(environment, HoldsStill(), start, max_steps=7, open_loop_steps=3)
    marks = [round(action[5] * 1e6) for action in environment.actions]
    assert marks == [0, 1, 2, 0, 1, 2, 0]


def test_blank_images_render_nothing(environment: Watched, start: Start) -> None:
    policy = HoldsStill()
    record = roll(environment, policy, start, blank_images=True, control="blank_images")
    assert record.invalid is None and environment.frames == 0 and record.control == "blank_images"
    for observation in (query.observation for query in policy.queries):
        assert (observation["full_image"] == BLANK_LEVEL).all() and observation["wrist_image"].shape == (64, 64, 3)
        assert np.isfinite(observation["state"]).all()


def test_one_camera(environment: Watched, start: Start) -> None:
    policy = HoldsStill()
    record = roll(environment, policy, start, cameras=("full_image",))
    assert record.invalid is None and environment.frames == 3 and "wrist_image" not in policy.queries[0].observation


def test_an_exception_is_invalid_and_not_a_failure(environment: Watched, start: Start) -> None:
    record = roll(environment, Breaks(), start)
    assert record.success is None and record.steps == 0
    assert record.invalid is not None and "the policy broke" in record.invalid and "Traceback" in record.invalid


def test_impossible_start_is_invalid(environment: Watched, start: Start) -> None:
    record = roll(environment, HoldsStill(), replace(start, initial_state=999))
    assert record.success is None and "no initial state 999" in (record.invalid or "")


def test_success_ends_the_rollout(environment: Watched, start: Start) -> None:
    plate = load_task("libero_goal", PLATE)
    state = state_with_bowl_on_plate(environment, start)
    record = roll(environment, HoldsStill(), replace(start, state=state))
    assert record.success is False and record.steps == 20
    record = roll(environment, HoldsStill(), replace(start, state=state, other=plate, instruction=plate.language))
    assert record.success is False and record.other_success is True and record.other_task == PLATE
    assert record.steps < 20
    with LiberoEnvironment(plate, render=False, settle_steps=4) as other:
        record = run_episode(
            other, HoldsStill(), replace(start, task=plate, state=state), RolloutSettings(20, blank_images=True)
        )
    assert record.success is True


def test_displacement_is_recorded_and_moves_things(environment: Watched, start: Start) -> None:
    roll(environment, HoldsStill(), start, max_steps=1)
    standard = environment.data.qpos.copy()
    record = roll(environment, HoldsStill(), replace(start, displacement=Displacement(0.05, seed=7)), max_steps=1)
    assert record.displacement is not None and record.displacement["radius_m"] == 0.05
    assert np.abs(environment.data.qpos - standard).max() > 0.005


def test_video_shows_views_and_what_was_kept(environment: Watched, start: Start, tmp_path: Path) -> None:
    recorder = RolloutRecorder("put the bowl away", every_steps=4, center_crop=False)
    record = roll(environment, HoldsStill(), start, observers=[recorder])
    assert record.invalid is None
    # Policy queries at 0, 8, 16; in between 4, 12; the end at 20, held for a second at 5 frames a second.
    frames = list(recorder.frames())
    assert len(frames) == 3 + 2 + 1 + 5
    assert environment.frames == 2 * (3 + 2 + 1)
    assert len({frame.shape for frame in frames}) == 1
    views, dimmed = frames[0][-550:-294, 8:-8], frames[0][-264:-8, 8:-8]
    assert dimmed.mean() < 0.6 * views.mean()
    recorder.save(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").stat().st_size > 1000
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > picture.height  # three queries, two cameras


def test_a_video_names_start_control_and_outcome(environment: Watched, start: Start) -> None:
    plate = load_task("libero_goal", PLATE)
    swapped = replace(start, other=plate, instruction=plate.language)
    cases = [(start, "none", "", "not solved"), (start, "blank_images", " · control: blank images", "not solved")]
    words = f" · control: swapped instruction, own task: {start.task.name.replace('_', ' ')}"
    for begin, control, more, outcome in (
        *cases,
        (swapped, "swapped_instruction", words, "instructed goal not reached"),
    ):
        recorder = RolloutRecorder(begin.instruction, every_steps=4)
        settings = RolloutSettings(4, control=control)
        record = run_episode(environment, HoldsStill(), begin, settings, [recorder])
        assert record.invalid is None
        context = f"initial state {start.initial_state}, trial {start.trial}{more}"
        assert start_text(record) == context
        views = [environment.frame(camera) for camera in settings.cameras]
        count = f"kept {record.tokens_kept[-1]} of {record.num_visual_tokens}"
        caption = Caption(begin.instruction, f"step 4 · {count} visual tokens", False, context, outcome)
        *_, last = recorder.frames()
        np.testing.assert_array_equal(last, compose_frame(views, recorder.queries[-1], caption))
