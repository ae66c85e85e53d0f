"""What the server's recorder writes is what was answered, whoever asks how, and however it ends."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from served_policy import served

from experiments.robot.libero.rollouts.record import EpisodeRecording, load_any
from prismatic.policy import Policy
from prismatic.recordings.recording import Facts, Recording
from prismatic.recordings.served import ServerRecorder, one_moment
from prismatic.serving.client import PolicyClient, PolicyServerError
from prismatic.serving.server.events import Answered, ConnectionChanged
from prismatic.serving.settings import ServerConfig, check

Asked = Callable[..., Answered]


def records(folder: Path) -> list[Recording]:
    return [Recording.load(path) for path in sorted(folder.glob("*.npz"))]


def assert_holds(recording: Recording, answers: list[Answered]) -> None:
    """The record is these answers, to the last bit."""
    assert len(recording) == len(answers)
    assert recording.kept is not None and recording.picks is not None and recording.scores is not None
    assert recording.chunks is not None and recording.numbers is not None and recording.times is not None
    for row, answered in enumerate(answers):
        for camera, pictures in recording.images.items():
            np.testing.assert_array_equal(pictures[row], answered.observation[camera])
        np.testing.assert_array_equal(recording.states[row], answered.observation["state"])
        np.testing.assert_array_equal(recording.chunks[row], answered.actions)
        for name in ("kept", "picks", "scores"):
            np.testing.assert_array_equal(getattr(recording, name)[row], getattr(answered, name))
        assert (recording.numbers[row], recording.times[row]) == (answered.query, answered.time)
        assert recording.warnings[row] == list(answered.warnings)
    assert {recording.instruction} == {answered.instruction for answered in answers}


def test_episodes_end_with_the_next_query_0_and_hold_what_was_answered(
    asked: Asked, facts: Facts, tmp_path: Path
) -> None:
    recorder = ServerRecorder(tmp_path / "records", lambda: facts)
    first = [asked(query, warnings=("action 3 is beyond",) if query == 1 else ()) for query in range(3)]
    second = [asked(query) for query in range(2)]
    for answered in (*first, *second):
        recorder.tell(answered)
    recorder.close()
    found = records(tmp_path / "records")
    assert [len(recording) for recording in found] == [3, 2]
    for recording, answers in zip(found, (first, second), strict=True):
        assert_holds(recording, answers)
        assert recording.source == "server" and recording.policy == facts.policy and recording.center_crop
        assert recording.robot == facts.robot.to_json() and recording.versions == {"lightvla": "1"}
        assert recording.success is recording.actions is recording.steps is None, "nobody has said it"
    assert [path.name for path in sorted((tmp_path / "records").iterdir())] == [
        "20270115T080000_0001_arm.npz",
        "20270115T080000_0002_arm.npz",
    ]


def test_what_a_client_reports_as_executed_is_recorded(asked: Asked, facts: Facts, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    executed = [rng.normal(size=(count, 7)) for count in (4, 2, 5)]
    recorder = ServerRecorder(tmp_path, lambda: facts)
    for query in range(3):
        recorder.tell(asked(query, executed=None if query == 0 else executed[query - 1]))
    recorder.tell(asked(0, executed=executed[2]))  # the last ones of the episode before
    recorder.tell(asked(2, executed=executed[0]))  # query 1 was missed, and with it what was executed behind query 0
    recorder.close()
    whole, missed = records(tmp_path)
    assert whole.steps is not None and whole.steps.tolist() == [0, 4, 6]
    np.testing.assert_array_equal(whole.actions, np.concatenate(executed))
    assert missed.numbers is not None and missed.numbers.tolist() == [0, 2] and missed.actions is None


def test_sessions_are_kept_apart_and_end_with_their_connection(asked: Asked, facts: Facts, tmp_path: Path) -> None:
    recorder = ServerRecorder(tmp_path, lambda: facts, quiet_s=0.2)
    answers = {name: [asked(query, name, connection=name) for query in range(2)] for name in ("a", "b")}
    for query in range(2):
        for name in ("a", "b"):
            recorder.tell(answers[name][query])
    recorder.tell(ConnectionChanged("a", "127.0.0.1", False, 0.0))
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob("*_a.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not list(tmp_path.glob("*_b.npz")), "b's connection is open"
    recorder.tell(asked(0, "c", connection="b"))  # which turns to another session now
    while not list(tmp_path.glob("*_b.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    recorder.close()
    assert_holds(Recording.load(next(tmp_path.glob("*_a.npz"))), answers["a"])
    assert_holds(Recording.load(next(tmp_path.glob("*_b.npz"))), answers["b"])
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_sessions_that_share_connections_are_not_cut(asked: Asked, facts: Facts, tmp_path: Path) -> None:
    """A client with a pool of connections asks for any session over any of them."""
    recorder = ServerRecorder(tmp_path, lambda: facts, quiet_s=30)
    for query in range(4):
        for number, name in enumerate(("a", "b")):
            recorder.tell(asked(query, name, connection=f"socket-{(query + number) % 2}"))
    recorder.close()
    assert [len(recording) for recording in records(tmp_path)] == [4, 4]


def test_long_episodes_and_other_pictures_begin_another_part(asked: Asked, facts: Facts, tmp_path: Path) -> None:
    recorder = ServerRecorder(tmp_path, lambda: facts, max_rows=2)
    answers = [asked(query) for query in range(5)]
    answers += [asked(5, size=32), asked(6, size=32, instruction="push it")]
    for answered in answers:
        recorder.tell(answered)
    recorder.close()
    found = records(tmp_path)
    assert [len(recording) for recording in found] == [2, 2, 1, 1, 1]
    assert [recording.part for recording in found] == [1, 2, 3, 4, 5]
    assert_holds(found[1], answers[2:4])
    assert_holds(found[4], answers[6:])


def test_a_killed_server_loses_no_finished_episode_and_the_next_one_finishes_the_last(
    asked: Asked, facts: Facts, tmp_path: Path
) -> None:
    code = (
        "import pickle, sys, time; from pathlib import Path; from prismatic.recordings.served import ServerRecorder\n"
        "folder, facts, answers = pickle.load(sys.stdin.buffer); recorder = ServerRecorder(folder, lambda: facts, 30)\n"
        "for answered in answers: recorder.tell(answered)\n"
        "while not list(folder.glob('*_0001_*.npz')): time.sleep(0.02)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    answers = [asked(0), asked(1), asked(0), asked(1), asked(2)]
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(pickle.dumps((tmp_path, facts, answers)))
        server.stdin.close()
        assert server.stdout.readline() == b"ready\n"
        (unfinished,) = tmp_path.glob(".*.unfinished")
        ServerRecorder(tmp_path, lambda: facts).close()
        assert unfinished.is_dir(), "it still goes on"
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    assert_holds(records(tmp_path)[0], answers[:2])
    (unfinished / "000003.partial").write_bytes(b"half of a row")
    ServerRecorder(tmp_path, lambda: facts).close()
    assert_holds(records(tmp_path)[1], answers[2:])
    assert not unfinished.exists()


def test_one_moment_is_a_record_of_its_own(asked: Asked, facts: Facts, tmp_path: Path) -> None:
    answered = asked(7, warnings=("beyond",))
    (tmp_path / "moment.npz").write_bytes(one_moment(answered, facts))
    recording = load_any(tmp_path / "moment.npz")
    assert isinstance(recording, Recording)
    assert_holds(recording, [answered])
    with pytest.raises(ValueError, match=r"recorded by a server, which knows neither .* cannot be replayed; lightvla"):
        EpisodeRecording.load(tmp_path / "moment.npz")


@pytest.mark.parametrize("convention", ["lightvla", "openpi"])
def test_what_a_real_server_answered_is_in_its_records(
    asked: Asked, facts: Facts, recorded_policy: Policy, tmp_path: Path, convention: str
) -> None:
    """Two episodes of one client, which reports what it executed; the last actions of the second are not known."""
    recorder = ServerRecorder(tmp_path, lambda: facts)
    names = {"full_image": "observation/image", "wrist_image": "observation/wrist_image", "state": "observation/state"}
    observations = [asked(query).observation for query in range(4)]
    replies, executed = [], None
    with served(recorded_policy, [recorder], convention=convention) as server:
        client = PolicyClient(server.url)
        for number, observation in enumerate(observations):
            keys = {names[key] if convention == "openpi" else key: value for key, value in observation.items()}
            request = {**keys, "prompt": "lift it", "session": "arm", "query": number % 2, "executed": executed}
            replies.append(client.infer(request).content)
            executed = replies[-1]["actions"][:3]
        client.close()
    found = records(tmp_path)
    assert [len(recording) for recording in found] == [2, 2]
    for row, (reply, observation) in enumerate(zip(replies, observations, strict=True)):
        recording, place = found[row // 2], row % 2
        assert recording.chunks is not None and recording.kept is not None and recording.session == "arm"
        gripper = reply["actions"][:, 6] if convention == "lightvla" else (1 - reply["actions"][:, 6]) / 2
        np.testing.assert_array_equal(recording.chunks[place][:, :6], reply["actions"][:, :6])
        np.testing.assert_allclose(recording.chunks[place][:, 6], gripper, atol=1e-12)
        np.testing.assert_array_equal(recording.kept[place], reply["kept"])
        np.testing.assert_array_equal(recording.states[place], observation["state"])
        for camera in recorded_policy.robot.cameras:
            np.testing.assert_array_equal(recording.images[camera][place], observation[camera])
    assert all(recording.actions is not None and recording.chunks is not None for recording in found)
    first, second = found
    np.testing.assert_allclose(first.actions, np.concatenate([chunk[:3] for chunk in first.chunks]), atol=1e-12)
    np.testing.assert_allclose(second.actions, second.chunks[0][:3], atol=1e-12)
    assert second.steps is not None and second.steps.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("executed", "words"),
    [
        (np.zeros((3, 6)), r"executed is an array of float64 \(3, 6\); .* at most 10000 rows of 7 finite numbers"),
        (np.full((1, 7), np.nan), "executed is an array"),
        ("none", "executed is 'none'"),
        (np.zeros((10_001, 7)), "executed is an array"),
    ],
)
def test_what_cannot_have_been_executed_is_refused(
    asked: Asked, recorded_policy: Policy, executed: object, words: str
) -> None:
    with served(recorded_policy) as server:
        client = PolicyClient(server.url)
        with pytest.raises(PolicyServerError, match=words):
            client.infer({**asked(0).observation, "prompt": "lift it", "executed": executed})
        client.close()


def test_a_file_is_no_folder_of_records(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--record .*: there is a file of that name; expected a folder"):
        check(ServerConfig(pretrained_checkpoint="x", record=tmp_path / "file"))


def test_a_disk_that_was_full_for_a_while_costs_only_what_came_meanwhile(
    asked: Asked, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = ServerRecorder(tmp_path, lambda: facts)
    with monkeypatch.context() as disk:
        disk.setattr(np, "savez", full)
        for query in range(2):
            with pytest.raises(OSError, match="No space left"):
                recorder.tell(asked(query))
    assert not list(tmp_path.iterdir()), "an episode that could not begin leaves nothing"
    answers = [asked(query) for query in range(2, 4)]
    for answered in answers:
        recorder.tell(answered)
    (damaged,) = tmp_path.glob(".*/000001.npz")
    damaged.write_bytes(b"no archive")
    recorder.tell(asked(0))  # ends the damaged one
    last = asked(0, session="other")
    recorder.tell(last)
    recorder.close()
    assert [recording.session for recording in records(tmp_path)] == ["arm", "other"]
    assert damaged.is_file(), "what cannot be finished is left where it is"


def test_two_servers_may_record_into_one_folder(asked: Asked, facts: Facts, tmp_path: Path) -> None:
    one, other = (ServerRecorder(tmp_path, lambda: facts) for _ in range(2))
    for query in range(2):
        one.tell(asked(query))
        other.tell(asked(query))
    one.close()
    other.close()
    assert [len(recording) for recording in records(tmp_path)] == [2, 2]
