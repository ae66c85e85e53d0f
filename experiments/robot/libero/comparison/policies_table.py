"""Policies by suites: a table with a row per policy, its success rates with intervals or their spread."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from experiments.robot.libero.comparison.caveats import (
    cut_short,
    evaluation_warnings,
    perturbation_of,
    protocol_differences,
)
from experiments.robot.libero.comparison.compare import AVERAGE, span
from experiments.robot.libero.comparison.copies import SEEDS_ARE_NO_TRIALS, without_copies, without_other_names
from experiments.robot.libero.comparison.pairing import StartIdentity, mixed_tasks
from experiments.robot.libero.comparison.table_formats import INTERVALS, Table, warned
from experiments.robot.libero.results.measures import MeasureColumns
from experiments.robot.libero.results.results import EpisodeRecord, Results, summarize
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


_SPREAD = " ± is the standard deviation between training runs; chance among episodes adds to it."
LEFT_OUT = "Invalid rollouts (simulator errors) are left out."

Column = tuple[str, float]
"""Suite and how far wide starts reach in metres, 0 for standard starts."""


def policies_table(policies: Mapping[str, Sequence[Results]]) -> Table:
    """A row per policy, a column per suite, and their average where all episodes and suites are of one kind: not over
    standard and wide starts, nor over standard and perturbed suites.

    Results of one policy and suite with other checkpoints, or with the same episodes again, are several training runs:
    their mean and standard deviation are given. Other seeds of the evaluation are none: rollouts from one initial state
    count as one trial, by their mean. Copies of a rollout count once.

    Args:
        policies: Name -> all results of that policy.
    """
    distinct = {name: without_copies(results, name) for name, results in policies.items()}
    policies, copies = without_other_names({name: results for name, (results, _) in distinct.items()})
    copies = [note for _, notes in distinct.values() for note in notes] + copies
    runs = {name: _runs(results) for name, results in policies.items()}
    columns = list(dict.fromkeys(column for own in runs.values() for run in own for column in run))
    order = list(SUITES)
    tried = {c: [{e.task_index for run in r for _, e in run.get(c, [])} for r in runs.values()] for c in columns}
    columns.sort(key=lambda c: (c[1], order.index(c[0]) if c[0] in order else len(order), c[0]))
    averaged = len(columns) > 1 and len({(wide_m, perturbation_of(suite)) for suite, wide_m in columns}) == 1
    rows, records, summaries = [], [], []
    for name, results in policies.items():
        own = [_rate_records(name, column, [run[column] for run in runs[name] if column in run]) for column in columns]
        if averaged:
            own.append(_average_record(name, runs[name], own))
        summary = summarize([episode for result in results for episode in result.episodes])
        summaries.append(summary)
        kept = summary["tokens_kept"]
        rows.append((name, *map(_rate_cell, own), f"{kept['mean']:.1f} of {kept['of']}" if kept else ""))
        records += [record for record in own if record["rate"] is not None]
    measured = MeasureColumns.of(summaries)
    sides = list(policies.items())
    several_seeds = any(record.get("trials", 0) > record.get("initial_states", 0) for record in records)
    intervals = INTERVALS + _SPREAD * any(record["runs"] > 1 for record in records)
    titles = {column: column_title(column, {task for own in tasks for task in own}) for column, tasks in tried.items()}
    uneven = [titles[column] for column, tasks in tried.items() if len({frozenset(t) for t in tasks if t}) > 1]
    return Table(
        title="Success rate in percent",
        headings=(
            "policy",
            *(titles[column] for column in columns),
            *["Average"] * averaged,
            "tokens kept",
            *measured.headings,
        ),
        rows=tuple((*row, *cells) for row, cells in zip(rows, measured.cells, strict=True)),
        records=tuple(records),
        notes=(
            intervals,
            f"{LEFT_OUT} {measured.note}",
            *([SEEDS_ARE_NO_TRIALS] if several_seeds else []),
            *(warned(f"not all policies were tried on the same tasks: {title}") for title in uneven),
            *map(warned, copies),
            *map(warned, mixed_tasks(sides)),
            *map(warned, protocol_differences(sides, {suite for suite, _ in columns})),
            *map(warned, cut_short(sides)),
            *map(warned, evaluation_warnings(sides)),
        ),
        intervals=intervals,
    )


Rollouts = list[tuple[StartIdentity, EpisodeRecord]]
"""Rollouts of one suite with the scenes that they began at."""


def _runs(results: Sequence[Results]) -> list[dict[Column, Rollouts]]:
    """A policy's results as training runs: of each suite one per checkpoint, and one more where starts come again."""
    runs: list[dict[Column, Rollouts]] = []
    trained: dict[tuple[Column, int], tuple[str, set[StartIdentity]]] = {}
    for result in results:
        parts: dict[Column, dict[StartIdentity, EpisodeRecord]] = {}
        for episode in result.episodes:
            column = episode.suite, wide_starts_m(result)
            parts.setdefault(column, {})[StartIdentity.of(episode, result)] = episode
        for column, episodes in parts.items():
            # A copy elsewhere is the same one, and another one may lie where it lay.
            checkpoint, number = str(result.policy.get("weights_fingerprint") or result.policy.get("checkpoint")), 0
            while (column, number) in trained:
                other, starts = trained[column, number]
                if other == checkpoint and not starts & set(episodes):
                    break
                number += 1
            trained.setdefault((column, number), (checkpoint, set()))[1].update(episodes)
            runs += [{} for _ in range(number + 1 - len(runs))]
            runs[number].setdefault(column, []).extend((start.scene, episode) for start, episode in episodes.items())
    return runs


