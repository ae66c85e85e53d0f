"""Draw what a policy saw: which image patches its pruner kept, at each policy query and on average.

From recorded episodes (`lightvla eval --record True`, `lightvla serve --record`), without loading any model:

    lightvla visualize --record experiments/logs/RUN --output_dir pictures

From any checkpoint, over an episode of an RLDS or LeRobot dataset or a picture per camera:

    lightvla visualize --checkpoint CHECKPOINT --dataset_dir DATA/libero_goal_no_noops --episode 3
    lightvla visualize --checkpoint CHECKPOINT --images full.png wrist.png --instruction "lift it"

Per episode: every policy query with pruned patches dimmed (`queries/`), the same as a video, an overview, maps of how
often each patch was kept and of its mean score, and a chart of the tokens kept; over several episodes a map per task
and a chart. Ends with 0, or 2 when something cannot be used.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from lightvla.flags import visualize_parser
from lightvla.recordings.traces import policy_text, record_traces
from prismatic.command_status import UNUSABLE, print_error
from prismatic.pictures.images import encode_png
from prismatic.pictures.trace import PruningTrace
from prismatic.pictures.video import write_mp4
from prismatic.report.data import counted

if TYPE_CHECKING:
    from prismatic.report.pruning import KeptTokens, PatchSums

FPS = (0.1, 240)
BATCH = 4


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Read, draw, say where; returns the exit status."""
    summaries: list[str] = []
    try:
        check(arguments)
        common = Common()
        for name, trace in record_traces(arguments.record) if arguments.record else policy_traces(arguments, console):
            fps = None if arguments.no_video else arguments.fps or trace.queries_per_second
            common.add(name, trace, draw(trace, arguments.output_dir / name, fps, console))
            summaries.append(f"{name}: {summary(trace)}")
        common.draw(arguments.output_dir)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print_error(error)
        return UNUSABLE
    for line in (*summaries, f"pictures: {arguments.output_dir}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def summary(trace: PruningTrace) -> str:
    """`34 policy queries, 17.3 of 98 tokens kept (12 to 27)`."""
    kept = trace.kept.sum(axis=1)
    if trace.num_queries == 1:
        return f"1 policy query, {kept[0]} of {trace.kept.shape[1]} tokens kept"
    mean, span = f"{kept.mean():.1f} of {trace.kept.shape[1]}", f"{kept.min()} to {kept.max()}"
    return f"{trace.num_queries} policy queries, {mean} tokens kept ({span})"


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError or ImportError for arguments that do not go together, and for what is not installed."""
    if bool(arguments.record) == bool(arguments.checkpoint):
        raise ValueError("give either --record (recorded episodes) or --checkpoint (a policy to run)")
    if arguments.checkpoint and bool(arguments.images) == bool(arguments.dataset_dir):
        raise ValueError("--checkpoint needs frames: give either --dataset_dir with --episode, or --images")
    if arguments.images and not arguments.instruction:
        raise ValueError("--images needs --instruction: the tokens that are kept depend on it")
    if arguments.every is not None and arguments.every < 1:
        raise ValueError(f"--every {arguments.every}: expected at least 1")
    if arguments.fps is not None and not FPS[0] <= arguments.fps <= FPS[1]:
        raise ValueError(f"--fps {arguments.fps}: expected {FPS[0]} to {FPS[1]} policy queries a second")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("maps and charts need matplotlib: pip install 'lightvla[report]'")
    if not arguments.no_video and not arguments.images and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ImportError("videos need imageio-ffmpeg: pip install 'imageio[ffmpeg]', or give --no_video")


def policy_traces(arguments: argparse.Namespace, console: Console) -> list[tuple[str, PruningTrace]]:
    """The frames as the checkpoint's policy sees them, under a name."""
    frames = image_frames(arguments) if arguments.images else None  # early, before the policy is loaded
    policy = load_policy(arguments)
    if frames is not None:
        name, steps = arguments.images[0].stem, np.zeros(1, np.int64)
        observations = [name_cameras(policy, frames, arguments, console)]
        instructions = [arguments.instruction]
    else:
        name, instructions, steps, observations = dataset_frames(policy, arguments)
    trace = run_policy(policy, observations, instructions, steps, console)
    return [(name, replace(trace, source=policy_text(arguments.checkpoint, str(policy.model.config.pruner_spec))))]


def load_policy(arguments: argparse.Namespace) -> Any:
    from prismatic.policy import Policy

    device = arguments.device or "auto"
    return Policy.from_pretrained(
        arguments.checkpoint, device=device, unnorm_key=arguments.unnorm_key, pruner=arguments.pruner
    )


def image_frames(arguments: argparse.Namespace) -> list[np.ndarray]:
    """The pictures of `--images`, uint8 (H, W, 3) each. Raises ValueError for a file that is none."""
    from PIL import Image

    pictures = []
    for path in arguments.images:
        try:
            with Image.open(path) as picture:
                pictures.append(np.asarray(picture.convert("RGB")))
        except FileNotFoundError as error:
            raise ValueError(f"--images {path}: there is no such file; give one picture per camera") from error
        except OSError as error:
            raise ValueError(f"--images {path}: no picture that can be read, such as PNG or JPEG ({error})") from error
    return pictures


def name_cameras(
    policy: Any, pictures: Sequence[np.ndarray], arguments: argparse.Namespace, console: Console
) -> dict[str, np.ndarray]:
    """Pictures and state as an observation. Raises ValueError for another number of either than the policy reads."""
    robot, transform = policy.robot, policy.transform
    cameras = robot.cameras[: transform.num_images]
    if len(pictures) != len(cameras):
        raise ValueError(f"--images: {len(pictures)} given; the policy reads {len(cameras)}: {', '.join(cameras)}")
    observation = dict(zip(cameras, pictures, strict=True))
    if transform.use_proprio:
        state = arguments.state
        if state is None:
            state = transform.statistics["proprio"]["mean"]
            console.print("[yellow]assumed:[/] the mean state of the training data; --state gives another")
        if len(state) != robot.proprio_dim:
            raise ValueError(f"--state: {len(state)} numbers given; robot {robot.name!r} has {robot.proprio_dim}")
        observation[robot.state_key] = np.asarray(state, dtype=np.float64)
    return observation


def dataset_frames(
    policy: Any, arguments: argparse.Namespace
) -> tuple[str, list[str], np.ndarray, list[dict[str, np.ndarray]]]:
    """One episode of the dataset at the steps of its policy queries: name, instructions, steps, observations.

    Steps without an instruction are left out.

    Raises:
        ValueError: for an episode that is not there, or a dataset that lacks what the policy reads.
        FileNotFoundError: as `open_dataset`.
    """
    from prismatic.vla.datasets.entries.opening import open_dataset
    from prismatic.vla.datasets.entries.spec_file import find_dataset_spec, read_spec_file

    folder = arguments.dataset_dir.resolve()
    spec = find_dataset_spec(folder.name, arguments.robot, file=read_spec_file(arguments.dataset_spec))
    index = open_dataset(folder.parent, folder.name, spec, policy.transform.use_proprio)
    if not 0 <= arguments.episode < len(index.episodes):
        raise ValueError(
            f"--episode {arguments.episode}: {folder.name} has {len(index.episodes)} episodes, counted from 0"
        )
    cameras = index.check_cameras(policy.transform.num_images)
    episode = index.episodes[arguments.episode]
    if policy.transform.use_proprio and episode.state is None:
        raise ValueError(f"dataset {folder.name!r} has no state, which the policy reads")
    instructed = [step for step in range(episode.num_frames) if episode.instructions[step]]
    steps = np.array(instructed[:: arguments.every or policy.robot.open_loop_steps])
    observations = []
    for step in steps:
        observation = {camera: episode.image(camera, step) for camera in cameras}
        if episode.state is not None:
            observation[policy.robot.state_key] = episode.state[step]
        observations.append(observation)
    instructions = [episode.instructions[step] for step in steps]
    return f"{folder.name}_episode{arguments.episode}", instructions, steps, observations


def run_policy(
    policy: Any,
    observations: Sequence[dict[str, np.ndarray]],
    instructions: Sequence[str],
    steps: np.ndarray,
    console: Console,
) -> PruningTrace:
    """What the policy keeps of each observation."""
    kept, scores = [], []
    for first in progress(range(0, len(observations), BATCH), "asking the policy", console):
        batch = observations[first : first + BATCH]
        seeds = list(range(first, first + len(batch)))
        selection = policy.act_batch(batch, instructions[first : first + BATCH], seeds=seeds).selection
        kept.append(selection.kept().cpu().numpy())
        if selection.scores is not None:
            scores.append(selection.scores.cpu().numpy())
    cameras = policy.robot.cameras[: policy.transform.num_images]
    return PruningTrace(
        title=", then ".join(dict.fromkeys(instructions)),
        cameras=cameras,
        images=tuple(np.stack([observation[camera] for observation in observations]) for camera in cameras),
        kept=np.concatenate(kept),
        steps=steps,
        center_crop=policy.transform.center_crop,
        control_rate_hz=policy.robot.control_rate_hz,
        scores=np.concatenate(scores) if scores else None,
    )


def progress(items: range, description: str, console: Console) -> Iterable[int]:
    """The items, with a bar on terminals only: elsewhere even one that vanishes leaves an empty line."""
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)


