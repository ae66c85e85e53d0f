"""Turn recorded episodes, or plain folders of frames, into an RLDS dataset that `lightvla finetune` reads.

    lightvla records-to-rlds records --dataset_name kitchen --output_dir DATA

All sources are read and checked before anything is written. Ends with 0, or 2 when something cannot be used.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from lightvla.recordings.sources import Content, Source, find_sources
from prismatic.command_status import STOPPED, UNUSABLE, print_error
from prismatic.report.data import counted
from prismatic.vla.datasets.catalog import DatasetSpec, is_known
from prismatic.vla.datasets.dataset import split_episodes
from prismatic.vla.datasets.entries.spec_file import SpecFile, find_dataset_spec, read_spec_file
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.datasets.writer import NewEpisode, RldsWriter, check_name
from prismatic.vla.gripper import GRIPPERS, Gripper, suggestion, unsaid_gripper


@dataclass(frozen=True, eq=False)
class Plan:
    """What is going to be written.

    Attributes:
        spec: the dataset, its gripper's convention included.
        sources: the episodes, each with its content.
        actions: what is stored of each, (T, action_dim).
        sizes: camera -> (height, width).
        held_out: numbers of the episodes that become the split `val`.
        left_out: how many episodes did not reach their goal and are left out.
    """

    spec: DatasetSpec
    sources: list[tuple[Source, Content]]
    actions: list[NDArray[np.float64]]
    sizes: dict[str, tuple[int, int]]
    held_out: set[int]
    left_out: int


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Check, write, read back, say what there is; returns the exit status."""
    try:
        plan = make_plan(arguments, console)
        write(plan, arguments, console)
        console.print(*summary(plan, arguments), sep="\n", markup=False, highlight=False, soft_wrap=True)
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return UNUSABLE
    except KeyboardInterrupt:
        console.print("interrupted; a dataset appears only when it is whole")
        return STOPPED
    return 0


def make_plan(arguments: argparse.Namespace, console: Console) -> Plan:
    """Read and check everything. Raises ValueError or FileNotFoundError, a sentence each."""
    spec = dataset_spec(arguments)
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        raise ValueError(f"--output_dir {arguments.output_dir} is a file; expected the folder that datasets go below")
    if (folder := arguments.output_dir / spec.name).exists() and not arguments.replace:
        raise ValueError(f"{folder} is there already; give --replace, or another --dataset_name")
    found = find_sources(arguments.sources)
    shown = track(found, "reading", console=console, transient=True, disable=not console.is_terminal)
    sources = [(source, source.content(spec)) for source in shown]
    left_out = 0
    if arguments.only_success:
        unknown = [source.path for source, content in sources if content.success is None]
        if unknown:
            raise ValueError(
                f"--only_success: {len(unknown)} of {len(sources)} episodes do not say whether they reached their "
                f"goal, {unknown[0]} first; leave the flag out, or say it where they are recorded"
            )
        reached = [pair for pair in sources if pair[1].success]
        sources, left_out = reached, len(sources) - len(reached)
        if not sources:
            raise ValueError(f"--only_success: none of {counted(left_out, 'episode')} reached its goal")
    longest = max(len(content.action) for _, content in sources)
    if longest < spec.robot.chunk_length:
        raise ValueError(
            f"no episode is as long as one chunk of {spec.robot.chunk_length} actions, so nothing can be learnt: the "
            f"longest has {counted(longest, 'step')}"
        )
    held_out: set[int] = set()
    if arguments.val_fraction:
        held_out = set(split_episodes(len(sources), arguments.val_fraction)[1])
    actions = stored_actions(sources, spec, arguments.gripper)
    return Plan(spec, sources, actions, common_sizes(sources, spec, arguments.rotate), held_out, left_out)


def dataset_spec(arguments: argparse.Namespace) -> DatasetSpec:
    """How the dataset will be read: LIBERO's names imply the simulator's gripper, others get the policy's own."""
    check_name(arguments.dataset_name)
    if not 0 <= arguments.val_fraction < 1:
        raise ValueError(f"--val_fraction {arguments.val_fraction}: expected 0 to less than 1")
    file = read_spec_file(arguments.dataset_spec)
    spec = find_dataset_spec(arguments.dataset_name, arguments.robot, file=file)
    if file is not None:
        _check_written(file, spec)
    if spec.has_gripper and spec.map_actions is unsaid_gripper:
        spec = replace(spec, map_actions=GRIPPERS["open1"])
    return spec


def _check_written(file: SpecFile, spec: DatasetSpec) -> None:
    """Raises ValueError for a file that says how a dataset is read which RLDS cannot be written for."""
    keys = filter(None, (*spec.image_keys.values(), spec.state_key, spec.action_key, spec.language_key))
    if other := [key for key in keys if not key.startswith("steps/")]:
        raise ValueError(f"--dataset_spec {file.path}: RLDS names features steps/..., not {', '.join(other)}")
    if spec.turns:
        raise ValueError(
            f"--dataset_spec {file.path} turns pictures where they are read; leave that out, and turn what is written "
            "with --rotate"
        )


