"""Results as tables for people: one evaluation task by task, and two policies compared."""

from __future__ import annotations

from typing import Any

from experiments.robot.libero.comparison.caveats import own_caveats
from experiments.robot.libero.comparison.compare import Comparison, p_text, percent, points, span
from experiments.robot.libero.comparison.copies import SEEDS_ARE_NO_TRIALS
from experiments.robot.libero.comparison.outcomes import PairedOutcome
from experiments.robot.libero.comparison.policies_table import LEFT_OUT, column_title, wide_starts_m
from experiments.robot.libero.comparison.table_formats import INTERVALS, Table, warned
from experiments.robot.libero.results.measures import MeasureColumns, measure_record
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.results.success import AVERAGED, success_rows

_PAIRED_INTERVALS = (
    "95 % intervals: Wilson's for rates; for differences over a task's episodes, for totals by bootstrap over tasks "
    "and episodes."
)
_UNEVEN = (
    "Rates of totals are averages over tasks, then suites, which do not all have as many episodes: their intervals "
    "are for the effective number of trials (Kish), and they are not the share of all episodes."
)


def result_table(results: Results) -> Table:
    """One evaluation: a row per task, one per suite where there are several, and one for all of them."""
    found = success_rows(results.episodes)
    suites = list(dict.fromkeys(row.suite for row in found if row.is_task))
    swapped = any(row.other_goal is not None for row in found)
    rows, records = [], []
    for row in found:
        kept = row.tokens_kept
        rows.append(
            (
                f"{row.suite}: {row.name}" if row.is_task and suites[1:] else row.name,
                row.solved,
                "" if row.rate is None else percent(row.rate),
                span(row.interval),
                *([row.other_goal_reached] if swapped else []),
                str(row.invalid),
                f"{kept['mean']:.1f} of {kept['of']}" if kept else "",
            )
        )
        records.append(
            {
                "suite": row.suite,
                "task_index": row.task_index,
                "task": row.name,
                "successes": row.successes,
                "trials": row.trials,
                "rate": row.rate,
                "rate_low": row.interval.low,
                "rate_high": row.interval.high,
                **({"other_goal_successes": row.other_goal[0] if row.other_goal else None} if swapped else {}),
                "invalid": row.invalid,
                "tokens_kept_mean": kept["mean"] if kept else None,
                "visual_tokens": kept["of"] if kept else None,
                **measure_record(row.summary),
            }
        )
    other = ("other task's goal",) if swapped else ()
    measured = MeasureColumns.of([row.summary for row in found])
    wide_m = wide_starts_m(results)
    tasks = {suite: {row.task_index for row in found if row.is_task and row.suite == suite} for suite in suites}
    titles = [column_title((suite, wide_m), tasks[suite]) for suite in suites]
    return Table(
        title=f"Success per task, {', '.join(titles)}",
        headings=("task", "solved", "rate", "95 % interval", *other, "invalid", "tokens kept", *measured.headings),
        rows=tuple((*row, *cells) for row, cells in zip(rows, measured.cells, strict=True)),
        records=tuple(records),
        notes=(
            INTERVALS,
            f"{LEFT_OUT} Tokens kept: mean per policy query. {measured.note}",
            *([AVERAGED] if suites[1:] else []),
            *map(warned, own_caveats(results)),
        ),
        intervals=INTERVALS,
        totals=sum(not row.is_task for row in found),
    )


def comparison_table(comparison: Comparison) -> Table:
    """Both policies per task, per suite and on average; the verdict is its first note."""
    first, second = comparison.names
    rows, records = [], []
    for outcome in outcomes_of(comparison):
        level = "task" if outcome.corrected_p is not None else "suite" if outcome.suite else "average"
        p_value = outcome.p_value if outcome.corrected_p is None else outcome.corrected_p
        rows.append(
            (
                outcome_name(outcome, comparison),
                *(f"{100 * rate:.1f} ({span(ends)})" for rate, ends in zip(outcome.rates, outcome.wilson, strict=True)),
                *map(str, outcome.counts),
                f"{points(outcome.difference)} ({span(outcome.interval, signed=True)})",
                p_text(p_value),
            )
        )
        records.append(
            {"level": level, "suite": outcome.suite, "name": outcome.name, **_numbers(outcome, comparison.names)}
        )
    pairing = comparison.pairing
    lost = (
        f"; {pairing.invalid[0]} invalid in {first}, {pairing.invalid[1]} in {second}" if any(pairing.invalid) else ""
    )
    return Table(
        title=f"{first} against {second} on the same episodes, rates in percent",
        headings=(
            "task", first, second, "both", f"only {first}", f"only {second}", "neither", "difference", "p",
        ),
        rows=tuple(rows),
        records=tuple(records),
        notes=(
            comparison.verdict,
            f"Episodes: {pairing.counted} counted of {pairing.both} in both{lost}; {pairing.only[0]} in {first} only, "
            f"{pairing.only[1]} in {second} only.",
            _PAIRED_INTERVALS,
            *([SEEDS_ARE_NO_TRIALS] if comparison.seeds > 1 else []),
            *([_UNEVEN] if any(outcome.uneven for outcome in outcomes_of(comparison)) else []),
            "p: McNemar's exact test; for tasks with Holm's correction.",
            *([comparison.motion] if comparison.motion else []),
            *map(warned, comparison.warnings),
        ),
        intervals=_PAIRED_INTERVALS,
        totals=len(rows) - len(comparison.tasks),
    )  # fmt: skip


def outcomes_of(comparison: Comparison) -> list[PairedOutcome]:
    """Rows of a comparison: tasks, suites, and the average where there are several suites."""
    average = [comparison.overall] if len(comparison.suites) > 1 else []
    return [*comparison.tasks, *comparison.suites, *average]


def outcome_name(outcome: PairedOutcome, comparison: Comparison) -> str:
    """What a row of a comparison is called: with one suite its tasks need not say which, and it is `all`."""
    if len(comparison.suites) == 1:
        return outcome.name if outcome.corrected_p is not None else "all"
    return f"{outcome.suite}: {outcome.name}" if outcome.corrected_p is not None else outcome.name


def _numbers(outcome: PairedOutcome, names: tuple[str, str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "episodes": outcome.counts.trials,
        "initial_states": outcome.trials,
        **outcome.counts._asdict(),
    }
    sides = zip(("first", "second"), names, outcome.rates, outcome.wilson, strict=True)
    for side, name, rate, ends in sides:
        numbers |= {side: name, f"{side}_rate": rate, f"{side}_low": ends.low, f"{side}_high": ends.high}
    numbers |= {"difference": outcome.difference, "difference_low": outcome.interval.low}
    return numbers | {
        "difference_high": outcome.interval.high,
        "p": outcome.p_value,
        "p_holm": outcome.corrected_p,
    }
