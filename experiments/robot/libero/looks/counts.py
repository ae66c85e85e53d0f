"""Counts of one rollout: what kept tokens lay on, and what as many tokens anywhere would have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from experiments.robot.libero.looks.classes import CLASSES
from experiments.robot.libero.looks.phases import PHASES, Carried
from experiments.robot.libero.looks.seen import Seen, carried_from
from experiments.robot.libero.looks.shares import shares_of
from experiments.robot.libero.results.results import EpisodeRecord

_DIGITS = 6


@dataclass
class Counts:
    """Of some policy queries; sums of these are of all of them together.

    Attributes:
        queries: of the policy.
        kept: tokens, over all queries.
        tokens: all of them, kept or not.
        on: per class, kept tokens by the shares of their patches' pixels; they sum to `kept`.
        chance: per class, what as many tokens per query, drawn from all, lie on in the mean; sums to `kept` too.
        majority: per class, kept tokens on most of whose patch it is.
    """

    queries: int = 0
    kept: int = 0
    tokens: int = 0
    on: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    chance: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0.0))
    majority: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.queries + other.queries,
            self.kept + other.kept,
            self.tokens + other.tokens,
            {kind: self.on[kind] + other.on[kind] for kind in CLASSES},
            {kind: self.chance[kind] + other.chance[kind] for kind in CLASSES},
            {kind: self.majority[kind] + other.majority[kind] for kind in CLASSES},
        )

    @staticmethod
    def total(parts: Iterable[Counts]) -> Counts:
        return sum(parts, Counts())


@dataclass
class Rollout:
    """What `looks.json` keeps of a rollout.

    Attributes:
        condition: `unblanked`, or what was blanked.
        round: which one from this initial state, with other displacements.
        blanked: tokens, over all queries.
        of: per camera and phase, without those phases that did not come.
        carried: per predicate of the goal, as `names`; empty in files of before it was noted.
    """

    condition: str
    suite: str
    task: int
    task_name: str
    instruction: str
    names: list[tuple[str, str]]
    state: int
    round: int
    success: bool
    steps: int
    queries: int
    kept: int
    blanked: int
    of: dict[str, dict[str, Counts]]
    carried: list[Carried | None] = field(default_factory=list)

    @property
    def start(self) -> tuple[str, int, int, int]:
        """What pairs rollouts of two conditions."""
        return self.suite, self.task, self.state, self.round

    def counts(self, cameras: Sequence[str] | None = None, phases: Sequence[str] | None = None) -> Counts:
        """Of some cameras and phases; None: of all."""
        return Counts.total(
            counts
            for camera, by_phase in self.of.items()
            for phase, counts in by_phase.items()
            if (cameras is None or camera in cameras) and (phases is None or phase in phases)
        )

    def to_json(self) -> dict[str, Any]:
        """With sums rounded to six digits."""
        content = dict(vars(self))
        content["of"] = {
            camera: {phase: _rounded(counts) for phase, counts in by_phase.items()}
            for camera, by_phase in self.of.items()
        }
        content["carried"] = [each and asdict(each) for each in self.carried]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Rollout:
        of = {
            camera: {phase: Counts(**counts) for phase, counts in by_phase.items()}
            for camera, by_phase in content["of"].items()
        }
        names = [(target, goal) for target, goal in content["names"]]
        carried = carried_from(content.get("carried", []))
        return cls(**{**content, "names": names, "of": of, "carried": carried})


def _rounded(counts: Counts) -> dict[str, Any]:
    content = dict(vars(counts))
    for name in ("on", "chance"):
        content[name] = {kind: round(value, _DIGITS) for kind, value in content[name].items()}
    return content


def count(record: EpisodeRecord, seen: Seen, condition: str) -> Rollout:
    """The counts of one rollout."""
    shares, kept = seen.per_camera(shares_of(seen.pixels)), seen.per_camera(seen.kept)
    majority = shares.argmax(axis=-1)
    of: dict[str, dict[str, Counts]] = {}
    for number, camera in enumerate(seen.cameras):
        for phase, name in enumerate(PHASES):
            queries = np.flatnonzero(seen.phases == phase)
            if len(queries):
                here = kept[number, queries], shares[number, queries], majority[number, queries]
                of.setdefault(camera, {})[name] = _counts(*here)
    return Rollout(
        condition=condition,
        suite=record.suite,
        task=record.task_index,
        task_name=record.task_name,
        instruction=record.instruction,
        names=seen.names,
        state=record.initial_state,
        round=record.key[-1],
        success=bool(record.success),
        steps=record.steps,
        queries=len(seen.steps),
        kept=int(seen.kept.sum()),
        blanked=int(seen.blanked.sum()),
        of=of,
        carried=seen.carried,
    )


def _counts(kept: np.ndarray, shares: np.ndarray, majority: np.ndarray) -> Counts:
    """Of (L, V) kept tokens, (L, V, classes) shares and (L, V) classes of most pixels."""
    on = (kept[..., None] * shares).sum(axis=(0, 1))
    chance = (kept.sum(axis=1)[:, None] * shares.mean(axis=1)).sum(axis=0)
    most = np.bincount(majority[kept], minlength=len(CLASSES))
    return Counts(
        queries=len(kept),
        kept=int(kept.sum()),
        tokens=int(kept.size),
        on=dict(zip(CLASSES, on.tolist(), strict=True)),
        chance=dict(zip(CLASSES, chance.tolist(), strict=True)),
        majority=dict(zip(CLASSES, most.tolist(), strict=True)),
    )
