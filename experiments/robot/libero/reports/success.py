"""The report's section on success: means per suite, every task, and the comparisons that matter."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from experiments.robot.libero.comparison.compare import compare
from experiments.robot.libero.comparison.pairing import StartIdentity
from experiments.robot.libero.comparison.policies_table import policies_table
from experiments.robot.libero.reports.evaluation import Evaluation, TaskKey
from experiments.robot.libero.reports.groups import Group
from experiments.robot.libero.results.measures import completion_text, jerk_text, latency_text, progress_text
from experiments.robot.libero.results.results import EpisodeRecord, summarize
from experiments.robot.libero.results.success import suite_order
from prismatic.report.charts import RateBars
from prismatic.report.data import Block, Cell, CodeBlock, Row, Section, Table, counted, share_cell
from prismatic.significance import wilson_interval

MOST_BARS = 8
"""Groups in a chart: as many as there are colours."""

_NOTE = "Successes of valid rollouts, the rate, and its Wilson 95 % interval in percent."
_SEEDS = " Where several seeds began at one initial state, these count as one trial, by their mean."

Count = tuple[float, int]
"""Successes and trials; several seeds of an initial state are one trial, and their mean its success."""
Outcomes = dict[TaskKey, Count]


def outcomes(evaluation: Evaluation) -> dict[str, Outcomes]:
    """Label -> task -> count; where another task's instruction was given also of that goal."""
    results = evaluation.results
    own: dict[TaskKey, dict[StartIdentity, list[bool]]] = {}
    instructed: dict[TaskKey, dict[StartIdentity, list[bool]]] = {}
    for episode in results.episodes:
        task, scene = (episode.suite, episode.task_index), StartIdentity.of(episode, results).scene
        tried = own.setdefault(task, {})
        if episode.success is not None:
            tried.setdefault(scene, []).append(episode.success)
        if episode.other_task is not None:
            tried = instructed.setdefault(task, {})
            if episode.other_success is not None:
                tried.setdefault(scene, []).append(episode.other_success)
    if not instructed:
        return {evaluation.label: _counts(own)}
    return {
        f"{evaluation.label}: own goal": _counts(own),
        f"{evaluation.label}: the instructed goal": _counts(instructed),
    }


def _counts(tasks: Mapping[TaskKey, Mapping[StartIdentity, Sequence[bool]]]) -> Outcomes:
    return {task: (sum(map(statistics.fmean, tried.values())), len(tried)) for task, tried in tasks.items()}


def success_section(groups: Sequence[Group]) -> Section:
    """Means per suite where there are several, bars, every task, and the differences from the first group."""
    columns = {label: counts for group in groups for label, counts in outcomes(group.whole).items()}
    tasks = {
        (episode.suite, episode.task_index): episode.task_name.replace("_", " ")
        for group in groups
        for episode in group.whole.results.episodes
    }
    if not tasks:
        return Section("Success", [])
    suites = sorted({suite for suite, _ in tasks}, key=suite_order)
    blocks: list[Block] = []
    if suites[1:] or any(group.parts[1:] for group in groups):
        blocks.append(suite_means(groups))
    blocks.append(_bars(columns, tasks, suites))
    note = _NOTE + _SEEDS * any(_repeated(group) for group in groups)
    of_tasks = [_task_table(suite, columns, tasks, groups, several=bool(suites[1:])) for suite in suites]
    blocks += [*of_tasks[:-1], replace(of_tasks[-1], note=note)]
    return Section("Success", [*blocks, *differences(groups)])


def suite_means(groups: Sequence[Group]) -> Table:
    """A row per group, a column per suite, and the mean of the suites."""
    found = policies_table({group.name: group.results for group in groups})
    rows: list[Row] = [(name, *(_two_lines(cell) for cell in cells)) for name, *cells in found.rows]
    return Table("Success rate per suite, in percent", found.headings, rows, " ".join(found.notes))


def _two_lines(text: str) -> Cell:
    """`93.0 (90.5 to 95.0)` with the brackets' content below the number."""
    number, _, more = text.removesuffix(")").partition(" (")
    return Cell(number, note=more) if more else Cell(text)


def _bars(columns: Mapping[str, Outcomes], tasks: Mapping[TaskKey, str], suites: Sequence[str]) -> RateBars:
    """Of one suite a row per task, of several a row per suite."""
    shown = dict(list(columns.items())[:MOST_BARS])
    more = f" (the first {MOST_BARS} of {len(columns)})" if len(columns) > MOST_BARS else ""
    if len(suites) == 1:
        keys = sorted(tasks)
        series = {label: [counts.get(key, (0, 0)) for key in keys] for label, counts in shown.items()}
        return RateBars(f"Success per task{more}", [tasks[key] for key in keys], series)
    series = {label: [_sum(counts, suite) for suite in suites] for label, counts in shown.items()}
    return RateBars(f"Success per suite{more}", list(suites), series)


