"""The report's sections on single rollouts: failures first, then invalid ones, successes, and all in one table."""

from __future__ import annotations

from collections.abc import Sequence
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
    sections = [
        _failures(failed, files, several),
        invalid_section(rollouts),
        _successes(solved, files, several),
        _all_rollouts(rollouts, files, several),
    ]
    controls = controls_note(evaluations)
    return [replace(s, note=f"{s.note} {controls}".strip()) if s.blocks and controls else s for s in sections]


def _failures(failed: Sequence[Rollout], files: MediaFiles, several: bool) -> Section:
    """All of them: as clips, and those without one in a table."""
    clips = [_clip(*rollout, files, several) for rollout in failed]
    blocks: list[Block] = [clip for clip in clips if clip is not None]
    without = [rollout for rollout, clip in zip(failed, clips, strict=True) if clip is None]
    if without:
        columns = ("task", *(["evaluation"] if several else []), "initial state", "trial", "outcome", "steps", "clip")
        rows = [
            (
                *_place(*rollout, several),
                outcome_text(rollout[1]),
                str(rollout[1].steps),
                "file is missing" if rollout[1].video else "not filmed",
            )
            for rollout in without
        ]
        title = "Failures without a clip"
        blocks.append(Table(title, columns, rows, numeric=False, folded=len(rows) > _ROWS_SHOWN, wide=True))
    return Section("Failures", blocks, _clip_text(failed, clips), columns=2)


def _successes(solved: Sequence[Rollout], files: MediaFiles, several: bool) -> Section:
    """Those that were filmed."""
    clips = [_clip(*rollout, files, several) for rollout in solved]
    text = _clip_text(solved, clips) if any(episode.video for _, episode in solved) else ""
    return Section("Successes", [clip for clip in clips if clip is not None], text, columns=2)


def _clip_text(rollouts: Sequence[Rollout], clips: Sequence[Clip | None]) -> str:
    """How many of the rollouts have a clip, and what is to be seen in one; empty without rollouts."""
    if not rollouts:
        return ""
    shown = sum(clip is not None for clip in clips)
    lost = sum(bool(episode.video) for _, episode in rollouts) - shown
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
    seconds = evaluation.seconds_per_step
    time = f" ({episode.steps * seconds:.1f} s)" if seconds else ""
    instruction = f"instruction “{episode.instruction}”, " if episode.other_task is not None else ""
    text = f"{instruction}ended after {counted(episode.steps, 'step')}{time}"
    if episode.tokens_kept:
        text += f"; {np.mean(episode.tokens_kept):.1f} of {episode.num_visual_tokens} tokens kept"
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
        blocks.append(Table("Invalid rollouts", (*place, "error"), rows, note, numeric=False))
    if repeated:
        rows = [(*_place(*rollout), str(rollout[1].attempts), outcome_text(rollout[1])) for rollout in repeated]
        note = "After a crash, a hang or an error the rollout was begun anew; its last attempt counts."
        blocks.append(Table("Begun more than once", (*place, "outcome"), rows, note, numeric=False))
    return Section("Errors", blocks)


def _place(evaluation: Evaluation, episode: EpisodeRecord, several: bool = True) -> tuple[str, ...]:
    """Task, evaluation (where there are `several`), initial state and trial."""
    name = (evaluation.name,) if several else ()
    return (task_text(episode), *name, str(episode.initial_state), str(episode.trial))


def _all_rollouts(rollouts: Sequence[Rollout], files: MediaFiles, several: bool) -> Section:
    columns = ("task", *(["evaluation"] if several else []), "initial state", "trial", "outcome", "steps",
               "tokens kept", "seconds", "attempts", "video")  # fmt: skip
    rows: list[Row] = []
    for evaluation, episode in rollouts:
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
    table = Table("", columns, rows, note, sortable=True, folded=len(rows) > _ROWS_SHOWN)
    return Section("All rollouts", [table] if rows else [])