def draw(trace: PruningTrace, folder: Path, fps: float | None, console: Console) -> PatchSums:
    """All pictures of one episode; a video at `fps` queries a second unless that is None or there is only one.

    Returns what its maps show, for those of several episodes.
    """
    from prismatic.report.pruning import PatchSums, figure_png, keep_map, kept_chart, score_map

    sums = PatchSums.of(trace)
    folder.mkdir(parents=True, exist_ok=True)
    title = map_title(trace.title, trace.context, 1, trace.num_queries)
    (folder / "overview.png").write_bytes(encode_png(trace.overview()))
    (folder / "keep_map.png").write_bytes(figure_png(keep_map(sums, title)))
    if trace.scores is not None:
        (folder / "score_map.png").write_bytes(figure_png(score_map(sums, title)))
    if trace.num_queries > 1:
        (folder / "tokens_kept.png").write_bytes(figure_png(kept_chart(trace)))
    frames = list(_frames(trace, folder, console))
    if fps is not None and len(frames) > 1:
        write_mp4(folder / "overlay.mp4", [*frames, *[frames[-1]] * round(fps)], fps)
    return sums


def map_title(task: str, source: str, episodes: int, queries: int) -> str:
    """The task, and below it where its policy queries are from and how many."""
    counts = f"{counted(episodes, 'episode')}, {counted(queries, 'policy query')}"
    return f"{task}\n{f'{source}: ' if source else ''}{counts}"


