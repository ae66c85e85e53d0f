"""The report's sections on single rollouts: failures first, then invalid ones, successes, and all in one table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.robot.libero.reports.evaluation import (
    Evaluation,
    controls_note,
    last_line,
    outcome_text,
    task_text,
)
from experiments.robot.libero.results.results import EpisodeRecord
from prismatic.report.data import Block, Cell, Clip, Picture, Row, Section, Table, counted
from prismatic.report.media import MediaFiles, find_media, relative_address

VIDEO = "video/mp4"

MOST_CLIPS = 24
"""Clips in a report, of failures and of successes together; what is left over stands in the tables with a link."""
_SUCCESSES = 6  # of them, where there are as many; failures say more
MOST_ROWS = 1000
"""Rollouts in a table: with more a page gets slow, and nobody reads them."""
_ROWS_SHOWN = 30  # Longer tables of rollouts are folded.

Rollout = tuple[Evaluation, EpisodeRecord]


def rollout_sections(evaluations: Sequence[Evaluation], files: MediaFiles) -> list[Section]:
    """Failures, invalid rollouts, successes, all rollouts.

    Args:
        files: Takes up the clips, those of failures first.
    """
    rollouts = [(evaluation, episode) for evaluation in evaluations for episode in evaluation.results.episodes]
    several = len(evaluations) > 1
    failed = [rollout for rollout in rollouts if rollout[1].success is False]
    solved = [rollout for rollout in rollouts if rollout[1].success]
    successes = chosen_clips(solved, _SUCCESSES)
    clips = _clips([*chosen_clips(failed, MOST_CLIPS - len(successes)), *successes], files, several)
    sections = [
        _failures(failed, clips, files, several),
        invalid_section(rollouts),
        _successes(solved, clips),
        _all_rollouts(rollouts, files, several),
    ]
    controls = controls_note(evaluations)
    return [replace(s, note=f"{s.note} {controls}".strip()) if s.blocks and controls else s for s in sections]


def chosen_clips(rollouts: Sequence[Rollout], most: int) -> list[Rollout]:
    """Filmed rollouts, as evenly as can be over evaluations, then over their tasks; the first ones of each task."""
    if most < 1:
        return []
    turns: Counter[object] = Counter()
    ranked = []
    for evaluation, episode in rollouts:
        if episode.video and find_media(evaluation.folder, episode.video, VIDEO) is not None:
            task = (id(evaluation), episode.suite, episode.task_index)
            turns[task] += 1
            ranked.append((turns[task], evaluation, episode))
    ranked.sort(key=lambda entry: entry[0])  # every task once, then every task again
    turns.clear()
    spread = []
    for _, evaluation, episode in ranked:
        turns[id(evaluation)] += 1
        spread.append((turns[id(evaluation)], evaluation, episode))
    spread.sort(key=lambda entry: entry[0])
    return [(evaluation, episode) for _, evaluation, episode in spread[:most]]


def _clips(chosen: Sequence[Rollout], files: MediaFiles, several: bool) -> dict[int, Clip]:
    """Clip of each chosen rollout by the `id` of its record; files go into the page in the order in which they come."""
    found = {id(rollout[1]): _clip(*rollout, files, several) for rollout in chosen}
    return {key: clip for key, clip in found.items() if clip is not None}


def _failures(failed: Sequence[Rollout], clips: Mapping[int, Clip], files: MediaFiles, several: bool) -> Section:
    """All of them: as clips, and those without one in a table."""
    blocks: list[Block] = [clips[id(episode)] for _, episode in failed if id(episode) in clips]
    without = [rollout for rollout in failed if id(rollout[1]) not in clips]
    if without:
        columns = ("task", *(["evaluation"] if several else []), "initial state", "trial", "outcome", "steps", "clip")
        rows: list[Row] = [
            (*_place(*rollout, several), outcome_text(rollout[1]), str(rollout[1].steps), _clip_cell(*rollout, files))
            for rollout in without[:MOST_ROWS]
        ]
        title = "Failures without a clip here"
        note = _cut(len(without), "failure")
        blocks.append(Table(title, columns, rows, note, numeric=False, folded=len(rows) > _ROWS_SHOWN, wide=True))
    return Section("Failures", blocks, _clip_text(failed, len(blocks) - bool(without)), columns=2)


def _clip_cell(evaluation: Evaluation, episode: EpisodeRecord, files: MediaFiles) -> str | Cell:
    if not episode.video:
        return "not filmed"
    path = find_media(evaluation.folder, episode.video, VIDEO)
    return "file is missing" if path is None else Cell("file", address=relative_address(path, files.folder))


def _cut(count: int, noun: str) -> str:
    """What a table says that does not show everything."""
    return f"The first {MOST_ROWS} of {counted(count, noun)}; all are in results.json." if count > MOST_ROWS else ""


def _successes(solved: Sequence[Rollout], clips: Mapping[int, Clip]) -> Section:
    """Some of those that were filmed."""
    shown = [clips[id(episode)] for _, episode in solved if id(episode) in clips]
    text = _clip_text(solved, len(shown)) if any(episode.video for _, episode in solved) else ""
    return Section("Successes", shown, text, columns=2)


def _clip_text(rollouts: Sequence[Rollout], shown: int) -> str:
    """How many of the rollouts have a clip, and what is to be seen in one; empty without rollouts."""
    if not rollouts:
        return ""
    lost = sum(
        episode.video is not None and find_media(evaluation.folder, episode.video, VIDEO) is None
        for evaluation, episode in rollouts
    )
    text = f"{shown} of {len(rollouts)} with a clip." if shown < len(rollouts) else f"{len(rollouts)} in all."
    if lost:
        text += f" The video files of {lost} are not where the results say, or are no videos of this evaluation."
    if shown:
        text += (
            " In a clip: the cameras as they are, below them what the policy saw at its last query, with what the "
            "pruner dropped darkened. Below the clip: the same at a few queries from first to last, a row per camera."
        )
    return text


def _clip(evaluation: Evaluation, episode: EpisodeRecord, files: MediaFiles, several: bool) -> Clip | None:
    name = episode.video
    video = files.add(evaluation.folder, name, VIDEO) if name else None
    if not name or video is None:
        return None
    title = f"{f'{evaluation.name}: ' if several else ''}{describe(episode)}"
    description = f"What was kept at a few policy queries: {title}"
    image = files.add(evaluation.folder, str(Path(name).with_suffix(".png")), "image/png")
    picture = None if image is None else Picture("kept tokens", image, description=description)
    return Clip(title, video, details(evaluation, episode), picture)


def describe(episode: EpisodeRecord) -> str:
    """What tells a rollout of an evaluation from the others, and its outcome."""
    start = f"initial state {episode.initial_state}, trial {episode.trial}"
    return f"{task_text(episode)}, {start}: {outcome_text(episode)}"


def details(evaluation: Evaluation, episode: EpisodeRecord) -> str:
    """The rest on one rollout in a line."""
    time = f" ({episode.steps * evaluation.seconds_per_step:.1f} s)"
    instruction = f"instruction “{episode.instruction}”, " if episode.other_task is not None else ""
    text = f"{instruction}ended after {counted(episode.steps, 'step')}{time}"
    if episode.tokens_kept:
        text += f"; {np.mean(episode.tokens_kept):.1f} of {episode.num_visual_tokens} tokens kept"
    if episode.jerk is not None:
        text += f"; jerk {episode.jerk:.1f} m/s³"
    if episode.progress is not None and not episode.success:
        text += f"; at best {100 * episode.progress:.0f} % of the goal at once"
    if episode.attempts > 1:
        text += f"; begun {episode.attempts} times"
    return f"{text[0].upper()}{text[1:]}."


def invalid_section(rollouts: Sequence[Rollout]) -> Section:
    """Rollouts that say nothing about the policy, and those that were begun more than once."""
    invalid = [rollout for rollout in rollouts if rollout[1].invalid is not None]
    repeated = [rollout for rollout in rollouts if rollout[1].attempts > 1 and rollout[1].invalid is None]
    blocks: list[Block] = []
    place = ("task", "evaluation", "initial state", "trial", "attempts")
    if invalid:
        rows = [
            (*_place(*rollout), str(rollout[1].attempts), last_line(rollout[1].invalid or "")) for rollout in invalid
        ]
        note = "Neither successes nor failures: they are in no rate. The whole tracebacks are in results.json."
        note = f"{_cut(len(rows), 'invalid rollout')} {note}".strip()
        blocks.append(Table("Invalid rollouts", (*place, "error"), rows[:MOST_ROWS], note, numeric=False))
    if repeated:
        rows = [(*_place(*rollout), str(rollout[1].attempts), outcome_text(rollout[1])) for rollout in repeated]
        note = "After a crash, a hang or an error the rollout was begun anew; its last attempt counts."
        note = f"{_cut(len(rows), 'rollout')} {note}".strip()
        blocks.append(Table("Begun more than once", (*place, "outcome"), rows[:MOST_ROWS], note, numeric=False))
    return Section("Errors", blocks)


def _place(evaluation: Evaluation, episode: EpisodeRecord, several: bool = True) -> tuple[str, ...]:
    """Task, evaluation (where there are `several`), initial state and trial."""
    name = (evaluation.name,) if several else ()
    return (task_text(episode), *name, str(episode.initial_state), str(episode.trial))


def _all_rollouts(rollouts: Sequence[Rollout], files: MediaFiles, several: bool) -> Section:
    columns = ("task", *(["evaluation"] if several else []), "initial state", "trial", "outcome", "steps",
               "tokens kept", "seconds", "attempts", "video")  # fmt: skip
    rows: list[Row] = []
    order = {False: 0, None: 1, True: 2}
    ranked = sorted(rollouts, key=lambda rollout: order[rollout[1].success]) if len(rollouts) > MOST_ROWS else rollouts
    for evaluation, episode in ranked[:MOST_ROWS]:
        path = find_media(evaluation.folder, episode.video, VIDEO) if episode.video else None
        rows.append(
            (
                *_place(evaluation, episode, several),
                Cell(outcome_text(episode), mark=episode.success),
                str(episode.steps),
                f"{np.mean(episode.tokens_kept):.1f}" if episode.tokens_kept else "–",
                f"{episode.wall_seconds:.1f}",
                str(episode.attempts),
                Cell("file", address=relative_address(path, files.folder)) if path else Cell("–"),
            )
        )
    note = "Seconds are those of the whole rollout on the evaluating machine, its videos included."
    if len(rollouts) > MOST_ROWS:
        note = f"The first {MOST_ROWS} of {len(rollouts)}, failures before successes; all are in results.json. {note}"
    table = Table("", columns, rows, note, sortable=True, folded=len(rows) > _ROWS_SHOWN)
    return Section("All rollouts", [table] if rows else [])
