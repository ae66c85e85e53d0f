"""The report of an inspected dataset: the page, and the same as Markdown with its pictures beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightvla.datasets.plots import ActionPlot, Lengths, camera_strip
from lightvla.datasets.problems import Problem, gripper_looks_like, no_ops
from lightvla.datasets.reading import Place, StoredDataset
from prismatic.atomic_files import write_atomically
from prismatic.report.data import Cell, Headline, Media, Notes, Picture, ReportData, Section, Table, counted
from prismatic.report.figures import spread
from prismatic.report.html import write_report
from prismatic.report.markdown import write_markdown
from prismatic.vla.normalization import fit_statistics

_SHOWN = 4
"""Episodes that are drawn, evenly spread; so many more where problems are."""
_INSTRUCTIONS = 500
"""Rows of the list of instructions."""


def write_reports(data: StoredDataset, problems: Sequence[Problem], folder: Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into a folder, with `pictures/` beside them; returns their paths."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    report = make_report(data, problems, folder)
    return write_report(report, folder / "report.html"), write_markdown(report, folder / "report.md")


def make_report(data: StoredDataset, problems: Sequence[Problem], folder: Path) -> ReportData:
    """All that is told; writes the pictures."""
    index = data.index
    chunk, texts = index.spec.robot.chunk_length, _sentences(data)
    samples = sum(len(episode.chunk_starts(chunk)) for episode in data.episodes)
    shown = _shown(data, problems)
    return ReportData(
        title=f"{index.name}: a dataset",
        summary=[
            "What the dataset holds as training reads it, and what is wrong with it."
            if problems
            else "What the dataset holds as training reads it. Nothing wrong was found."
        ],
        alerts=[f"{counted(len(problems), 'problem')}: {', '.join(item.name for item in problems)}"][: len(problems)],
        headlines=[
            Headline(str(len(problems)), "problem" if len(problems) == 1 else "problems"),
            Headline(str(len(data.lengths)), "episodes"),
            Headline(str(int(data.lengths.sum())), "frames"),
            Headline(str(samples), f"samples: chunks of {chunk} actions with an instruction"),
            Headline(str(len(texts)), "instructions"),
        ],
        sections=[
            Section("Problems", [_told(problem) for problem in problems], columns=2),
            Section("What it is", [_facts(data)]),
            Section("Episodes", [Lengths("Frames of the episodes", data.lengths, chunk)] if len(data.lengths) else []),
            Section("Instructions", [_instructions(data, texts)]),
            Section("Values", _statistics(data), "Over the frames of all splits; the gripper is the policy's, 1 open."),
            Section("What the cameras saw", _strips(data, shown, folder), columns=2),
            Section(
                "What was done", _plots(data, [*dict.fromkeys(number for number, _, _ in shown)][: 2 * _SHOWN]),
                "The action of each frame. Pale lines are the 1 % and 99 % quantiles of the dataset.", columns=2,
            ),
        ],
        footer=f"{index.directory} · {index.fingerprint}",
    )  # fmt: skip


def _told(problem: Problem) -> Notes:
    title = problem.name[0].upper() + problem.name[1:]
    return Notes([f"{problem.found}.", f"What it means: {problem.meaning}", f"Remedy: {problem.remedy}"], title)


def _facts(data: StoredDataset) -> Table:
    index, robot = data.index, data.index.spec.robot
    splits = Counter(episode.split for episode in data.episodes)
    size = sum(path.stat().st_size for path in index.files) / 1e6
    views = [
        f"{camera} ({', '.join(f'{width} x {height}' for height, width in view.sizes)})"
        for camera, view in data.cameras.items()
    ]
    finite = data.actions[np.isfinite(data.actions[:, -1]), -1]
    rows = [
        ("robot", f"{robot.name}: {robot.action_dim} action dimensions, state of {robot.proprio_dim}, chunks of "
                  f"{robot.chunk_length}, {robot.control_rate_hz:g} Hz"),
        ("cameras", ", ".join(views) or "none"),
        ("state", f"{index.spec.state_key}" if data.states is not None else "none"),
        ("gripper", _gripper(data, finite)),
        ("splits", ", ".join(f"{name}: {counted(count, 'episode')}" for name, count in splits.items())),
        *([("frames per second", f"{index.fps:g}")] if index.fps is not None else []),
        *[(f"names of {what}", ", ".join(names)) for what, names in index.labels.items()],
        *([("pictures turned", ", ".join(f"{c} {turn}" for c, turn in index.spec.turns.items()))]
          if index.spec.turns else []),
        ("files", f"{len(index.files)}, {size:.1f} MB"),
        ("no-ops", f"{no_ops(data).mean():.1%} of the frames"),
        ("pictures like the one before", ", ".join(
            f"{camera} {view.repeated.mean():.1%}" for camera, view in data.cameras.items()) or "–"),
        ("features stored", ", ".join(index.feature_names)),
    ]  # fmt: skip
    return Table("", ("dataset", index.name), rows, numeric=False)


def _gripper(data: StoredDataset, stored: NDArray[np.float64]) -> str:
    if not data.index.spec.has_gripper:
        return "scaled like joints, taken as it is stored"
    if not len(stored):
        return "–"
    mapped = data.policy_actions()
    said = getattr(data.index.spec.map_actions, "name", "as the entry's function has it")
    told = "nothing says it" if mapped is None else f"read as {said}"
    share = "" if mapped is None else f"; open in {100 * np.nanmean(mapped[:, -1] > 0.5):.0f} % of the frames"
    return f"{gripper_looks_like(stored)}; {told}{share}"


def _sentences(data: StoredDataset) -> list[tuple[str, int, int]]:
    """(sentence, episodes, frames), the most frequent first; not the empty one."""
    episodes = Counter(text for episode in data.episodes for text in {*episode.instructions})
    frames = Counter(text for episode in data.episodes for text in episode.instructions)
    return [(text, episodes[text], count) for text, count in frames.most_common() if text]


def _instructions(data: StoredDataset, texts: list[tuple[str, int, int]]) -> Table:
    rows = [
        (text, Cell(str(episodes), sort=episodes), Cell(str(frames), sort=frames))
        for text, episodes, frames in texts[:_INSTRUCTIONS]
    ]
    left = len(texts) - _INSTRUCTIONS
    return Table(
        "", ("instruction", "episodes", "frames"), rows, sortable=len(rows) > 1, folded=len(rows) > 30,
        note=f"{left} more are not shown." if left > 0 else "",
    )  # fmt: skip


def _statistics(data: StoredDataset) -> list[Table]:
    spec = data.index.spec
    mapped = data.policy_actions()
    actions = data.actions if mapped is None else mapped
    rows = np.isfinite(actions).all(1)
    if data.states is not None:
        rows &= np.isfinite(data.states).all(1)
    if not rows.any():
        return []
    states = None if data.states is None else data.states[rows]
    found = fit_statistics(actions[rows], states, spec.robot.action_mask, len(data.lengths))
    names = {
        "action": data.index.spec.robot.action_names,
        "proprio": tuple(f"state {n}" for n in range(spec.robot.proprio_dim)),
    }
    keys = ("min", "q01", "mean", "q99", "max", "std")
    titles = {"action": "Actions", "proprio": "State"}
    return [
        Table(
            titles[part], ("", "least", "1 %", "mean", "99 %", "most", "deviation"),
            [
                (name, *(f"{found[part][key][number]:.4g}" for key in keys))
                for number, name in enumerate(names[part])
            ],
        )
        for part in titles
        if part in found
    ]  # fmt: skip


def _shown(data: StoredDataset, problems: Sequence[Problem]) -> list[tuple[int, int | None, str]]:
    """Episodes to draw: number, step, the problem that is to be seen there ("" for those evenly spread)."""
    found: dict[Place, str] = {}
    for problem in problems:
        for place in problem.places[:1]:
            found.setdefault(place, problem.name)
    wrong = [(number, step, why) for (number, step), why in found.items()][: 2 * _SHOWN]
    return [*wrong, *((number, None, "") for number in spread(len(data.episodes), _SHOWN))]


def _strips(data: StoredDataset, shown: list[tuple[int, int | None, str]], folder: Path) -> list[Picture]:
    cameras = list(data.cameras)
    strips = []
    for number, step, why in shown:
        episode = data.episodes[number]
        if not cameras or not episode.num_frames:
            continue
        content = camera_strip(episode, cameras, step)
        name = f"pictures/episode_{number:04d}{'' if step is None else f'_step_{step:04d}'}.jpg"
        write_atomically(folder / name, content)
        strips.append(
            Picture(
                f"Episode {number}" + (f", step {step}: {why}" if why else ""),
                Media("image/jpeg", content, name),
                f"{episode.instruction or 'no instruction'} · {counted(episode.num_frames, 'frame')}, {episode.split}",
                f"{', '.join(cameras)}, from the first frame of episode {number} to the last",
            )
        )
    return strips


def _plots(data: StoredDataset, numbers: list[int]) -> list[ActionPlot]:
    mapped = data.policy_actions()
    actions = data.actions if mapped is None else mapped
    finite = actions[np.isfinite(actions).all(1)]
    if not len(finite):
        return []
    low, high = np.quantile(finite, [0.01, 0.99], axis=0)
    return [
        ActionPlot(
            f"Episode {number}: {data.episodes[number].instruction or 'no instruction'}",
            actions[data.firsts[number] : data.firsts[number] + data.lengths[number]],
            data.index.spec.robot.action_names, low, high,
        )
        for number in numbers
    ]  # fmt: skip
