"""The tables and charts of the report, and what a row of them means in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from experiments.robot.libero.comparison.compare import ALPHA, p_equation, p_text, points, span
from experiments.robot.libero.looks.classes import CLASSES
from experiments.robot.libero.looks.counts import Counts, Rollout
from experiments.robot.libero.looks.figures import STAYS_POINTS, Against, Blanked, Take, against_chance
from experiments.robot.libero.looks.phases import AT_GOAL_M, PHASES, Carried
from experiments.robot.libero.looks.shares import ALL_BACKGROUND, LIES_ON
from prismatic.report.charts import StackedBars
from prismatic.report.data import Cell, Row, Table, share_cell

WORDS = {
    "target": "what is moved",
    "goal": "where it goes",
    "gripper": "fingers and hand",
    "arm": "the rest of the robot",
    "distractors": "other objects and fixtures",
    "background": "table, floor, walls",
}
BLANKED_WORDS = {
    "target": f"on the target, at least {100 * LIES_ON:.0f} % of the patch",
    "goal": f"on the goal, at least {100 * LIES_ON:.0f} % of the patch",
    "background": f"on background alone, at least {100 * ALL_BACKGROUND:.0f} % of the patch",
    "random": "as many others as lie on the target, at random",
    "all": "wherever they lie",
    "hidden": "nothing, but the target is left out of the pictures",
}


def of_camera(camera: str) -> Take:
    return lambda rollout: rollout.counts(cameras=[camera])


def composition(rollouts: Sequence[Rollout], taken: Mapping[str, Take], title: str) -> StackedBars:
    """A pair of bars for each way of taking: classes of the kept tokens, and of as many by chance."""
    parts: dict[str, list[float]] = {kind: [] for kind in CLASSES}
    names: list[str] = []
    for name, take in taken.items():
        total = Counts.total(map(take, rollouts))
        if total.kept:
            names += [f"{name}, kept", f"{name}, by chance"]
            for kind in CLASSES:
                parts[kind] += [100 * counts[kind] / total.kept for counts in (total.on, total.chance)]
    return StackedBars(title, names, parts, "% of tokens")


def class_table(rollouts: Sequence[Rollout], take: Take, title: str) -> Table:
    """Every class: share of the kept tokens, chance, and the ratio of both."""
    rows: list[Row] = []
    for kind in CLASSES:
        found = against_chance(rollouts, take, kind)
        if found is None:
            continue
        rows.append((
            Cell(kind, note=WORDS[kind]),
            Cell(_percent(found), sort=found.share),
            f"{100 * found.chance:.1f}",
            Cell(_ratio(found), sort=-1.0 if found.ratio is None else found.ratio),
            f"{100 * found.majority:.1f}",
        ))  # fmt: skip
    columns = ("class", "% of kept tokens (95 %)", "% by chance", "times chance (95 %)", "% by majority")
    return Table(title, columns, rows, sortable=True)


def _percent(found: Against) -> str:
    low_high = found.share_interval
    return f"{100 * found.share:.1f}" + (f" ({span(low_high)})" if low_high else "")


def _ratio(found: Against) -> str:
    if found.ratio is None:
        return "–"
    ends = found.ratio_interval
    return f"{found.ratio:.2f}" + (f" ({ends.low:.2f} to {ends.high:.2f})" if ends else "")


def phase_table(rollouts: Sequence[Rollout], title: str) -> Table:
    """Every class by phase, in all cameras: share of the kept tokens and times chance."""
    queries = [sum(r.counts(phases=[phase]).queries for r in rollouts) // max(1, _number(rollouts)) for phase in PHASES]
    shown = [phase for phase, number in zip(PHASES, queries, strict=True) if number]
    rows: list[Row] = []
    for kind in CLASSES:
        cells: list[str | Cell] = [kind]
        for phase in shown:
            found = against_chance(rollouts, _of_phase(phase), kind)
            text = "–" if found is None else f"{100 * found.share:.1f} % · {_ratio(found)}"
            cells.append(text)
        rows.append(cells)
    per_query = [
        f"{sum(r.counts(phases=[p]).kept for r in rollouts) / number:.1f}"
        for p, number in zip(PHASES, queries, strict=True)
        if number
    ]
    totals: list[Row] = [
        ("tokens kept per query", *per_query),
        ("policy queries", *(str(number) for number in queries if number)),
    ]
    return Table(title, ("class", *shown), rows, totals=totals)


def phase_bars(rollouts: Sequence[Rollout]) -> StackedBars:
    taken: dict[str, Take] = {phase: _of_phase(phase) for phase in PHASES}
    return composition(rollouts, taken, "Kept tokens by phase, all cameras")


def _of_phase(phase: str) -> Take:
    return lambda rollout: rollout.counts(phases=[phase])


def _number(rollouts: Sequence[Rollout]) -> int:
    """Cameras: each counts every query."""
    return max((len(rollout.of) for rollout in rollouts), default=1)


def far_table(rollouts: Sequence[Rollout]) -> Table | None:
    """How far the rollouts came with what they carry; None where nothing is carried, or it was not noted."""
    rows: list[Row] = []
    for name, found in _carried(rollouts):
        failed = [each for each, success in found if not success]
        lifted = [each for each in failed if each.apart is not None]
        let_go = [each for each in lifted if not each.at_end]
        near = sum(each.distance <= AT_GOAL_M for each in let_go)
        rows.append((
            name,
            f"{len(found) - len(failed)} of {len(found)}",
            str(sum(not each.held for each in failed)),
            str(sum(each.held and each.apart is None for each in failed)),
            str(len(let_go) - near),
            str(near),
            str(len(lifted) - len(let_go)),
        ))  # fmt: skip
    columns = (
        "what and where to", "solved", "not solved: never held", "held, never lifted",
        f"let go over {_CM:g} cm from the goal", f"let go within {_CM:g} cm", "still held",
    )  # fmt: skip
    return Table("How far the rollouts came", columns, rows) if rows else None


def put_table(rollouts: Sequence[Rollout]) -> Table | None:
    """Where what came near its goal was held last; None where nothing did."""
    rows: list[Row] = []
    for name, found in _carried(rollouts):
        near = [(each, success) for each, success in found if each.distance <= AT_GOAL_M]
        if not near:
            continue
        x, y = 100 * np.array([each.apart for each, _ in near]).T
        distances = [100 * each.distance for each, _ in near]
        missed = [100 * each.distance for each, success in near if not success]
        rows.append((
            name,
            str(len(near)),
            f"{x.mean():+.1f} ({x.std():.1f})",
            f"{y.mean():+.1f} ({y.std():.1f})",
            f"{np.median(distances):.1f}",
            f"{np.median(missed):.1f}" if missed else "–",
        ))  # fmt: skip
    columns = (
        "what and where to", "rollouts", "x: mean (standard deviation), cm", "y: mean (standard deviation), cm",
        "distance: median, cm", "of those not solved",
    )  # fmt: skip
    return Table(f"Where it was held last, when within {_CM:g} cm of the goal", columns, rows) if rows else None


_CM = 100 * AT_GOAL_M


def _carried(rollouts: Sequence[Rollout]) -> Iterator[tuple[str, list[tuple[Carried, bool]]]]:
    """By what is carried and where to: how far it came, and whether the rollout succeeded."""
    found: dict[str, list[tuple[Carried, bool]]] = {}
    for rollout in rollouts:
        if not rollout.carried:  # of a file of before it was noted
            continue
        for (target, goal), carried in zip(rollout.names, rollout.carried, strict=True):
            if carried is not None:
                found.setdefault(f"{target} to {goal}", []).append((carried, rollout.success))
    yield from found.items()


def blanked_table(rollouts: Sequence[Rollout], compared: Sequence[Blanked]) -> Table:
    """Success with and without what was blanked, on the same starts."""
    kept = sum(r.kept for r in rollouts) / sum(r.queries for r in rollouts)
    solved = share_cell(sum(r.success for r in rollouts), len(rollouts))
    rows: list[Row] = [("nothing", f"0 of {kept:.1f}", solved, "", "", "", "")]
    for each in compared:
        counts = each.counts
        rows.append((
            Cell(each.condition, note=BLANKED_WORDS[each.condition]),
            f"{each.tokens:.1f} of {each.kept:.1f}",
            share_cell(int(counts.both + counts.only_first), int(counts.trials)),
            Cell(points(each.difference), sort=each.difference),
            span(each.interval, signed=True),
            f"{counts.both}/{counts.only_first}/{counts.only_second}/{counts.neither}",
            p_text(each.corrected_p),
        ))  # fmt: skip
    columns = (
        "blanked", "tokens per query", "solved", "points", "95 % interval", "both/blanked only/unblanked only/neither",
        "p (Holm)",
    )  # fmt: skip
    return Table("Success with blanked tokens", columns, rows)


def sentence(each: Blanked) -> str:
    """What a row of the table means."""
    numbers = (
        f"{points(each.difference)} points, 95 % interval {span(each.interval, signed=True)}, "
        f"{p_equation(each.corrected_p)}; {each.tokens:.1f} of {each.kept:.1f} kept tokens per query"
    )
    what = f"Kept tokens blanked {BLANKED_WORDS[each.condition].partition(',')[0]}"
    if each.condition == "random":
        what = "As many random others blanked as lie on the target"
    if each.condition == "hidden":
        what = "The target left out of the pictures"
    if not each.tokens and each.condition != "hidden":
        return f"{what}: none was kept there, so nothing can be said."
    if not each.counts.both + each.counts.only_second:
        return f"{what}: the policy solved nothing unblanked, so nothing can be said ({numbers})."
    if each.falls:
        return f"{what}: success falls ({numbers}). {_used(each)}."
    if each.stays:
        spared = (
            "It can do without seeing it" if each.condition == "hidden" else "The policy can do without their content"
        )
        sinks = " If it needs these tokens, then as sinks of attention." if each.condition == "background" else ""
        return f"{what}: success stays ({numbers}). {spared}.{sinks}"
    return f"{what}: neither is shown, that success falls or that it stays within {STAYS_POINTS:g} points ({numbers})."


def _used(each: Blanked) -> str:
    """What a fall of success means: a mean token is none that the policy was trained with, so it may disturb."""
    if each.condition == "hidden":
        return "It has to see it"
    if each.condition == "random":
        return "A mean token in their place disturbs it, or they were needed, too"
    if each.condition != "target":
        return "The policy uses what these tokens show, or is disturbed by mean tokens in their place"
    if each.beyond_random is None:
        return "Whether it uses what they show, or is disturbed by mean tokens, `--blank random` would tell"
    difference, p_value = each.beyond_random
    numbers = f"{points(difference)} points against as many random others, {p_equation(p_value)}"
    if difference < 0 and p_value < ALPHA:
        return f"The policy uses what these tokens show ({numbers})"
    return f"Whether it uses what they show, or is disturbed by mean tokens, is not told ({numbers})"