def stored_actions(
    sources: Sequence[tuple[Source, Content]], spec: DatasetSpec, gripper: str | None
) -> list[NDArray[np.float64]]:
    """What is stored of each episode's actions.

    Records hold the policy's gripper, 1 open and 0 closed, which a policy may overshoot; what folders of frames hold is
    said by `--gripper`. Both are stored as the policy's; as `--dataset_spec` says; or, under a name that implies
    LIBERO's, as the simulator executes them: -1 open, +1 closed.

    Raises ValueError where nothing says it, or the values cannot be of the convention that was said.
    """
    actions = [content.action.copy() for _, content in sources]
    if not spec.has_gripper:
        if gripper is not None:
            raise ValueError(f"--gripper {gripper}: robot {spec.robot.name!r} has no gripper of its own; leave it out")
        return actions
    own = [number for number, (_, content) in enumerate(sources) if not content.policy_gripper]
    if own:
        stored = np.concatenate([actions[number][:, -1] for number in own])
        if gripper is None:
            raise ValueError(
                f"nothing says how actions.npy stores the gripper; its last value runs from {stored.min():g} to "
                f"{stored.max():g}. {suggestion(stored)}"
            )
        given = Gripper.parse(gripper)
        given.check(stored)
        for number in own:
            actions[number] = given(actions[number]).astype(np.float64)
    elif gripper is not None:
        raise ValueError(f"--gripper {gripper} is about folders of frames, and there are only records; leave it out")
    for values in actions:
        values[:, -1] = values[:, -1].clip(0, 1)
    convention = spec.map_actions
    assert isinstance(convention, Gripper)
    for values in actions:
        if convention == GRIPPERS["libero"]:
            values[:, -1] = np.where(values[:, -1] > 0.5, -1.0, 1.0)
        else:
            values[:, -1] = convention.closed + values[:, -1] * (convention.open - convention.closed)
    try:
        convention.check(np.concatenate(actions)[:, -1])
    except ValueError as error:
        raise ValueError(
            f"the recorded gripper is not what a policy of robot {spec.robot.name!r} commands, 0 closed to 1 open: "
            f"{error}"
        ) from error
    return actions


def common_sizes(
    sources: Sequence[tuple[Source, Content]], spec: DatasetSpec, rotate: int
) -> dict[str, tuple[int, int]]:
    """Camera -> (height, width) as it is stored. Raises ValueError where episodes differ."""
    path, sizes = sources[0][0].path, sources[0][1].sizes
    for source, content in sources[1:]:
        if content.sizes != sizes:
            raise ValueError(
                f"{source.path} has pictures {dict(content.sizes)}, {path} has {dict(sizes)} (height, width); one "
                "dataset needs equal cameras and sizes: convert them apart, or resize"
            )
    turned = {camera: size[::-1] if rotate % 180 else size for camera, size in sizes.items()}
    return {camera: turned[camera] for camera in spec.robot.cameras if camera in turned and camera in spec.image_keys}


def write(plan: Plan, arguments: argparse.Namespace, console: Console) -> None:
    """Write the dataset; it appears when it is whole."""
    description = f"{counted(len(plan.sources), 'recorded episode')} of robot {plan.spec.robot.name}"
    with RldsWriter(arguments.output_dir, plan.spec, plan.sizes, description) as writer:
        numbers = range(len(plan.sources))
        for number in track(numbers, "writing", console=console, transient=True, disable=not console.is_terminal):
            source, content = plan.sources[number]
            episode = NewEpisode(
                pictures=source.pictures(list(plan.sizes), arguments.rotate),
                state=content.state,
                action=plan.actions[number],
                instruction=content.instruction,
                source=source.path.name,
                success=content.success is not False,
            )
            writer.add(episode, "val" if number in plan.held_out else "train")


def summary(plan: Plan, arguments: argparse.Namespace) -> list[str]:
    """What the reader that trains finds there, and the command that trains."""
    spec, chunk = plan.spec, plan.spec.robot.chunk_length
    index = RldsIndex.open(arguments.output_dir, spec.name, spec)
    index.check_cameras(len(plan.sizes))
    statistics = dataset_statistics(index)
    episodes, frames = len(index.episodes), sum(episode.num_frames for episode in index.episodes)
    samples = sum(len(episode.chunk_starts(chunk)) for episode in index.episodes)
    lines = [
        f"dataset: {index.directory}",
        f"{counted(episodes, 'episode')}, {counted(frames, 'frame')}, of which {samples} begin a chunk of {chunk} "
        f"actions; {counted(len({e.instruction for e in index.episodes}), 'instruction')}",
        f"cameras: {', '.join(f'{camera} {width} x {height}' for camera, (height, width) in plan.sizes.items())}",
    ]
    if plan.held_out:
        lines.append(f"split val: {counted(len(plan.held_out), 'episode')}, for --use_val_set True")
    if plan.left_out:
        lines.append(f"left out: {counted(plan.left_out, 'episode')} that did not reach the goal")
    for part, name in (("action", "actions"), ("proprio", "states")):
        low, high = (np.array(statistics[part][key]) for key in ("min", "max"))
        still = np.flatnonzero(low == high).tolist()
        lines.append(f"{name}: {_numbers(low)} to {_numbers(high)}")
        if still:
            lines.append(f"note: {name} never change in dimensions {still}, which the policy then cannot learn")
    short = sum(episode.num_frames < chunk for episode in index.episodes)
    if short:
        lines.append(f"note: {counted(short, 'episode')} shorter than {chunk} steps give no sample")
    said = "" if is_known(spec.name) else f" --robot {spec.robot.name}"
    if arguments.dataset_spec is not None:
        said = f" --dataset_spec {arguments.dataset_spec}"
    if spec.has_gripper and spec.map_actions == GRIPPERS["open1"] and not _says_gripper(arguments):
        said += " --gripper open1"
    cameras = f"--num_images_in_input {len(plan.sizes)}"
    lines.append(
        f"next: lightvla finetune --data_root_dir {arguments.output_dir} --dataset_name {spec.name}{said} {cameras}"
    )
    return lines


def _says_gripper(arguments: argparse.Namespace) -> bool:
    """Whether the dataset's name or the file says it."""
    file = read_spec_file(arguments.dataset_spec)
    return is_known(arguments.dataset_name) if file is None else file.spec.map_actions is not unsaid_gripper


def _numbers(values: NDArray[np.float64]) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in values)}]"


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    return main(flags, Console())
