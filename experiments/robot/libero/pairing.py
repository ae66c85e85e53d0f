"""Which rollouts of two policies began alike: the same task by its files, the same start, the same draw."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from experiments.robot.libero.caveats import recorded_protocol
from experiments.robot.libero.results import EpisodeRecord, Results

_TASKS_OWN = "DEFAULT"  # The flag's word for LIBERO's initial states.
_DIGEST = "SHA-256"


class StartIdentity(NamedTuple):
    """Everything that makes two rollouts begin alike.

    `description` and `own_states` are hashes of the task's BDDL file and of its initial states; empty where they do not
    count: the latter where a file gives the states, both where one of the two results does not record them.
    """

    suite: str
    task_index: int
    initial_state: int
    trial: int
    seed: int
    displacement: str
    states: str
    description: str
    own_states: str

    @classmethod
    def of(cls, episode: EpisodeRecord, results: Results, hashed: bool = True) -> StartIdentity:
        moved = episode.displacement
        displacement = "none" if moved is None else ", ".join(f"{key} {moved[key]}" for key in sorted(moved))
        states = _states(results)
        hashes = (episode.bddl_sha256, episode.init_states_sha256 if states == _TASKS_OWN else None)
        description, own_states = (value or "" if hashed else "" for value in hashes)
        return cls(*episode.key, episode.seed, displacement, states, description, own_states)


def _states(results: Results) -> str:
    """Where the initial states came from: what the file held, or where that was not recorded its name."""
    digest = recorded_protocol(results).get("initial_states_sha256")
    return f"{_DIGEST} {digest}" if digest else str(results.config.get("initial_states_path", _TASKS_OWN))


_PARTS = dict(
    zip(
        StartIdentity._fields,
        ("suite", "task", "initial state", "trial number", "seed", "displacement", "file of initial states")
        + ("BDDL file of the tasks (SHA-256)", "initial states of the tasks (SHA-256)"),
        strict=True,
    )
)


def unhashed_tasks(results: Sequence[Results]) -> set[tuple[str, int]]:
    """Tasks of which at least one rollout does not say by hashes what they are."""
    return {(e.suite, e.task_index) for result in results for e in result.episodes if e.bddl_sha256 is None}


def by_start(
    results: Sequence[Results], name: str, unhashed: Collection[tuple[str, int]]
) -> dict[StartIdentity, EpisodeRecord]:
    """The rollouts of one policy; `unhashed` tasks are told apart by their number only.

    Raises:
        ValueError: when there is none, or a start is there twice.
    """
    found: dict[StartIdentity, EpisodeRecord] = {}
    for result in results:
        for episode in result.episodes:
            start = StartIdentity.of(episode, result, (episode.suite, episode.task_index) not in unhashed)
            if start in found:
                raise ValueError(
                    f"{name} has {start.suite} task {start.task_index}, initial state {start.initial_state}, trial "
                    f"{start.trial}, seed {start.seed} twice; give each rollout once, and compare several training "
                    "runs one by one"
                )
            found[start] = episode
    if not found:
        raise ValueError(f"{name} has no rollouts; evaluate it first")
    return found


def why_nothing_pairs(first: Iterable[StartIdentity], second: Iterable[StartIdentity], names: tuple[str, str]) -> str:
    """What two policies' starts differ in, for the error message where they have none in common."""
    lines = []
    for part, label in _PARTS.items():
        values = [{getattr(start, part) for start in side} for side in (first, second)]
        if not values[0] & values[1]:
            lines.append(f"{label}: {_listing(values[0])} against {_listing(values[1])}")
    reason = "; ".join(lines) or "no combination of task, initial state, trial number, seed and displacement is in both"
    return f"{names[0]} and {names[1]} share no start. {reason}. Evaluate both with the same flags for starts and seed"


def _listing(values: Iterable[Any], most: int = 4) -> str:
    ordered = sorted(values)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(str, ordered[:most])) + more


def unrecorded_files(starts: Iterable[StartIdentity]) -> list[str]:
    """Files of initial states of which nothing but the name is known."""
    files = {start.states for start in starts} - {_TASKS_OWN}
    return [
        f"what {file} held was not recorded; rollouts are paired by its name"
        for file in sorted(files)
        if _DIGEST not in file
    ]


def task_differences(
    sides: Sequence[Collection[StartIdentity]], unhashed: Collection[tuple[str, int]], names: tuple[str, str]
) -> list[str]:
    """Tasks that are not known to be the same for both policies, and those that are known not to be."""
    told = []
    if unhashed:
        suites = ", ".join(sorted({suite for suite, _ in unhashed}))
        told.append(f"no hashes of the tasks' files are recorded for all of {suites}; tasks are paired by their number")
    for part, words in (("description", "BDDL files"), ("own_states", "initial states")):
        seen: list[dict[tuple[str, int], set[str]]] = [{}, {}]
        for found, side in zip(seen, sides, strict=True):
            for start in side:
                if getattr(start, part):
                    found.setdefault((start.suite, start.task_index), set()).add(getattr(start, part))
        other = [task for task in seen[0] if task in seen[1] and seen[0][task] != seen[1][task]]
        told += [
            f"not the same task: {suite} task {index} had other {words} (SHA-256) for {names[0]} than for {names[1]}; "
            "such rollouts are not paired"
            for suite, index in sorted(other)
        ]
    return told
