"""Results as tables for people: per task, policies by suites, two policies compared; in Markdown, CSV and LaTeX."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiments.robot.libero.results.caveats import cut_short, own_caveats, perturbation_of, protocol_differences
from experiments.robot.libero.results.comparison import (
    AVERAGE,
    Comparison,
    PairedOutcome,
    p_text,
    percent,
    points,
    span,
)
from experiments.robot.libero.results.pairing import mixed_tasks, without_copies
from experiments.robot.libero.results.results import EpisodeRecord, Results, summarize
from experiments.robot.libero.results.table_formats import INTERVALS, Table, warned
from experiments.robot.libero.settings.suite_names import SUITES
from prismatic.significance import Interval, wilson_interval

_PUBLISHED = {
    "libero_spatial": ("Spatial", 10),
    "libero_object": ("Object", 10),
    "libero_goal": ("Goal", 10),
    "libero_10": ("Long", 10),
    "libero_90": ("LIBERO-90", 90),
}
"""What papers call a standard suite, and how many tasks it and the suites that perturb it have."""


_PAIRED_INTERVALS = (
    "95 % intervals: Wilson's for rates; for differences over a task's episodes, for totals by bootstrap over tasks "
    "and episodes."
)
_UNEVEN = (
    "Rates of totals are averages over tasks, then suites, which do not all have as many episodes: their intervals "
    "are for the effective number of trials (Kish), and they are not the share of all episodes."
)
_SPREAD = " ± is the standard deviation between runs (seeds); chance among episodes adds to it."
_LEFT_OUT = "Invalid rollouts (simulator errors) are left out."

Column = tuple[str, float]
"""Suite and how far wide starts reach in metres, 0 for standard starts."""


def result_table(results: Results) -> Table:
    """One evaluation: a row per task, and one for all of them."""
    groups: dict[tuple[str, int], list[EpisodeRecord]] = {}
    for episode in results.episodes:
        groups.setdefault((episode.suite, episode.task_index), []).append(episode)
    suites = sorted({suite for suite, _ in groups})
    swapped = any(episode.other_task is not None for episode in results.episodes)
    rows, records = [], []
    for (suite, index), episodes in [*sorted(groups.items()), (("", -1), results.episodes)]:
        total = index < 0
        name = "all" if total else episodes[0].task_name.replace("_", " ")
        summary = summarize(episodes)
        numbers, kept, latency = summary["all"], summary["tokens_kept"], summary["latency_ms"]
        interval = wilson_interval(numbers["successes"], numbers["trials"])
        rows.append(
            (
                name if total or len(suites) == 1 else f"{suite}: {name}",
                f"{numbers['successes']}/{numbers['trials']}",
                "" if numbers["rate"] is None else percent(numbers["rate"]),
                span(interval),
                *([f"{numbers['other_goal']['successes']}/{numbers['other_goal']['trials']}"] if swapped else []),
                str(numbers["invalid"]),
                f"{kept['mean']:.1f} of {kept['of']}" if kept else "",
                f"{latency['median']:.1f} ms" if latency else "",
            )
        )
        records.append(
            {
                "suite": suite,
                "task_index": None if total else index,
                "task": name,
                **{key: numbers[key] for key in ("successes", "trials", "rate")},
                "rate_low": interval.low,
                "rate_high": interval.high,
                **({"other_goal_successes": numbers["other_goal"]["successes"]} if swapped else {}),
                "invalid": numbers["invalid"],
                "tokens_kept_mean": kept["mean"] if kept else None,
                "visual_tokens": kept["of"] if kept else None,
                "latency_ms_median": latency["median"] if latency else None,
            }
        )
    other = ("other task's goal",) if swapped else ()
    wide_m = _wide_m(results)
    titles = [_column_title((suite, wide_m), {index for own, index in groups if own == suite}) for suite in suites]
    return Table(
        title=f"Success per task, {', '.join(titles)}",
        headings=("task", "solved", "rate", "95 % interval", *other, "invalid", "tokens kept", "latency"),
        rows=tuple(rows),
        records=tuple(records),
        notes=(
            INTERVALS,
            f"{_LEFT_OUT} Tokens kept: mean per policy query. Latency: median per query.",
            *map(warned, own_caveats(results)),
        ),
        intervals=INTERVALS,
        totals=1,
    )


def policies_table(policies: Mapping[str, Sequence[Results]]) -> Table:
    """A row per policy, a column per suite, and their average where all episodes and suites are of one kind: not over
    standard and wide starts, nor over standard and perturbed suites.

    Results of one policy and suite with different seeds of the evaluation, or with the same episodes again (other
    training runs), count as several runs: their mean and standard deviation are given. Results with other episodes of
    the same seed belong to one, and copies of a rollout count once.

    Args:
        policies: Name -> all results of that policy.
    """
    counted = {name: without_copies(results) for name, results in policies.items()}
    policies = {name: results for name, (results, _) in counted.items()}
    runs = {name: _runs(results) for name, results in policies.items()}
    columns = list(dict.fromkeys(column for own in runs.values() for run in own for column in run))
    order = list(SUITES)
    tried = {c: [{e.task_index for run in r for e in run.get(c, [])} for r in runs.values()] for c in columns}
    columns.sort(key=lambda c: (c[1], order.index(c[0]) if c[0] in order else len(order), c[0]))
    averaged = len(columns) > 1 and len({(wide_m, perturbation_of(suite)) for suite, wide_m in columns}) == 1
    rows, records = [], []
    for name, results in policies.items():
        own = [_rate_records(name, column, [run[column] for run in runs[name] if column in run]) for column in columns]
        if averaged:
            own.append(_average_record(name, runs[name], own))
        summary = summarize([episode for result in results for episode in result.episodes])
        kept, latency = summary["tokens_kept"], summary["latency_ms"]
        tokens = f"{kept['mean']:.1f} of {kept['of']}" if kept else ""
        rows.append((name, *map(_rate_cell, own), tokens, f"{latency['median']:.1f} ms" if latency else ""))
        records += [record for record in own if record["rate"] is not None]
    sides = list(policies.items())
    intervals = INTERVALS + _SPREAD * any(record["runs"] > 1 for record in records)
    titles = {column: _column_title(column, set.union(*tasks)) for column, tasks in tried.items()}
    uneven = [titles[column] for column, tasks in tried.items() if len({frozenset(t) for t in tasks if t}) > 1]
    return Table(
        title="Success rate in percent",
        headings=("policy", *(titles[column] for column in columns), *["Average"] * averaged, "tokens kept", "latency"),
        rows=tuple(rows),
        records=tuple(records),
        notes=(
            intervals,
            _LEFT_OUT,
            *(warned(f"not all policies were tried on the same tasks: {title}") for title in uneven),
            *(
                warned(f"{name}: {copies} rollouts were given twice (equal episodes, seeds and actions) and count once")
                for name, (_, copies) in counted.items()
                if copies
            ),
            *map(warned, mixed_tasks(sides)),
            *map(warned, protocol_differences(sides, {suite for suite, _ in columns})),
            *map(warned, cut_short(sides)),
        ),
        intervals=intervals,
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
            *([_UNEVEN] if any(outcome.uneven for outcome in outcomes_of(comparison)) else []),
            "p: McNemar's exact test; for tasks with Holm's correction.",
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
    numbers: dict[str, Any] = {"episodes": outcome.counts.trials, **outcome.counts._asdict()}
    sides = zip(("first", "second"), names, outcome.rates, outcome.wilson, strict=True)
    for side, name, rate, ends in sides:
        numbers |= {side: name, f"{side}_rate": rate, f"{side}_low": ends.low, f"{side}_high": ends.high}
    numbers |= {"difference": outcome.difference, "difference_low": outcome.interval.low}
    return numbers | {
        "difference_high": outcome.interval.high,
        "p": outcome.p_value,
        "p_holm": outcome.corrected_p,
    }


def _wide_m(results: Results) -> float:
    return float(results.config.get("wide_starts_m") or 0)


def _column_title(column: Column, tasks: Collection[int]) -> str:
    """The suite, how much of it was tried when not all, and how wide the starts are."""
    suite, wide_m = column
    title, whole = _PUBLISHED[SUITES[suite].base] if suite in SUITES else (suite, len(tasks))
    title = title if suite in _PUBLISHED else suite
    part = f" ({len(tasks)} of {whole} tasks)" if len(tasks) < whole else ""
    return title + part + (f", wide starts {100 * wide_m:g} cm" if wide_m else "")


def _runs(results: Sequence[Results]) -> list[dict[Column, list[EpisodeRecord]]]:
    """A policy's results as runs: one per seed of an evaluation, and one more wherever a start comes up again.

    An evaluation's rollouts may have seeds of their own that count up from its seed.
    """
    runs: dict[tuple[int, int], dict[Column, list[EpisodeRecord]]] = {}
    for result in results:
        given = next((part["seed"] for part in (result.config, result.run) if part.get("seed") is not None), None)
        parts: dict[tuple[Column, int], list[EpisodeRecord]] = {}
        for episode in result.episodes:
            seed = episode.seed if given is None else int(given)
            parts.setdefault(((episode.suite, _wide_m(result)), seed), []).append(episode)
        for (column, seed), episodes in parts.items():
            keys, repetition = {episode.key for episode in episodes}, 0
            while keys & {episode.key for episode in runs.get((seed, repetition), {}).get(column, [])}:
                repetition += 1
            runs.setdefault((seed, repetition), {}).setdefault(column, []).extend(episodes)
    return list(runs.values())


def _rate(episodes: Sequence[EpisodeRecord]) -> float | None:
    outcomes = [episode.success for episode in episodes if episode.success is not None]
    return sum(outcomes) / len(outcomes) if outcomes else None


def _rate_records(policy: str, column: Column, runs: Sequence[Sequence[EpisodeRecord]]) -> dict[str, Any]:
    """All runs of a policy on one suite."""
    rates = [rate for rate in map(_rate, runs) if rate is not None]
    outcomes = [episode.success for run in runs for episode in run if episode.success is not None]
    interval = wilson_interval(sum(outcomes), len(outcomes)) if len(rates) == 1 else None
    return {
        "policy": policy,
        "suite": column[0],
        "wide_starts_m": column[1],
        "runs": len(rates),
        "successes": sum(outcomes),
        "trials": len(outcomes),
        "rate": statistics.fmean(rates) if rates else None,
        "rate_low": interval.low if interval else None,
        "rate_high": interval.high if interval else None,
        "rate_standard_deviation": statistics.stdev(rates) if len(rates) > 1 else None,
        "invalid": sum(episode.success is None for run in runs for episode in run),
    }


def _average_record(
    policy: str, runs: Sequence[Mapping[Column, Sequence[EpisodeRecord]]], suites: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Over all suites, given their records; without a rate where one is missing, without a spread where runs differ."""
    rates = [record["rate"] for record in suites]
    by_run = [[_rate(run.get((r["suite"], r["wide_starts_m"]), [])) for r in suites] for run in runs]
    means = [statistics.fmean(rate for rate in row if rate is not None) for row in by_run if None not in row]
    return {
        "policy": policy,
        "suite": AVERAGE,
        "runs": len(means),
        "rate": None if None in rates else statistics.fmean(rates),
        "rate_standard_deviation": statistics.stdev(means) if len(means) == len(runs) > 1 else None,
    }


def _rate_cell(record: Mapping[str, Any]) -> str:
    if record["rate"] is None:
        return ""
    cell = f"{100 * record['rate']:.1f}"
    if record["rate_standard_deviation"] is not None:
        return f"{cell} ± {100 * record['rate_standard_deviation']:.1f}"
    if record.get("rate_low") is not None:
        return f"{cell} ({span(Interval(record['rate_low'], record['rate_high']))})"
    return cell
