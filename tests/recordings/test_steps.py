"""A robot's own records: every control step, checked as it comes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismatic.recordings.recording import Recording
from prismatic.recordings.steps import StepRecorder
from prismatic.vla.robots import LIBERO


def moments(count: int, seed: int = 0, size: int = 24) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        (
            {
                **{camera: rng.integers(0, 256, (size, size, 3), np.uint8) for camera in LIBERO.cameras},
                "state": rng.normal(size=8),
            },
            rng.uniform(-1, 1, 7),
        )
        for _ in range(count)
    ]


def test_an_episode_is_every_step_with_the_action_behind_it(tmp_path: Path) -> None:
    seen = moments(5)
    recorder = StepRecorder(tmp_path, LIBERO)
    with recorder.episode("lift it", name="try 1") as episode:
        for observation, action in seen:
            episode.step(observation, action)
        episode.success = True
    (path,) = episode.paths
    recording = Recording.load(path)
    assert path.stem.endswith("_try-1") and recording.success and recording.instruction == "lift it"
    assert recording.source == "robot" and recording.steps is not None and recording.steps.tolist() == list(range(5))
    np.testing.assert_array_equal(recording.actions, [action for _, action in seen])
    np.testing.assert_array_equal(recording.states, [observation["state"] for observation, _ in seen])
    for camera in LIBERO.cameras:
        np.testing.assert_array_equal(recording.images[camera], [observation[camera] for observation, _ in seen])
    assert recording.chunks is recording.kept is None and list(tmp_path.iterdir()) == [path]


def test_a_long_episode_is_written_in_parts_and_an_error_keeps_what_was(tmp_path: Path) -> None:
    seen = moments(7)
    with pytest.raises(KeyboardInterrupt), StepRecorder(tmp_path, LIBERO, max_steps=3).episode("lift it") as episode:
        for observation, action in seen:
            episode.step(observation, action)
        episode.success = False
        raise KeyboardInterrupt
    parts = [Recording.load(path) for path in episode.paths]
    assert [len(part) for part in parts] == [3, 3, 1] and [part.part for part in parts] == [1, 2, 3]
    np.testing.assert_array_equal(np.concatenate([part.actions for part in parts]), [action for _, action in seen])
    assert all(part.success is False and part.steps is not None and part.steps[0] == 0 for part in parts)


@pytest.mark.parametrize(
    ("change", "action", "words"),
    [
        ({"wrist_image": None}, np.zeros(7), r"lacks \['wrist_image'\]"),
        ({"full_image": np.zeros((8, 8, 3))}, np.zeros(7), r"full_image is float64 \(8, 8, 3\); expected uint8"),
        ({"full_image": np.zeros((8, 8, 3), np.uint8)}, np.zeros(7), "pictures of one episode have one size"),
        ({"state": np.zeros(7)}, np.zeros(7), r"the state is \(7,\)"),
        ({}, np.zeros(8), "the action is .* expected 7 finite numbers"),
        ({}, np.full(7, np.nan), "the action is .* expected 7 finite numbers"),
    ],
)
def test_what_is_no_step_is_refused_and_the_steps_before_stay(
    tmp_path: Path, change: dict[str, Any], action: np.ndarray, words: str
) -> None:
    observation, _ = moments(1)[0]
    wrong = {key: value for key, value in {**observation, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words), StepRecorder(tmp_path, LIBERO).episode("lift it") as episode:
        episode.step(observation, np.ones(7))
        episode.step(wrong, action)
    assert len(Recording.load(episode.paths[0])) == 1
    with pytest.raises(ValueError, match="needs an instruction"), StepRecorder(tmp_path, LIBERO).episode(" "):
        pass


def test_a_disk_that_takes_no_first_step_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    observation, _ = moments(1)[0]
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"), StepRecorder(tmp_path, LIBERO).episode("lift it") as episode:
        episode.step(observation, np.ones(7))
    assert not list(tmp_path.iterdir())


def test_torch_is_not_needed_at_the_robot() -> None:
    import subprocess
    import sys

    code = "import sys; import prismatic.recordings.steps; print(sorted({'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
