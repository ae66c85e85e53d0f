"""Recorded episodes: equal to what was shown and done, refused when damaged, and repeated by the simulator alone."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments.robot.libero.policies.contract import ActionChunk, Observation, PolicyQuery
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.results.results import EpisodeRecord
from experiments.robot.libero.rollouts.record import EpisodeRecorder, EpisodeRecording
from experiments.robot.libero.rollouts.replay import replay
from experiments.robot.libero.rollouts.rollout import Moment, RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.rollouts.video import RolloutRecorder
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from experiments.robot.libero.simulator.wide_starts import Displacement
from lightvla.commands.replay import main as replay_command
from prismatic.models.token_pruner import score_tokens
from prismatic.policy import Policy
from prismatic.recordings.recording import Recording

STOVE, PLATE = 1, 8  # tasks of libero_goal that share a scene


class Notes:
    """Observes a rollout and keeps copies of everything."""

    def __init__(self) -> None:
        self.queries: list[tuple[int, Observation, ActionChunk, np.ndarray]] = []
        self.actions: list[np.ndarray] = []
        self.ended: EpisodeRecord | None = None

    def on_query(self, moment: Moment, observation: Observation, chunk: ActionChunk) -> None:
        copies = {key: value.copy() for key, value in observation.items()}
        self.queries.append((moment.step, copies, chunk, moment.environment.data.qpos.copy()))

    def step(self, moment: Moment, action: np.ndarray) -> None:
        self.actions.append(action.copy())

    def finish(self, moment: Moment, record: EpisodeRecord) -> None:
        self.ended = record


@pytest.fixture(scope="module")
def policy(untrained_checkpoint: Path) -> Policy:
    return Policy.from_pretrained(untrained_checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def episode(policy: Policy) -> tuple[EpisodeRecording, Notes]:
    """Twenty steps of the untrained policy from a wide start, recorded and noted."""
    task = load_task("libero_goal", STOVE)
    start = Start(task, task.language, 3, 2, 7, Displacement(0.05, seed=7, split="evaluation"))
    settings, agent = RolloutSettings(max_steps=20, open_loop_steps=6), PolicyAgent(policy)
    recorder, notes = EpisodeRecorder(start, settings, policy=agent.description()), Notes()
    with LiberoEnvironment(task, 64, renderer="fast", settle_steps=3) as environment:
        record = run_episode(environment, agent, start, settings, [recorder, notes])
    assert record.invalid is None and recorder.recording is not None
    return recorder.recording, notes


@pytest.fixture
def saved(episode: tuple[EpisodeRecording, Notes], tmp_path: Path) -> Path:
    path = tmp_path / "records" / "episode.npz"
    episode[0].save(path)
    return path


def test_a_file_holds_what_was_shown_and_done(episode: tuple[EpisodeRecording, Notes], saved: Path) -> None:
    notes, loaded = episode[1], EpisodeRecording.load(saved)
    assert [query[0] for query in notes.queries] == loaded.query_steps.tolist() == [0, 6, 12, 18]
    assert loaded.kept is not None and loaded.picks is not None and loaded.scores is not None
    for row, (_, observation, chunk, qpos) in enumerate(notes.queries):
        for camera in ("full_image", "wrist_image"):
            np.testing.assert_array_equal(loaded.images[camera][row], observation[camera])
        np.testing.assert_array_equal(loaded.states[row], observation["state"])
        np.testing.assert_array_equal(loaded.chunks[row], chunk.actions)
        np.testing.assert_array_equal(loaded.qpos[row], qpos)
        for stored, given in ((loaded.kept, chunk.kept), (loaded.picks, chunk.picks), (loaded.scores, chunk.scores)):
            assert given is not None and stored.dtype == given.dtype
            np.testing.assert_array_equal(stored[row], given)
    np.testing.assert_array_equal(loaded.actions, np.stack(notes.actions))
    np.testing.assert_array_equal(loaded.actions[6:12], loaded.chunks[1, :6])
    assert notes.ended is not None and loaded.episode == replace(notes.ended, wall_seconds=0.0)
    assert asdict(loaded.settings) == asdict(episode[0].settings)
    assert loaded.policy["num_visual_tokens"] == loaded.kept.shape[1] == 98 and len(loaded.images) == 2
    assert loaded.environment == {
        "resolution": 64, "renderer": "fast", "settle_steps": 3, "canonical_quaternion": False,
    }  # fmt: skip
    assert "mujoco" in loaded.versions


def test_pictures_of_a_still_camera_take_little_room(episode: tuple[EpisodeRecording, Notes], tmp_path: Path) -> None:
    recording = episode[0]
    still = {camera: np.repeat(pictures[:1], 40, axis=0) for camera, pictures in recording.images.items()}
    rows = {name: np.repeat(getattr(recording, name)[:1], 40, axis=0) for name in ("states", "qpos", "chunks")}
    longer = replace(recording, images=still, **rows, query_steps=np.arange(40), kept=None, picks=None, scores=None)
    longer.save(tmp_path / "still.npz")
    single = sum(pictures[0].nbytes for pictures in still.values())
    assert (tmp_path / "still.npz").stat().st_size < 2 * single
    loaded = EpisodeRecording.load(tmp_path / "still.npz")
    assert loaded.kept is None and all((loaded.images[camera] == still[camera]).all() for camera in still)


def test_scores_are_the_best_that_any_patch_query_gave(policy: Policy) -> None:
    rng = np.random.default_rng(0)
    queries = [
        PolicyQuery(
            {
                **{camera: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for camera in policy.robot.cameras},
                "state": rng.normal(size=8),
            },
            words,
        )
        for words in ("lift it", "put the red bowl on the plate")
    ]
    policy = Policy(policy.checkpoint, policy.transform, policy.unnorm_key, "eager")  # whose modules are called
    given: list[Any] = []
    handle = policy.model.pruner.register_forward_pre_hook(lambda module, args: given.append(args))
    chunks = PolicyAgent(policy).query(queries)
    handle.remove()
    ((patches, context, mask, *_),) = given
    table = score_tokens(patches, context, mask)
    for row, chunk in enumerate(chunks):
        assert chunk.scores is not None and chunk.scores.dtype == np.float32 and chunk.scores.shape == (98,)
        expected = [max(float(table[row, query, token]) for query in range(98)) for token in range(98)]
        np.testing.assert_allclose(chunk.scores, expected, rtol=1e-6)
    policy.set_pruner("none")
    try:
        assert PolicyAgent(policy).query(queries[:1])[0].scores is None
    finally:
        policy.set_pruner("lightvla")


def test_a_file_of_the_first_format_is_read(saved: Path) -> None:
    """It names one array otherwise."""
    recording = EpisodeRecording.load(saved)
    rewrite(saved, lambda header, arrays: header.update(format_version=1))
    rewrite(saved, lambda header, arrays: arrays.update(look_steps=arrays.pop("query_steps")))
    older = EpisodeRecording.load(saved)
    assert older.query_steps.dtype == recording.query_steps.dtype
    np.testing.assert_array_equal(older.query_steps, recording.query_steps)
    assert older.episode == recording.episode and older.versions == recording.versions
    np.testing.assert_array_equal(older.images["full_image"], recording.images["full_image"])


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change header and arrays of a file in place."""
    with np.load(path) as content:
        arrays = dict(content)
    header = json.loads(str(arrays["header"]))
    change(header, arrays)
    np.savez_compressed(path, **{**arrays, "header": np.array(json.dumps(header))})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header, arrays: header.update(format_version=99), "has format version 99, this code reads 1 and 2"),
        (lambda header, arrays: arrays.pop("qpos"), r"lacks the arrays \['qpos'\]"),
        (lambda header, arrays: arrays.pop("images_wrist_image"), r"lacks the arrays \['images_wrist_image'\]"),
        (lambda header, arrays: header.pop("settings"), r"the header of .* lacks \['settings'\]"),
        (lambda header, arrays: header["settings"].pop("cameras"), "the header of .* lacks 'cameras'"),
        (lambda header, arrays: header.update(settings=[]), "the header of .* is unusable"),
        (lambda header, arrays: header.update(episode={}), "the header of .* missing .* 'suite'"),
        (lambda header, arrays: header.update(episode=None), "its EpisodeRecord is a NoneType"),
        (lambda header, arrays: header["episode"].update(steps="20"), "of another kind: numbers of steps"),
        (lambda header, arrays: header["settings"].update(cameras=[["full_image"]]), "of another kind: cameras"),
        (lambda header, arrays: header.update(control_rate_hz=float("nan")), "of another kind: control_rate_hz"),
        (lambda header, arrays: header.update(num_visual_tokens="98"), "of another kind: numbers of steps, tokens"),
        (lambda header, arrays: header.update(environment=[1]), "of another kind: environment"),
        (
            lambda header, arrays: arrays.update(kept=arrays["kept"][0]),
            r"kept is uint8 \(13,\); expected numbers with 2",
        ),
        (lambda header, arrays: arrays.update(qpos=np.array(["a"])), "qpos is <U1"),
        (lambda header, arrays: arrays.update(images_full_image=np.zeros(3)), r"expected uint8 \(L, H, W, 3\)"),
        (lambda header, arrays: header["episode"].update(mood="good"), r"unknown entries \['mood'\]"),
        (lambda header, arrays: arrays.update(actions=arrays["actions"] + 1e-9), "another SHA-256"),
        (lambda header, arrays: arrays.update(states=arrays["states"][1:]), "numbers of policy queries differ"),
    ],
)
def test_a_wrong_file_is_refused_by_name(saved: Path, change: Any, words: str) -> None:
    rewrite(saved, change)
    with pytest.raises(ValueError, match=words):
        EpisodeRecording.load(saved)


