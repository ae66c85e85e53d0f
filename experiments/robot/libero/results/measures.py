"""How measured figures are said in words: latency, completion time, jerk, progress; in one way wherever they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.robot.libero.results.results import EpisodeRecord, summarize
from prismatic.report.data import counted

_WITH_WAITING = " including waiting"
_LATENCY = "Latency: the policy's own time per query, median; waiting and transport are not in it unless it says so."
_STEPS = "Steps to success: mean of the successful episodes"
_JERK = ", and so is jerk (RMS of the end effector's, m/s³)"
_PROGRESS = "Progress: highest share of the goal's predicates that held at once, mean of the valid episodes."


@dataclass(frozen=True)
class MeasureColumns:
    """Columns of a table on time and motion, a cell per summary; those that no summary has anything for are left out.

    Args:
        note: What the columns mean.
    """

    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    note: str

    @classmethod
    def of(cls, summaries: Sequence[Mapping[str, Any]]) -> MeasureColumns:
        """Args: summaries: `Results.summary()`, or those of parts of results."""
        latencies = [summary["latency_ms"] for summary in summaries]
        old = all(latency["includes_waiting"] for latency in latencies if latency)
        texts = [latency_text(latency).removesuffix(_WITH_WAITING * old) for latency in latencies]
        columns = {
            f"latency{_WITH_WAITING * (old and any(latencies))}": texts,
            "steps to success": [completion_text(summary["all"]) for summary in summaries],
            "jerk": [jerk_text(summary["all"]) for summary in summaries],
            "progress": [progress_text(summary["all"]) for summary in summaries],
        }
        kept = {heading: texts for heading, texts in columns.items() if any(texts)}
        note = f"{_LATENCY} {_STEPS}{_JERK * ('jerk' in kept)}.{f' {_PROGRESS}' * ('progress' in kept)}"
        return cls(tuple(kept), tuple(zip(*kept.values(), strict=True)) or ((),) * len(summaries), note)


def measure_record(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The same as plain numbers, for CSV; None for what was not measured."""
    numbers, latency = summary["all"], summary["latency_ms"] or {}
    motion = ("mean_steps_to_success", "mean_seconds_to_success", "mean_jerk", "mean_progress")
    return {
        "latency_ms_median": latency.get("median"),
        "latency_includes_waiting": latency.get("includes_waiting"),
        "waiting_ms_median": latency.get("waiting_median"),
        **{key: numbers[key] for key in motion},
    }


def motion_sentence(pairs: Sequence[tuple[EpisodeRecord, EpisodeRecord]], names: tuple[str, str]) -> str:
    """How long and how smoothly two policies took to solve what both solved: means over the same episodes.

    Args:
        pairs: Rollouts of both on identical episodes.

    Returns:
        Empty where they solved no episode in common.
    """
    both = [pair for pair in pairs if pair[0].success and pair[1].success]
    if not both:
        return ""
    times, jerks = [], []
    for side in (0, 1):
        summary = summarize([pair[side] for pair in both])["all"]
        times.append(completion_text(summary))
        jerks.append(summary["mean_jerk"])
    shaken = [f"{jerk:.1f}" for jerk in jerks if jerk is not None]
    text = f"On the {counted(len(both), 'episode')} that both solved, steps to success: {names[0]} {times[0]}, "
    text += f"{names[1]} {times[1]}"
    return f"{text}; jerk: {names[0]} {shaken[0]}, {names[1]} {shaken[1]} m/s³." if len(shaken) == 2 else f"{text}."


def latency_text(latency: Mapping[str, Any] | None) -> str:
    """`12.1 ms`, or `15.0 ms including waiting` where the two were not told apart; empty without any.

    Args:
        latency: of `Results.summary()`.
    """
    if latency is None:
        return ""
    return f"{latency['median']:.1f} ms{_WITH_WAITING * latency['includes_waiting']}"


def waiting_text(latency: Mapping[str, Any] | None) -> str:
    """`3.0 ms`; empty where it is not known."""
    known = latency is not None and latency["waiting_median"] is not None
    return f"{latency['waiting_median']:.1f} ms" if latency is not None and known else ""


def completion_text(outcomes: Mapping[str, Any], dash: str = "") -> str:
    """`95 (4.8 s)`: control steps to success and their simulated time; `dash` without a success.

    Args:
        outcomes: of all tasks or of one, as in `Results.summary()`.
    """
    steps = outcomes["mean_steps_to_success"]
    return dash if steps is None else f"{steps:.0f} ({outcomes['mean_seconds_to_success']:.1f} s)"


def jerk_text(outcomes: Mapping[str, Any], dash: str = "") -> str:
    return dash if outcomes["mean_jerk"] is None else f"{outcomes['mean_jerk']:.1f}"


def progress_text(outcomes: Mapping[str, Any], dash: str = "") -> str:
    return dash if outcomes["mean_progress"] is None else f"{100 * outcomes['mean_progress']:.0f} %"