def overall_rate(results: Sequence[Results]) -> tuple[float, int] | None:
    """Of everything that a policy was tried on: the success rate, and on how many initial states it rests."""
    rates = [_rate([rollout for column in run.values() for rollout in column]) for run in _runs(results)]
    known = [rate for rate in rates if rate is not None]
    trials = sum(states for _, states in known)
    return (sum(rate * states for rate, states in known) / trials, trials) if known else None


def _rate(rollouts: Rollouts) -> tuple[float, int] | None:
    """Success rate as the mean over scenes, and how many there are; None without valid rollouts."""
    scenes: dict[StartIdentity, list[bool]] = {}
    for scene, episode in rollouts:
        if episode.success is not None:
            scenes.setdefault(scene, []).append(episode.success)
    return (statistics.fmean(map(statistics.fmean, scenes.values())), len(scenes)) if scenes else None


def _rate_records(policy: str, column: Column, runs: Sequence[Rollouts]) -> dict[str, Any]:
    """All runs of a policy on one suite."""
    rates = [rate for rate in map(_rate, runs) if rate is not None]
    outcomes = [episode.success for run in runs for _, episode in run if episode.success is not None]
    interval = wilson_interval(rates[0][0] * rates[0][1], rates[0][1]) if len(rates) == 1 else None
    return {
        "policy": policy,
        "suite": column[0],
        "wide_starts_m": column[1],
        "runs": len(rates),
        "successes": sum(outcomes),
        "trials": len(outcomes),
        "initial_states": sum(states for _, states in rates),
        "rate": statistics.fmean(rate for rate, _ in rates) if rates else None,
        "rate_low": interval.low if interval else None,
        "rate_high": interval.high if interval else None,
        "rate_standard_deviation": statistics.stdev(rate for rate, _ in rates) if len(rates) > 1 else None,
        "invalid": sum(episode.success is None for run in runs for _, episode in run),
    }


def _average_record(
    policy: str, runs: Sequence[Mapping[Column, Rollouts]], suites: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Over all suites, given their records; without a rate where one is missing, without a spread where runs differ."""
    rates = [record["rate"] for record in suites]
    by_run = [[_rate(run.get((r["suite"], r["wide_starts_m"]), [])) for r in suites] for run in runs]
    means = [statistics.fmean(rate[0] for rate in row if rate is not None) for row in by_run if None not in row]
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


def wide_starts_m(results: Results) -> float:
    """How far an evaluation's wide starts reach in metres; 0 for standard ones."""
    return float(results.config.get("wide_starts_m") or 0)


def column_title(column: Column, tasks: Collection[int | None]) -> str:
    """The suite, how much of it was tried when not all, and how wide the starts are."""
    suite, wide_m = column
    title, whole = _PUBLISHED[SUITES[suite].base] if suite in SUITES else (suite, len(tasks))
    title = title if suite in _PUBLISHED else suite
    part = f" ({len(tasks)} of {whole} tasks)" if len(tasks) < whole else ""
    return title + part + (f", wide starts {100 * wide_m:g} cm" if wide_m else "")