def _frames(trace: PruningTrace, folder: Path, console: Console) -> Iterator[np.ndarray]:
    """Writes and yields the frame of every policy query."""
    (folder / "queries").mkdir(exist_ok=True)
    for query in progress(range(trace.num_queries), f"drawing {escape(folder.name)}", console):
        frame = trace.frame(query)
        step = f"_step{trace.steps[query]:03d}" if trace.unit == "step" else ""
        (folder / "queries" / f"query{query:03d}{step}.png").write_bytes(encode_png(frame, False))
        yield frame


@dataclass
class Common:
    """What the maps and the chart of several episodes need of each; its pictures are not kept.

    Args:
        sums: of all episodes of one task and source, and how many they are, by these two.
        kept: per episode the steps of its policy queries and the tokens kept there.
        units: what those are counted in.
    """

    sums: dict[tuple[str, str], tuple[PatchSums, int]] = field(default_factory=dict)
    kept: dict[str, KeptTokens] = field(default_factory=dict)
    units: set[str] = field(default_factory=set)

    def add(self, name: str, trace: PruningTrace, sums: PatchSums) -> None:
        """Raises ValueError for an episode that cannot share a map or the chart with those before."""
        key = trace.title, trace.source
        for other, (total, count) in self.sums.items():
            joined = total + sums  # of other tasks only to see whether they have as many tokens
            if other == key:
                self.sums[key] = joined, count + 1
        self.sums.setdefault(key, (sums, 1))
        self.units.add(trace.unit_name)
        self.kept[name] = trace.steps, trace.kept.sum(axis=1)

    def draw(self, folder: Path) -> None:
        """A map per task and the chart, where there are several episodes."""
        from prismatic.report.pruning import compare_chart, figure_png, keep_map

        if len(self.kept) < 2:
            return
        names: set[str] = set()
        for (task, source), (sums, count) in self.sums.items():
            stem = f"keep_map_{re.sub(r'[^a-z0-9]+', '_', task.lower()).strip('_')[:120]}"
            name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, len(self.sums) + 2))) if n not in names)
            names.add(name)
            figure = keep_map(sums, map_title(task, source, count, sums.queries))
            (folder / f"{name}.png").write_bytes(figure_png(figure))
        unit = " or ".join(sorted(self.units))
        (folder / "tokens_kept.png").write_bytes(figure_png(compare_chart(self.kept, sums.kept.size, unit)))


def parse(command: Sequence[str] | None = None) -> argparse.Namespace:
    return visualize_parser().parse_args(command)


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    return main(flags, Console())