@pytest.mark.parametrize("header", ["{", "[1]", "1", "", "null", "[" * 100_000])
def test_a_header_that_is_none_is_refused_by_name(tmp_path: Path, header: str) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, header=np.array(header))
    with pytest.raises(ValueError, match=r"the header of .*odd\.npz is unusable"):
        EpisodeRecording.load(path)


def test_what_is_no_record_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--record True writes them"):
        EpisodeRecording.load(tmp_path / "missing.npz")
    path = tmp_path / "other.npz"
    content = saved.read_bytes()
    for wrong in (b"", b"hello", content[: len(content) // 2]):
        path.write_bytes(wrong)
        with pytest.raises(
            ValueError, match="is no episode record, or is damaged .not a whole .npz archive"
        ) as refused:
            EpisodeRecording.load(path)
        assert "pickle" not in str(refused.value)
    np.savez(path, header=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="is damaged .it holds Python objects, which records never do") as refused:
        EpisodeRecording.load(path)
    assert "pickle" not in str(refused.value)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="is no episode record, or is damaged"):
        EpisodeRecording.load(tmp_path / "array.npy")
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ValueError, match="it has no header"):
        EpisodeRecording.load(path)


def test_a_failing_save_leaves_the_file_before(episode: tuple[EpisodeRecording, Notes], saved: Path) -> None:
    before = saved.read_bytes()
    unwritable = replace(episode[0], actions=np.array([object()]))
    with pytest.raises(ValueError, match=r"the arrays \['actions'\] hold Python objects"):
        unwritable.save(saved)
    # This one fails while it is being written: no archive takes such a name.
    with pytest.raises(UnicodeEncodeError):
        replace(episode[0], images={"\ud800": episode[0].images["full_image"]}).save(saved)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert zipfile.is_zipfile(saved)


