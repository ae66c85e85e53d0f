"""Two policies on identical episodes: which outcomes pair, how far apart the two are, and whether that is chance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.robot.libero.comparison.caveats import (
    Side,
    cut_short,
    evaluation_warnings,
    mixed_perturbations,
    protocol_differences,
)
from experiments.robot.libero.comparison.copies import distinct_pairs, given_twice
from experiments.robot.libero.comparison.outcomes import PairedOutcome, paired_outcome
from experiments.robot.libero.comparison.pairing import (
    StartIdentity,
    by_start,
    task_differences,
    unhashed_tasks,
    unrecorded_files,
    why_nothing_pairs,
)
from experiments.robot.libero.results.measures import motion_sentence
from experiments.robot.libero.results.results import EpisodeRecord, Results
from prismatic.report.data import counted
from prismatic.significance import (
    Interval,
    holm,
    mcnemar_exact,
    paired_detectable,
    paired_trials,
    unpaired_detectable,
    unpaired_trials,
)

ALPHA = 0.05
"""Two-sided level of every verdict."""

AVERAGE = "average of suites"

_ASKED_FOR = 0.05  # A difference worth planning for where the measured one is next to nothing.
_FEWEST = math.ceil(math.log2(2 / ALPHA))  # Episodes that must all fall to one side for McNemar's test to tell.


@dataclass(frozen=True)
class Pairing:
    """Which episodes two sets of results have in common.

    Args:
        both: Episodes that both have.
        only: Episodes that only the first and only the second has.
        invalid: Of the common episodes, those whose rollout is invalid in the first and in the second.
        counted: Common episodes that are valid in both and no copies of others; all counts are about these.
    """

    both: int
    only: tuple[int, int]
    invalid: tuple[int, int]
    counted: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Args:
        names: Of the two policies.
        tasks: One outcome per task.
        suites: One outcome per suite.
        overall: The average over suites; the suite itself when there is one.
        warnings: Why the difference may come from something else than the policies.
        seeds: Of the simulator, on the most-tried initial state of all that both have.
        motion: How fast and how smoothly both solved what both solved, in a sentence; empty without such an episode.
    """

    names: tuple[str, str]
    pairing: Pairing
    tasks: tuple[PairedOutcome, ...]
    suites: tuple[PairedOutcome, ...]
    overall: PairedOutcome
    warnings: tuple[str, ...]
    seeds: int = 1
    motion: str = ""

    @property
    def distinguishable(self) -> bool:
        """Whether chance alone would rarely (at level `ALPHA`, by McNemar's test) part the policies so far."""
        counts = self.overall.states
        agree = (counts.only_first - counts.only_second) * self.overall.difference > 0
        return self.overall.p_value < ALPHA and agree

    @property
    def verdict(self) -> str:
        """A few plain sentences."""
        overall, (first, second) = self.overall, self.names
        if self.distinguishable:
            better, worse = (first, second) if overall.difference > 0 else (second, first)
            low, high = overall.interval
            ends = Interval(low, high) if overall.difference > 0 else Interval(-high, -low)
            sentence = (
                f"{better} is better than {worse}: {points(abs(overall.difference))} points, "
                f"95 % interval {span(ends, signed=True)}, {p_equation(overall.p_value)}."
            )
            if not ends.low > 0:
                sentence += (
                    " That holds for these tasks taken together; it is uneven among them, and the interval, which "
                    "allows for other tasks, includes 0."
                )
            return sentence
        averaged = f" on average over {'suites' if self.suites[1:] else 'tasks'}," if overall.uneven else ""
        return (
            f"{first} and {second} are not distinguishable: {percent(overall.rates[0])} and "
            f"{percent(overall.rates[1])}{averaged} of the same {_tried(overall)} "
            f"({points(overall.difference)} "
            f"points, 95 % interval {span(overall.interval, signed=True)}, {p_equation(overall.p_value)}). "
            f"{self._contradiction()}{self._power()}"
        )

    def _contradiction(self) -> str:
        """Why there is no verdict where the interval or p taken alone suggests one; empty where neither does."""
        counts, (low, high), (first, second) = self.overall.states, self.overall.interval, self.names
        if self.overall.p_value < ALPHA:
            ahead = first if counts.only_first > counts.only_second else second
            return (
                f"p is small because more {self._trials} fell to {ahead}, but averaged over tasks {ahead} is not "
                "ahead. "
            )
        if low <= 0 <= high:
            return ""
        if self.overall.repeated:
            return "The interval excludes 0, but the verdict goes by the test, which counts initial states exactly. "
        differ = int(counts.discordant)
        enough = next((n for n in range(differ // 2, differ + 1) if mcnemar_exact(n, differ - n) < ALPHA), None)
        remedy = f"{enough} of {differ} on one side would be" if enough else f"fewer than {_FEWEST} never are"
        return (
            f"The interval excludes 0, but the verdict goes by the test. It counts only the "
            f"{counted(differ, 'episode')} on which the two differ, and {counts.only_first} for {first} with "
            f"{counts.only_second} for {second} are not enough for it ({remedy}). "
        )

    def _power(self) -> str:
        """How many episodes the measured difference would take, and which difference takes as many as there are."""
        counts, gap = self.overall.states, abs(self.overall.difference)
        share = float(counts.discordant / counts.trials)
        measured = gap >= 0.005
        wanted = gap if measured else _ASKED_FOR
        needed = round_up(paired_trials(wanted, max(wanted, share)))
        sentence = (
            f"Were the true difference {100 * wanted:.1f} points{', as measured' * measured}, four of five evaluations "
            f"with about {needed} {self._trials} each would tell the two apart (80 % power); with "
            f"{counted(self.overall.trials, self._trials[:-1])}, as here,"
        )
        try:
            seen = paired_detectable(self.overall.trials, share)
        except ValueError:
            return f"{sentence} no difference is large enough for that."
        return f"{sentence} that takes a true difference of about {100 * seen:.0f} points."

    @property
    def _trials(self) -> str:
        """What a trial is called."""
        return "initial states" if self.overall.repeated else "episodes"

    def plan(self, difference: float) -> list[str]:
        """Trials that a difference (in (0, 1)) takes, at the share of episodes on which these two policies differ."""
        states, counts = self.overall.states, self.overall.counts
        share = float(states.discordant / states.trials)
        needed = round_up(paired_trials(difference, max(share, difference)))
        first, second = self.names
        each = f", {math.ceil(needed / len(self.tasks))} for each of {len(self.tasks)} tasks" if self.tasks[1:] else ""
        line = (
            f"To see a difference of {100 * difference:g} points: about {needed} trials per policy{each}, both on the "
            f"same {self._trials} ({first} and {second} differ on {percent(share)} of them)."
        )
        rate = float(self.overall.solved[0] / counts.trials)
        return [line] + plan_unpaired(self.names[0], rate, self.overall.trials, difference)


def compare(
    first: Sequence[Results], second: Sequence[Results], names: tuple[str, str] = ("first", "second"), seed: int = 0
) -> Comparison:
    """Pair the rollouts of two policies on identical episodes.

    Args:
        first, second: Results of each policy, in any number of files (one per seed or suite, say).
        seed: Of the bootstrap.

    Raises:
        ValueError: when a policy has an episode twice, no episode is valid in both, naming what differs, or all
            rollouts of both are the same.
    """
    unhashed = unhashed_tasks([*first, *second])
    pair = list(zip((first, second), names, strict=True))
    sides, twice = zip(*(by_start(results, name, unhashed) for results, name in pair), strict=True)
    common = [start for start in sides[0] if start in sides[1]]
    if not common:
        raise ValueError(why_nothing_pairs(sides[0], sides[1], names))
    episodes = [{start: tried.episode for start, tried in side.items()} for side in sides]
    invalid = tuple(sum(side[start].success is None for start in common) for side in episodes)
    valid = [start for start in common if all(side[start].success is not None for side in episodes)]
    if not valid:
        raise ValueError(
            f"{names[0]} and {names[1]} have {counted(len(common), 'episode')} in common, and each is invalid (a "
            "simulator error) in at least one of them; evaluate these again"
        )
    kept, copies = distinct_pairs(valid, sides, names)
    if not kept:
        raise ValueError(
            f"{names[0]} and {names[1]} are the same rollouts: in all {counted(len(valid), 'episode')} that both have "
            "every action is equal; give each policy's own results"
        )
    tasks = _outcomes(kept, episodes)
    names_of = {(s.suite, s.task_index): episodes[0][s].task_name.replace("_", " ") for s in kept}
    rows = [paired_outcome(task[0], names_of[task], [[of_task]], seed) for task, of_task in tasks.items()]
    corrected = holm([row.p_value for row in rows])
    by_suite = {suite: [of_task for task, of_task in tasks.items() if task[0] == suite] for suite, _ in tasks}
    suites = [paired_outcome(suite, suite, [group], seed) for suite, group in by_suite.items()]
    return Comparison(
        names=names,
        pairing=Pairing(
            len(common),
            (len(sides[0]) - len(common), len(sides[1]) - len(common)),
            (invalid[0], invalid[1]),
            len(kept),
        ),
        tasks=tuple(replace(row, corrected_p=p) for row, p in zip(rows, corrected, strict=True)),
        suites=tuple(suites),
        overall=suites[0] if len(suites) == 1 else paired_outcome("", AVERAGE, list(by_suite.values()), seed),
        warnings=(
            *_warnings([(name, results) for results, name in pair], by_suite, kept),
            *task_differences(sides, unhashed, names),
            *(f"{name}: {given_twice(number)}" for name, number in zip(names, twice, strict=True) if number),
            *copies,
        ),
        seeds=max(Counter(start.scene for start in valid).values()),
        motion=motion_sentence([(episodes[0][start], episodes[1][start]) for start in kept], names),
    )


def _outcomes(
    starts: Sequence[StartIdentity], episodes: Sequence[Mapping[StartIdentity, EpisodeRecord]]
) -> dict[tuple[str, int], list[list[tuple[bool, bool]]]]:
    """(Suite, task) -> per initial state the successes of both policies, one pair per rollout from it."""
    scenes: dict[tuple[str, int], dict[StartIdentity, list[tuple[bool, bool]]]] = {}
    for start in starts:
        pairs = scenes.setdefault((start.suite, start.task_index), {}).setdefault(start.scene, [])
        pairs.append((bool(episodes[0][start].success), bool(episodes[1][start].success)))
    return {task: list(scenes[task].values()) for task in sorted(scenes)}


def plan_unpaired(name: str, rate: float, trials: int, difference: float) -> list[str]:
    """What it takes to tell a policy with this success rate from another one on unrelated episodes."""
    other = rate - difference if rate > 0.5 else rate + difference
    if not 0.0 <= other <= 1.0:
        return [f"No policy is {100 * difference:g} points away from {name}, which solves {percent(rate)}."]
    needed = round_up(unpaired_trials(rate, other))
    line = (
        f"{name} solves {percent(rate)}; another policy {100 * difference:g} points away is distinguished from it by "
        f"about {needed} trials per policy on unrelated episodes"
    )
    try:
        seen = unpaired_detectable(trials, rate)
    except ValueError:
        return [f"{line}; with {trials}, as here, no difference is large enough to be detected."]
    return [f"{line}; with {trials}, as here, only a difference of about {100 * seen:.0f} points is detected."]


def _tried(outcome: PairedOutcome) -> str:
    """`36 episodes`, `36 initial states (108 episodes, with several seeds)`."""
    episodes = counted(int(outcome.counts.trials), "episode")
    return (
        f"{counted(outcome.trials, 'initial state')} ({episodes}, with several seeds)" if outcome.repeated else episodes
    )


def percent(share: float) -> str:
    """0.611 -> `61.1 %`."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of rates in percentage points, with its sign: 0.0556 -> `+5.6`."""
    rounded = round(round(100 * difference, 6), 1)  # -0.2125 is -21.2 however it was added up
    return f"{rounded:+.1f}" if rounded else "0.0"


def span(ends: Interval, signed: bool = False) -> str:
    """An interval in percent, or with its signs one of differences in points: `65.1 to 98.5`, `+19.6 to +80.9`."""
    return " to ".join(points(end) if signed else f"{100 * end:.1f}" for end in ends)


def p_equation(p_value: float) -> str:
    """`p = 0.031`, `p < 0.001`."""
    return f"p {p_text(p_value) if p_value < 0.001 else '= ' + p_text(p_value)}"


def p_text(p_value: float) -> str:
    """`0.031`, `< 0.001`; never rounded onto the level of a verdict: `0.0496`."""
    if p_value < 0.001:
        return "< 0.001"
    decimals = 3 if p_value < 0.1 else 2
    while p_value != ALPHA and float(f"{p_value:.{decimals}f}") == ALPHA and decimals < 17:
        decimals += 1
    return f"{p_value:.{decimals}f}"


def round_up(count: int) -> int:
    """To two leading digits, upwards: planned numbers are no more exact than that."""
    scale = 10 ** max(0, int(math.log10(count)) - 1)
    return math.ceil(count / scale) * scale


def _warnings(sides: Sequence[Side], suites: Collection[str], starts: Collection[StartIdentity]) -> list[str]:
    """Why the difference may come from something else than the policies."""
    return [
        *protocol_differences(sides, suites),
        *cut_short(sides),
        *evaluation_warnings(sides),
        *mixed_perturbations(suites),
        *unrecorded_files(starts),
    ]
