"""Success per task, per suite and over all: the rows that terminal, tables, report and model card only format."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.robot.libero.results.results import EpisodeRecord, summarize
from experiments.robot.libero.settings.suite_names import SUITES
from prismatic.significance import Interval, effective_trials, wilson_interval

AVERAGED = (
    "The rate over all suites is the mean of the suites' rates; its interval allows for how many trials each has."
)


@dataclass(frozen=True)
class SuccessRow:
    """A task, a suite (where there are several), or everything together.

    Args:
        suite: Empty for everything together.
        task_index: None for sums.
        name: The task as text, the suite, `all`, or `mean of suites`.
        successes, trials: Of valid rollouts.
        rate: Successes per trial; of several suites together the mean of their rates. None without trials.
        interval: Wilson, 95 %.
        other_goal: Successes and trials of the goal whose instruction was given instead; None where none was.
        steps_to_success: Mean of the successful rollouts.
        tokens_kept, latency_ms: As in `summarize`.
        summary: All that `summarize` says.
    """

    suite: str
    task_index: int | None
    name: str
    successes: int
    trials: int
    rate: float | None
    interval: Interval
    other_goal: tuple[int, int] | None
    invalid: int
    steps_to_success: float | None
    tokens_kept: dict[str, Any] | None
    latency_ms: dict[str, Any] | None
    summary: dict[str, Any]

    @property
    def is_task(self) -> bool:
        return self.task_index is not None

    @property
    def solved(self) -> str:
        """`7/10`."""
        return f"{self.successes}/{self.trials}"

    @property
    def other_goal_reached(self) -> str:
        """`1/10`; empty where no other task's instruction was given."""
        return f"{self.other_goal[0]}/{self.other_goal[1]}" if self.other_goal else ""


def success_rows(episodes: Sequence[EpisodeRecord]) -> list[SuccessRow]:
    """Tasks in order, suites where there are several, and everything together."""
    by_task: dict[tuple[str, int], list[EpisodeRecord]] = {}
    for episode in episodes:
        by_task.setdefault((episode.suite, episode.task_index), []).append(episode)
    keys = sorted(by_task, key=lambda key: (suite_order(key[0]), key))
    rows = [_row(*key, by_task[key][0].task_name.replace("_", " "), by_task[key]) for key in keys]
    names = list(dict.fromkeys(suite for suite, _ in keys))
    if len(names) < 2:
        return [*rows, _row("", None, "all", episodes)]
    suites = [_row(name, None, name, [e for e in episodes if e.suite == name]) for name in names]
    return [*rows, *suites, _mean(_row("", None, "mean of suites", episodes), suites)]


def suite_order(suite: str) -> tuple[int, str]:
    """Suites as papers list them; unknown ones behind, by name."""
    return list(SUITES).index(suite) if suite in SUITES else len(SUITES), suite


def _row(suite: str, index: int | None, name: str, episodes: Sequence[EpisodeRecord]) -> SuccessRow:
    summary = summarize(episodes)
    numbers = summary["all"]
    other = numbers.get("other_goal")
    return SuccessRow(
        suite,
        index,
        name,
        numbers["successes"],
        numbers["trials"],
        numbers["rate"],
        wilson_interval(numbers["successes"], numbers["trials"]),
        None if other is None else (other["successes"], other["trials"]),
        numbers["invalid"],
        numbers["mean_steps_to_success"],
        summary["tokens_kept"],
        summary["latency_ms"],
        summary,
    )


def _mean(pooled: SuccessRow, suites: Sequence[SuccessRow]) -> SuccessRow:
    """The mean of the suites' rates in place of the share of all rollouts; none where a suite has no valid rollout."""
    rates = [row.rate for row in suites if row.rate is not None]
    if len(rates) < len(suites):
        return replace(pooled, rate=None, interval=Interval(0.0, 1.0))
    rate, trials = statistics.fmean(rates), effective_trials([[row.trials] for row in suites])
    return replace(pooled, rate=rate, interval=wilson_interval(rate * trials, trials))
