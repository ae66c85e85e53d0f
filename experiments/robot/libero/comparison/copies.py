"""Rollouts that tell nothing new: the same one given twice, and what another seed merely repeated.

A rollout is a copy of another one where both began at the same scene and all executed actions are equal to the last
bit. A seed moves the fixtures of some tasks and is the source of a policy's random choices; where a task samples no
fixture (all of libero_object; libero_10's tasks 0, 1, 4, 6 and 7) and the policy is deterministic it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.robot.libero.comparison.pairing import StartIdentity, Tried
from experiments.robot.libero.results.results import EpisodeRecord, Results
from prismatic.report.data import counted

SEEDS_ARE_NO_TRIALS = (
    "Rollouts from one initial state with several seeds are one trial, by their mean: a seed moves the fixtures of "
    "some tasks at most."
)
"""The note of every table that holds several seeds."""


def without_copies(results: Sequence[Results], name: str) -> tuple[list[Results], list[str]]:
    """A policy's results with each rollout once, and what to say of those that were left out.

    Broken off rollouts are the same where they began alike, say the same and took equally long. Results of which
    nothing is left are left out too.
    """
    seen: dict[tuple[Any, ...], StartIdentity] = {}
    found, twice, repeated, total = [], 0, 0, 0
    for result in results:
        kept = []
        for episode in result.episodes:
            start, ran = StartIdentity.of(episode, result), _ran(episode)
            total += 1
            if ran and (before := seen.get((start.scene, ran))) is not None:
                twice, repeated = twice + (before == start), repeated + (before != start)
                continue
            seen[start.scene, ran] = start
            kept.append(episode)
        if kept or not result.episodes:
            found.append(replace(result, episodes=kept))
    notes = [f"{name}: {given_twice(twice)}"] if twice else []
    return found, notes + ([f"{name}: {repeated_by_seeds(repeated, total)}"] if repeated else [])


def without_other_names(
    policies: Mapping[str, Sequence[Results]],
) -> tuple[dict[str, list[Results]], list[str]]:
    """Policies without evaluations all of whose rollouts an earlier name has too, and what to say of these."""
    owners: dict[tuple[StartIdentity, str], str] = {}
    found: dict[str, list[Results]] = {}
    lost: dict[tuple[str, str], int] = {}
    for name, results in policies.items():
        found[name] = []
        for result in results:
            rollouts = [
                (StartIdentity.of(e, result), e.actions_sha256) for e in result.episodes if e.actions_sha256 is not None
            ]
            others = {owners.get(rollout, name) for rollout in rollouts}
            if rollouts and name not in others:
                for other in others:
                    lost[name, other] = lost.get((name, other), 0) + sum(owners[r] == other for r in rollouts)
                continue
            found[name].append(result)
        for result in found[name]:
            for episode in result.episodes:
                if episode.actions_sha256 is not None:
                    owners.setdefault((StartIdentity.of(episode, result), episode.actions_sha256), name)
    return found, [
        f"{name}: {counted(number, 'rollout')} are copies of those of {other} (equal episodes, seeds and actions) and "
        "are left out"
        for (name, other), number in lost.items()
    ]


def distinct_pairs(
    starts: Sequence[StartIdentity], sides: Sequence[Mapping[StartIdentity, Tried]], names: tuple[str, str]
) -> tuple[list[StartIdentity], list[str]]:
    """Of the starts that two policies have in common those that tell something new, and what to say of the others.

    An evaluation that acted like the other side's on all their common starts is a copy of it. Where only some are
    alike, both policies chose the same actions there, which counts.
    """
    alike: dict[tuple[int, int], list[bool]] = {}
    for start in starts:
        pair = [side[start] for side in sides]
        hashes = {tried.episode.actions_sha256 for tried in pair}
        alike.setdefault((pair[0].evaluation, pair[1].evaluation), []).append(len(hashes) == 1 and None not in hashes)
    copies = {group for group, equal in alike.items() if all(equal)}
    some = sum(sum(equal) for group, equal in alike.items() if group not in copies)
    found, seen, repeated = [], set(), 0
    own = [start for start in starts if tuple(side[start].evaluation for side in sides) not in copies]
    for start in own:
        ran = tuple(side[start].episode.actions_sha256 for side in sides)
        if None not in ran and (start.scene, ran) in seen:
            repeated += 1
            continue
        seen.add((start.scene, ran))
        found.append(start)
    notes = []
    if copied := len(starts) - len(own):
        notes.append(
            f"{names[0]} and {names[1]} have the same rollouts of {counted(copied, 'episode')} (equal seeds and "
            "actions), one a copy of the other; these are left out"
        )
    if some:
        notes.append(f"{names[0]} and {names[1]} took the very same actions on {counted(some, 'episode')}")
    return found, notes + ([f"{names[0]} and {names[1]}: {repeated_by_seeds(repeated, len(own))}"] if repeated else [])


def given_twice(number: int) -> str:
    return f"{counted(number, 'rollout')} were given twice (equal episodes, seeds and actions) and count once"


def repeated_by_seeds(number: int, total: int) -> str:
    return (
        f"with another seed {number} of {counted(total, 'rollout')} only repeat one of the same initial state, action "
        "for action (the task samples no fixture); they count once"
    )


def _ran(episode: EpisodeRecord) -> Any:
    """What makes two rollouts of one start the same; empty where nothing is recorded that could."""
    return episode.actions_sha256 or (episode.invalid and (episode.invalid, episode.wall_seconds))
