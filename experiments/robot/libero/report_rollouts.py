"""The report's sections on single rollouts: failures first, then invalid ones, successes, and all in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from experiments.robot.libero.report_evaluation import Evaluation, last_line, outcome_words, task_words
from experiments.robot.libero.results import EpisodeRecord
from prismatic.report.data import Block, Cell, Clip, Picture, Row, Section, Table
from prismatic.report.media import MediaFiles, relative_address

_ROWS_SHOWN = 30  # Longer tables of rollouts are folded.

Rollout = tuple[Evaluation, EpisodeRecord]


def rollout_sections(evaluations: Sequence[Evaluation], files: MediaFiles) -> list[Section]:
    """Failures, invalid rollouts, successes, all rollouts.

    Args:
        files: Takes up the clips, those of failures first.
    """
    rollouts = [(evaluation, episode) for evaluation in evaluations for episode in evaluation.results.episodes]
    several = len(evaluations) > 1
    failures = _clip_section("Failures", rollouts, lambda episode: episode.success is False, (files, several))
    successes = _clip_section("Successes", rollouts, lambda episode: bool(episode.success), (files, several))
    return [failures, invalid_section(rollouts), successes, _all_rollouts(rollouts, files, several)]


def _clip_section(
    title: str, rollouts: Sequence[Rollout], chosen: Callable[[EpisodeRecord], bool], page: tuple[MediaFiles, bool]
) -> Section:
    files, several = page
    found = [rollout for rollout in rollouts if chosen(rollout[1])]
    filmed = [rollout for rollout in found if rollout[1].video]
    clips = [clip for rollout in filmed if (clip := _clip(*rollout, files, several)) is not None]
    words = f"{len(clips)} of {len(found)} with a clip." if len(clips) < len(found) else f"{len(found)} in all."
    if len(clips) < len(filmed):
        words += f" The video files of {len(filmed) - len(clips)} are not where the results say."
    if clips:
        words += (
            " In a clip: the cameras as they are, then what the policy saw at its last look, with what the pruner "
            "dropped darkened. Below it: the same at a few looks from first to last, a row per camera."
        )
    return Section(title, clips, words, columns=2)


def _clip(evaluation: Evaluation, episode: EpisodeRecord, files: MediaFiles, several: bool) -> Clip | None:
    path = evaluation.folder / str(episode.video)
    video = files.add(path, "video/mp4")
    if video is None:
        return None
    title = task_words(episode)
    description = f"What was kept at a few looks of: {title}, initial state {episode.initial_state}"
    image = files.add(path.with_suffix(".png"), "image/png")
    picture = None if image is None else Picture("kept tokens", image, description=description)
    caption = describe(evaluation, episode)
    return Clip(title, video, f"{evaluation.label}: {caption}" if several else caption, picture)


def describe(evaluation: Evaluation, episode: EpisodeRecord) -> str:
    """One rollout in a line."""
    seconds = evaluation.seconds_per_step
    time = f" ({episode.steps * seconds:.1f} s)" if seconds else ""
    told = f"told “{episode.instruction}”, " if episode.other_task is not None else ""
    words = f"initial state {episode.initial_state}, trial {episode.trial}: {told}{outcome_words(episode)}"
    words += f" after {episode.steps} steps{time}"
    if episode.tokens_kept:
        words += f"; {np.mean(episode.tokens_kept):.1f} of {episode.num_visual_tokens} tokens kept"
    if episode.attempts > 1:
        words += f"; begun {episode.attempts} times"
    return f"{words}."


def invalid_section(rollouts: Sequence[Rollout]) -> Section:
    """Rollouts that say nothing about the policy, and those that were begun more than once."""
    invalid = [rollout for rollout in rollouts if rollout[1].invalid is not None]
    repeated = [rollout for rollout in rollouts if rollout[1].attempts > 1 and rollout[1].invalid is None]
    blocks: list[Block] = []
    place = ("task", "evaluation", "initial state", "trial", "attempts")
    if invalid:
        rows = [(*_place(*rollout), last_line(rollout[1].invalid or "")) for rollout in invalid]
        note = "Neither successes nor failures: they are in no rate. The whole tracebacks are in results.json."
        blocks.append(Table("Invalid rollouts", (*place, "error"), rows, note, numeric=False))
    if repeated:
        rows = [(*_place(*rollout), outcome_words(rollout[1])) for rollout in repeated]
        note = "After a crash, a hang or an error the rollout was begun anew; its last attempt counts."
        blocks.append(Table("Begun more than once", (*place, "outcome"), rows, note, numeric=False))
    return Section("Errors", blocks)


def _place(evaluation: Evaluation, episode: EpisodeRecord) -> tuple[str, ...]:
    return (
        task_words(episode), evaluation.label, str(episode.initial_state), str(episode.trial), str(episode.attempts)
    )  # fmt: skip


def _all_rollouts(rollouts: Sequence[Rollout], files: MediaFiles, several: bool) -> Section:
    columns = ("task", *(["evaluation"] if several else []), "initial state", "trial", "outcome", "steps",
               "tokens kept", "seconds", "attempts", "video")  # fmt: skip
    rows: list[Row] = []
    for evaluation, episode in rollouts:
        path = evaluation.folder / episode.video if episode.video else None
        there = path is not None and path.is_file()
        rows.append(
            (
                task_words(episode),
                *([evaluation.label] if several else []),
                str(episode.initial_state),
                str(episode.trial),
                Cell(outcome_words(episode), mark=episode.success),
                str(episode.steps),
                f"{np.mean(episode.tokens_kept):.1f}" if episode.tokens_kept else "–",
                f"{episode.wall_seconds:.1f}",
                str(episode.attempts),
                Cell("file", address=relative_address(path, files.folder)) if there and path else Cell("–"),
            )
        )
    note = "Seconds are those of the whole rollout on the evaluating machine, its videos included."
    table = Table("", columns, rows, note, sortable=True, folded=len(rows) > _ROWS_SHOWN)
    return Section("All rollouts", [table] if rows else [])
