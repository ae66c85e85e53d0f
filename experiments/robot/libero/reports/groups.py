"""Evaluations that belong together: one policy under the same conditions, in other suites, seeds or initial states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.robot.libero.comparison.copies import without_copies
from experiments.robot.libero.comparison.pairing import StartIdentity
from experiments.robot.libero.reports.evaluation import Evaluation
from experiments.robot.libero.results.naming import policy_names
from experiments.robot.libero.results.results import Results

_CONDITIONS = ("wide_starts_m", "num_open_loop_steps", "renderer", "env_img_res", "num_steps_wait", "protocol")
"""Flags that evaluations of a group have in common, beside the policy, its pruner and the control."""


@dataclass(frozen=True)
class Group:
    """Evaluations that are shown as one.

    Args:
        whole: All their rollouts under one name, each once.
        parts: The evaluations.
        notes: What must be said of rollouts that were left out, because another seed only repeated them.
    """

    whole: Evaluation
    parts: tuple[Evaluation, ...]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def results(self) -> list[Results]:
        return [part.results for part in self.parts]

    @property
    def paths(self) -> list[str]:
        """The results as a command names them."""
        return [part.path or str(part.folder) for part in self.parts]


def group_evaluations(evaluations: Sequence[Evaluation]) -> list[Group]:
    """One group per policy and conditions, in the order given.

    Evaluations of the same rollouts (equal task, initial state, seed) are never put together: they are there to be
    compared, or are copies.
    """
    names = policy_names([evaluation.results for evaluation in evaluations])
    groups: list[tuple[Any, set[StartIdentity], list[Evaluation]]] = []
    for evaluation, name in zip(evaluations, names, strict=True):
        config, starts = evaluation.results.config, _starts(evaluation)
        key = (name, evaluation.results.versions.get("mujoco"), *(config.get(flag) for flag in _CONDITIONS))
        for own, taken, members in groups:
            if own == key and not taken & starts:
                members.append(evaluation)
                taken |= starts
                break
        else:
            groups.append((key, set(starts), [evaluation]))
    titles = [str(key[0]) if members[1:] else members[0].name for key, _, members in groups]
    titles = [
        title if titles.count(title) == 1 else f"{title}, {titles[: place + 1].count(title)}"
        for place, title in enumerate(titles)
    ]
    return [_group(title, members) for title, (_, _, members) in zip(titles, groups, strict=True)]


def _starts(evaluation: Evaluation) -> set[StartIdentity]:
    return {StartIdentity.of(episode, evaluation.results) for episode in evaluation.results.episodes}


def _group(name: str, parts: Sequence[Evaluation]) -> Group:
    if len(parts) == 1:
        return Group(parts[0], tuple(parts))
    distinct, notes = without_copies([part.results for part in parts], name)
    first = parts[0].results
    seconds = [part.results.run.get("seconds") for part in parts]
    whole = replace(
        first,
        run={
            **first.run,
            "complete": all(part.complete for part in parts),
            "seconds": None if None in seconds else sum(seconds),
        },
        config={**first.config, "task_suite_name": ", ".join(suites(parts))},
        episodes=[episode for result in distinct for episode in result.episodes],
    )
    return Group(Evaluation(name, whole, parts[0].folder), tuple(parts), tuple(notes))


def suites(evaluations: Sequence[Evaluation]) -> list[str]:
    """Of the rollouts, in order; where there is none yet what was asked for."""
    found = [episode.suite for evaluation in evaluations for episode in evaluation.results.episodes]
    asked = [str(evaluation.results.config.get("task_suite_name", "unknown suite")) for evaluation in evaluations]
    return list(dict.fromkeys(found or ",".join(asked).split(",")))
