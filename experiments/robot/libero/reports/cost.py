"""The report's sections on what a policy query costs: visual tokens kept, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.reports.evaluation import Evaluation, controls_note
from prismatic.report.charts import BandChart, StackedBars, band_of
from prismatic.report.data import Block, Section, Table, counted

PERCENTILES = (50, 90, 95, 99)
REST, REST_WITH_WAITING = "other", "other and waiting"
"""Time of a policy query that no stage has: the action head, copies; in old results waiting too."""
WAITING = "waiting"
_WAITING_NOTE = (
    f"“{WAITING}” is no time of the policy: other simulators' queries that go first, pictures and actions on their way "
    "through pipes or the network. "
)
_OLD_NOTE = "Results that do not tell the two apart are shown including waiting. "
SERVER, SERVER_REST = "server", "other on the server"
"""The stage of a policy server's whole reply, and what is left of it where the server also names parts of it."""


def tokens_section(evaluations: Sequence[Evaluation]) -> Section:
    """How many visual tokens stayed, over the policy queries of a rollout and in all."""
    kept = {
        e.name: [episode.tokens_kept for episode in e.results.episodes if episode.tokens_kept and not episode.invalid]
        for e in evaluations
    }
    kept = {label: episodes for label, episodes in kept.items() if episodes}
    if not kept:
        return Section("Visual tokens kept", [])
    rows = []
    for evaluation in evaluations:
        if summary := evaluation.results.summary()["tokens_kept"]:
            share = f"{100 * summary['fraction']:.0f} %" if summary["fraction"] is not None else "–"
            numbers = (f"{summary['mean']:.1f}", str(summary["min"]), str(summary["max"]), str(summary["of"]), share)
            rows.append((evaluation.name, *numbers))
    chart = BandChart(
        "Visual tokens kept over a rollout",
        {label: band_of(episodes) for label, episodes in kept.items()},
        counter="policy query",
        unit="tokens kept",
        seconds_per_count=_seconds_per_query(evaluations),
    )
    note = (
        "The line is the mean over the rollouts that are still running at a policy query, the band their 10th to 90th "
        "percentile; it is dotted, without a band, where fewer than half of them are. " + controls_note(evaluations)
    ).strip()
    columns = ("evaluation", "mean", "least", "most", "of", "share kept")
    return Section("Visual tokens kept", [chart, Table("Over all policy queries", columns, rows)], note)


def _seconds_per_query(evaluations: Sequence[Evaluation]) -> float | None:
    """Simulated time between two policy queries; None where evaluations differ or do not say."""
    found = set()
    for evaluation in evaluations:
        step, steps = evaluation.seconds_per_step, evaluation.results.open_loop_steps
        found.add(step * steps if steps else None)
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class QueryTimes:
    """Milliseconds of every policy query of the valid rollouts.

    Args:
        whole: (N,) The policy's own time; where that was never recorded, from query to action chunk.
        stages: Stage -> (M,) times, `REST` last, M <= N: the queries whose stages were recorded; empty without any.
            No stage is part of another one.
        waiting: (N,) What else passed until the action chunk was there; empty where it is part of `whole`.
    """

    whole: NDArray[np.float64]
    stages: dict[str, NDArray[np.float64]]
    waiting: NDArray[np.float64]

    @property
    def rest(self) -> str:
        """What the time is called that no stage has."""
        return REST if self.waiting.size else REST_WITH_WAITING


def query_times(evaluation: Evaluation) -> QueryTimes:
    """Times of the policy queries of valid rollouts; where some of these tell waiting apart, of those alone."""
    valid = [episode for episode in evaluation.results.episodes if episode.invalid is None]
    timed = [episode for episode in valid if episode.is_timed]
    whole: list[float] = []
    parts: list[dict[str, float]] = []
    rests: list[float] = []
    for episode in timed or valid:
        latencies = episode.policy_ms if timed else episode.latency_ms
        stages = {name: times for name, times in episode.stage_ms.items() if name != "total"}
        staged = bool(stages) and all(len(times) == len(latencies) for times in stages.values())
        for query, latency in enumerate(latencies):
            whole.append(latency)
            if staged:
                parts.append(_disjoint({name: times[query] for name, times in stages.items()}))
                rests.append(max(0.0, latency - sum(parts[-1].values())))
    names = list(dict.fromkeys(name for part in parts for name in part))
    split = {name: np.array([part.get(name, 0.0) for part in parts]) for name in names}
    if split:
        split[REST if timed else REST_WITH_WAITING] = np.array(rests)
    return QueryTimes(np.array(whole), split, np.array([ms for episode in timed for ms in episode.waiting_ms]))


def _disjoint(stages: dict[str, float]) -> dict[str, float]:
    """One policy query's stages, with what its parts leave of the server's time in place of all of it."""
    parts = {name: time for name, time in stages.items() if name != SERVER}
    if SERVER not in stages or not parts:
        return stages
    return {**parts, SERVER_REST: max(0.0, stages[SERVER] - sum(parts.values()))}


def latency_section(evaluations: Sequence[Evaluation]) -> Section:
    """Percentiles of the policy's own time per query, by stage, what the mean is made of, and waiting apart."""
    timed = [(evaluation, times) for evaluation in evaluations if (times := query_times(evaluation)).whole.size]
    if not timed:
        return Section("Time per policy query", [])
    split = [(evaluation, times) for evaluation, times in timed if times.stages]
    told = [times for _, times in timed if times.waiting.size]
    blocks: list[Block] = []
    if split:
        names = list(dict.fromkeys(name for _, times in split for name in times.stages))
        names.sort(key=lambda name: name in (REST, REST_WITH_WAITING))
        means = {
            name: [float(times.stages[name].mean()) if name in times.stages else 0.0 for _, times in split]
            for name in names
        }
        labels = [evaluation.name for evaluation, _ in split]
        blocks.append(StackedBars("Mean time of a policy query", labels, means, "milliseconds"))
    blocks += [_percentile_table(evaluation.name, times) for evaluation, times in timed]
    devices = dict.fromkeys(str(evaluation.results.run.get("device", "unknown")) for evaluation, _ in timed)
    note = (
        f"Milliseconds of the policy's own time (device: {', '.join(devices)}); queries that were answered in one call "
        f"have the whole call's each. “{REST}” is what no stage names. {_WAITING_NOTE if told else ''}"
        f"{_OLD_NOTE if len(told) < len(timed) else ''}{controls_note(evaluations)}"
    ).strip()
    return Section("Time per policy query", blocks, note)


def _percentile_table(label: str, times: QueryTimes) -> Table:
    rows = [_percentile_row(name, values) for name, values in times.stages.items()]
    totals = [_percentile_row("the policy's own time" if times.waiting.size else "including waiting", times.whole)]
    if times.waiting.size:
        totals.append(_percentile_row(WAITING, times.waiting))
    columns = ("stage", *(f"p{percentile}" for percentile in PERCENTILES), "mean")
    recorded = len(times.stages[times.rest]) if times.stages else 0
    note = f"{counted(times.whole.size, 'policy query')}."
    if recorded:
        note += " Percentiles of the stages do not add up to those of the whole; means do."
    if recorded < times.whole.size:
        note += f" The stages of {counted(times.whole.size - recorded, 'query')} were not recorded."
    return Table(f"Percentiles of {label}", columns, rows, note, totals=totals)


def _percentile_row(name: str, values: NDArray[np.float64]) -> tuple[str, ...]:
    return (name, *(f"{number:.1f}" for number in (*np.percentile(values, PERCENTILES), values.mean())))