def test_an_invalid_rollout_is_not_recorded() -> None:
    class Breaks:
        def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
            raise RuntimeError("the policy broke")

    task = load_task("libero_goal", STOVE)
    start, settings = Start(task, task.language, 3, 0, 7), RolloutSettings(20, blank_images=True)
    recorder = EpisodeRecorder(start, settings)
    with LiberoEnvironment(task, resolution=64, render=False) as environment:
        record = run_episode(environment, Breaks(), start, settings, [recorder])
    assert record.invalid is not None and "the policy broke" in record.invalid
    assert recorder.recording is None


def test_a_replay_repeats_the_episode_exactly(episode: tuple[EpisodeRecording, Notes], saved: Path) -> None:
    loaded = EpisodeRecording.load(saved)
    result = replay(loaded)
    assert result.differences == () and result.qpos_deviation == 0.0
    assert (result.episode.success, result.episode.steps) == (False, 20)
    assert result.episode.actions_sha256 == episode[0].episode.actions_sha256
    pushed = replace(loaded, actions=loaded.actions + 1e-3)
    other = replay(pushed)
    assert len(other.differences) == 1 and other.differences[0].startswith("actions (SHA-256): recorded ")
    assert other.qpos_deviation > 1e-5
    assert replay(replace(loaded, start_state=load_task("libero_goal", STOVE).init_states[4])).qpos_deviation > 1e-3
    assert loaded.episode.bddl_sha256 == load_task("libero_goal", STOVE).bddl_sha256
    with pytest.raises(ValueError, match="is not what libero_goal task .* was when the episode was recorded"):
        replay(replace(loaded, episode=replace(loaded.episode, bddl_sha256="5eed")))


class Waves:
    """Never quite the same action twice."""

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        return [ActionChunk(np.random.default_rng(query.seed).uniform(-0.1, 0.1, (8, 7))) for query in queries]


