"""Plot what a policy predicts over a recorded episode against what was done: the open-loop replay.

    lightvla replay-plot --checkpoint CHECKPOINT --dataset_dir DATA/kitchen --episode 3

The policy is asked about the recorded observations, so nothing moves and no error adds up: large differences mean that
it has not learnt these data, or that data and policy follow different conventions. Small ones do not yet mean that it
can act. Ends with 0, or 2 when something cannot be used.
"""

from __future__ import annotations

import argparse
import importlib.util
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from lightvla.commands.visualize import BATCH, load_policy, progress
from prismatic.atomic_files import write_atomically
from prismatic.command_status import UNUSABLE, print_error
from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec, read_spec_file
from prismatic.vla.datasets.stored.episode import Episode
from prismatic.vla.datasets.stored.index import DatasetIndex


@dataclass(frozen=True, eq=False)
class OpenLoop:
    """A policy beside an episode of T steps.

    Attributes:
        title: dataset, episode and instruction.
        recorded: (T, action_dim) what was done, of the policy's convention.
        steps: (L,) where the policy was asked.
        predicted: (L, chunk, action_dim) what it would have done from there on.
        low, high: (action_dim,) bounds of the training data.
        names: of the action dimensions.
    """

    title: str
    recorded: NDArray[np.float64]
    steps: NDArray[np.int64]
    predicted: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    names: tuple[str, ...]

    @property
    def errors(self) -> NDArray[np.float64]:
        """(action_dim,) mean absolute difference over all predicted steps that the episode has."""
        return np.abs(np.concatenate([chunk - self.recorded[span] for span, chunk in self._pairs()])).mean(0)

    @property
    def still_errors(self) -> NDArray[np.float64]:
        """(action_dim,) the same for whoever always does the episode's median action: what a policy must beat."""
        return np.abs(self.recorded - np.median(self.recorded, axis=0)).mean(0)

    def _pairs(self) -> list[tuple[slice, NDArray[np.float64]]]:
        spans = [slice(step, min(step + self.predicted.shape[1], len(self.recorded))) for step in self.steps.tolist()]
        return [(span, chunk[: span.stop - span.start]) for span, chunk in zip(spans, self.predicted, strict=True)]

    def figure(self) -> Any:
        """A panel per action dimension: recorded, and each predicted chunk from where it was asked."""
        import matplotlib
        from matplotlib.figure import Figure

        from prismatic.report.figures import COLOURS, STYLE

        dimensions = self.recorded.shape[1]
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(10, 0.9 + 1.35 * dimensions), layout="constrained")
            figure.suptitle(textwrap.fill(self.title, 100), fontsize=11)
            panels = figure.subplots(dimensions, 1, sharex=True, squeeze=False)[:, 0]
            for number, axes in enumerate(panels):
                for bound in (self.low[number], self.high[number]):
                    axes.axhline(bound, color="0.8", linewidth=0.8)
                (done,) = axes.plot(self.recorded[:, number], color="0.25", linewidth=1.6)
                for (span, chunk), step in zip(self._pairs(), self.steps.tolist(), strict=True):
                    steps = np.arange(span.start, span.stop)
                    (told,) = axes.plot(steps, chunk[:, number], color=COLOURS[1], linewidth=1.3, alpha=0.9)
                    axes.plot(step, chunk[0, number], "o", color=COLOURS[1], markersize=3)
                axes.set_ylabel(f"{self.names[number]}\nerror {self.errors[number]:.3g}", fontsize=9)
                axes.grid(alpha=0.25, linewidth=0.6)
                axes.spines[["top", "right"]].set_visible(False)
            panels[-1].set_xlabel("control step")
            bounds = panels[0].lines[0]
            labels = ["recorded", "predicted, from each query on", "bounds of the training data (1 % and 99 %)"]
            figure.legend([done, told, bounds], labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        return figure


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Ask the policy, draw, say the errors; returns the exit status."""
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("the plot needs matplotlib: pip install 'lightvla[report]'")
        if arguments.every is not None and arguments.every < 1:
            raise ValueError(f"--every {arguments.every}: expected at least 1")
        index, episode = read_episode(arguments)
        loop = ask(load_policy(arguments), index, episode, arguments, console)
        draw(loop, arguments, console)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print_error(error)
        return UNUSABLE
    return 0


def read_episode(arguments: argparse.Namespace) -> tuple[DatasetIndex, Episode]:
    """Raises ValueError or FileNotFoundError for a dataset or an episode that is not there or cannot be read."""
    folder = arguments.dataset_dir.resolve()
    file = read_spec_file(arguments.dataset_spec)
    spec = find_dataset_spec(folder.name, arguments.robot, arguments.gripper, file)
    index = open_dataset(folder.parent, folder.name, spec).with_checked_gripper()
    if not 0 <= arguments.episode < len(index.episodes):
        raise ValueError(
            f"--episode {arguments.episode}: {folder.name} has {len(index.episodes)} episodes, counted from 0"
        )
    return index, index.episodes[arguments.episode]


def ask(
    policy: Any, index: DatasetIndex, episode: Episode, arguments: argparse.Namespace, console: Console
) -> OpenLoop:
    """The policy's chunks over the episode.

    Raises ValueError where the dataset is another robot's, or lacks what the policy reads.
    """
    robot, transform = policy.robot, policy.transform
    if index.spec.robot.action_dim != robot.action_dim:
        raise ValueError(
            f"{index.name} has {index.spec.robot.action_dim} action dimensions (robot {index.spec.robot.name!r}), the "
            f"policy has {robot.action_dim} (robot {robot.name!r})"
        )
    cameras = index.check_cameras(transform.num_images)
    if transform.use_proprio and episode.state is None:
        raise ValueError(f"dataset {index.name!r} has no state, which the policy reads")
    steps = np.arange(0, episode.num_frames, arguments.every or robot.open_loop_steps)
    predicted = []
    for first in progress(range(0, len(steps), BATCH), "asking the policy", console):
        chosen = steps[first : first + BATCH].tolist()
        observations = [{camera: episode.image(camera, step) for camera in cameras} for step in chosen]
        for observation, step in zip(observations, chosen, strict=True):
            if transform.use_proprio and episode.state is not None:
                observation[robot.state_key] = episode.state[step]
        instructions = [episode.instructions[step] or episode.instruction for step in chosen]
        predicted.append(policy.act_batch(observations, instructions, seeds=chosen).actions)
    low, high = (np.array(transform.statistics["action"][key], np.float64) for key in ("q01", "q99"))
    return OpenLoop(
        title=f"{index.name}, episode {arguments.episode}: {episode.instruction}",
        recorded=index.spec.map_actions(episode.action).astype(np.float64),
        steps=steps,
        predicted=np.concatenate(predicted),
        low=low,
        high=high,
        names=robot.action_names,
    )


def draw(loop: OpenLoop, arguments: argparse.Namespace, console: Console) -> None:
    """Write the plot, and say what it shows in numbers."""
    from prismatic.report.pruning import figure_png

    write_atomically(arguments.output, figure_png(loop.figure()))
    for name, error, still in zip(loop.names, loop.errors, loop.still_errors, strict=True):
        console.print(f"{name:>9}: mean error {error:.4f} (the median action: {still:.4f})", highlight=False)
    console.print(f"plot: {arguments.output}", markup=False, highlight=False, soft_wrap=True)


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    return main(flags, Console())