def whole_count(evaluation: Evaluation) -> Count:
    """Of all tasks together, by the own goal."""
    own = next(iter(outcomes(evaluation).values()), {})
    return sum(successes for successes, _ in own.values()), sum(trials for _, trials in own.values())


def _sum(counts: Outcomes, suite: str) -> Count:
    own = [count for (of, _), count in counts.items() if of == suite]
    return sum(successes for successes, _ in own), sum(trials for _, trials in own)


def _task_table(
    suite: str, columns: Mapping[str, Outcomes], tasks: Mapping[TaskKey, str], groups: Sequence[Group], several: bool
) -> Table:
    """A row per task; of a single group also what its rollouts took."""
    keys = sorted(key for key in tasks if key[0] == suite)
    single = groups[0].whole if len(groups) == 1 else None
    own = [e for e in single.results.episodes if e.suite == suite] if single else []
    progress = any(episode.progress is not None for episode in own)
    jerk = any(episode.jerk is not None for episode in own)
    rows: list[Row] = [
        (
            Cell(tasks[key], sort=float(place), note=f"task {key[1]}"),
            *(_share(counts.get(key, (0, 0))) for counts in columns.values()),
            *(_details([e for e in own if e.task_index == key[1]], jerk, progress) if single else ()),
        )
        for place, key in enumerate(keys)
    ]
    total: Row = (
        "all",
        *(_share(_sum(counts, suite)) for counts in columns.values()),
        *(_details(own, jerk, progress) if single else ()),
    )
    heads = ["solved"] if single and len(columns) == 1 else list(columns)
    details = ("invalid", "steps to success", *["jerk in m/s³"] * jerk, *["progress"] * progress, "tokens kept",
               "policy's time per query")  # fmt: skip
    title = f"Tasks of {suite}" if several else "Tasks"
    columns_ = ("task", *heads, *(details if single else ()))
    return Table(title, columns_, rows, totals=(total,), sortable=True, folded=several)


def _share(count: Count) -> Cell:
    """`3/4 · 75 % (30–95)`; where seeds were averaged `75 % (30–95)` over how many initial states."""
    successes, trials = count
    if successes == int(successes):
        return share_cell(int(successes), trials)
    rate, ends = successes / trials, wilson_interval(successes, trials)
    text = f"{100 * rate:.0f} % ({100 * ends.low:.0f}–{100 * ends.high:.0f})"
    return Cell(text, sort=rate, note=f"of {counted(trials, 'state')}", interval=(ends.low, rate, ends.high))


def _repeated(group: Group) -> bool:
    episodes = [episode for episode in group.whole.results.episodes if episode.success is not None]
    return sum(trials for counts in outcomes(group.whole).values() for _, trials in counts.values()) < len(episodes)


def _details(episodes: Sequence[EpisodeRecord], jerk: bool, progress: bool) -> tuple[str, ...]:
    """Invalid rollouts, what a success takes, mean tokens kept, median of the policy's own time per query."""
    summary = summarize(episodes)
    numbers, kept = summary["all"], summary["tokens_kept"]
    return (
        str(numbers["invalid"]),
        completion_text(numbers, "–"),
        *([jerk_text(numbers, "–")] if jerk else []),
        *([progress_text(numbers, "–")] if progress else []),
        f"{kept['mean']:.1f}" if kept else "–",
        latency_text(summary["latency_ms"]) or "–",
    )


def differences(groups: Sequence[Group]) -> list[CodeBlock]:
    """Of several groups: how far each is from the first on the episodes they share, and the command for more.

    Those that share no episode, or measure something else under one name, cannot be compared; the command says why.
    """
    found = []
    for other in groups[1:]:
        first, names = groups[0], (groups[0].name, other.name)
        try:
            comparison = compare(first.results, other.results, names)
        except ValueError as error:
            note = f"Not compared: {error}"
        else:
            said = [comparison.verdict, comparison.motion, *(f"Mind: {warning}." for warning in comparison.warnings)]
            note = " ".join(filter(None, said))
        sides = [shlex.join(group.paths) for group in (first, other)]
        command = f"python scripts/compare_results.py {sides[0]} --against {sides[1]} --names {shlex.join(names)}"
        found.append(CodeBlock(f"The difference between {names[0]} and {names[1]}", command, note))
    return found