def bowl_on_plate() -> np.ndarray:
    """An initial state whose bowl stands on the plate."""
    task = load_task("libero_goal", PLATE)
    with LiberoEnvironment(task, render=False) as environment:
        state = task.init_states[5].copy()
        joints = [environment.inner.objects_dict[name].joints[-1] for name in ("akita_black_bowl_1", "plate_1")]
        bowl, plate = (1 + environment.model.jnt_qposadr[environment.model.joint(joint).id] for joint in joints)
        state[bowl : bowl + 3] = state[plate : plate + 3] + [0, 0, 0.03]
    return state


def test_a_replay_ends_where_the_success_was(tmp_path: Path) -> None:
    task, settings = load_task("libero_goal", PLATE), RolloutSettings(30, blank_images=True, control="blank_images")
    start = Start(task, "do it", 5, 0, 7, state=bowl_on_plate(), other=load_task("libero_goal", STOVE))
    recorder = EpisodeRecorder(start, settings)
    with LiberoEnvironment(task, resolution=64, render=False, settle_steps=2) as environment:
        record = run_episode(environment, Waves(), start, settings, [recorder])
    assert record.success and record.other_success is False and 0 < record.steps < 30
    assert recorder.recording is not None
    recorder.recording.save(tmp_path / "a.npz")
    loaded = EpisodeRecording.load(tmp_path / "a.npz")
    assert loaded.kept is loaded.scores is None and (loaded.images["full_image"] == 127).all()
    result = replay(loaded)
    assert result.differences == () and result.episode.success and result.episode.steps == record.steps


def test_a_replay_can_be_filmed(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = tmp_path / "replay.mp4"
    assert replay_command(saved, video, 4, Console(width=300)) == 0
    expected = "not solved after 20 steps; joint positions at the policy queries differ by at most 0 from"
    assert expected in capsys.readouterr().out
    assert video.stat().st_size > 1000 and video.with_suffix(".png").is_file()
    saved.write_bytes(b"")
    assert replay_command(saved, None, 4, Console(width=300)) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_a_replay_records_every_step(
    episode: tuple[EpisodeRecording, Notes], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay_command(saved, None, 4, Console(width=300), tmp_path / "steps") == 0
    (path,) = (tmp_path / "steps").glob("*.npz")
    assert f"every step: {path}" in capsys.readouterr().out
    steps, recording = Recording.load(path), episode[0]
    assert steps.source == "robot" and steps.success is False and steps.instruction == recording.episode.instruction
    assert steps.steps is not None and steps.steps.tolist() == list(range(20))
    np.testing.assert_array_equal(steps.actions, recording.actions)
    queried = recording.query_steps
    np.testing.assert_array_equal(steps.states[queried], recording.states)
    for camera, pictures in recording.images.items():
        np.testing.assert_array_equal(steps.images[camera][queried], pictures)
    assert (steps.images["full_image"][3] != steps.images["full_image"][0]).any()


def test_replays_refuse_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.npz"
    np.savez(path, header=np.array("[1]"))
    assert replay_command(path, None, 4, Console(width=300)) == 2
    assert capsys.readouterr().err.startswith(f"error: the header of {path} is unusable")
    for steps in (0, -2):
        assert replay_command(path, tmp_path / "a.mp4", steps, Console(width=300)) == 2
        assert capsys.readouterr().err == f"error: --every_steps {steps}: expected at least 1\n"


def test_a_video_s_path_is_no_markup(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = tmp_path / "[bold]x" / "a.mp4"
    assert replay_command(saved, video, 10, Console(width=300)) == 0 and video.is_file()
    output = capsys.readouterr().out
    assert f"video: {video}" in output.replace("\n", "")
    assert output.endswith("as recorded: outcome, steps, actions\n") and "different" not in output


def test_a_filmed_replay_shows_the_pictures_of_the_rollout(saved: Path) -> None:
    loaded, recorder, notes = EpisodeRecording.load(saved), RolloutRecorder("x", every_steps=4), Notes()
    assert replay(loaded, [recorder, notes], render=True).differences == ()
    for row, query in enumerate(notes.queries):
        np.testing.assert_array_equal(query[1]["full_image"], loaded.images["full_image"][row])
    assert len(recorder.queries) == 4


def test_torch_is_not_needed_to_read(saved: Path) -> None:
    code = (
        "import sys; from experiments.robot.libero.rollouts.record import EpisodeRecording; "
        f"EpisodeRecording.load({str(saved)!r}); print(sorted({{'torch', 'mujoco'}} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
