"""Which rollouts began alike: the same task by its files, the same start, the same draw."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from experiments.robot.libero.comparison.caveats import Side, listed, recorded_protocol
from experiments.robot.libero.results.results import EpisodeRecord, Results
from experiments.robot.libero.settings.flags import OWN_STATES

_DIGEST = "SHA-256"
_SHOWN = 12  # Digits of a hash in a message.


class StartIdentity(NamedTuple):
    """Everything that makes two rollouts begin alike.

    Not the trial number: a rollout's place in an evaluation changes nothing that is not here. Where seeds count up with
    it they differ, and where initial states come round again with other displacements these do.

    `description` and `own_states` are hashes of the task's BDDL file and of its initial states; empty where they do not
    count: the latter where a file gives the states, both where one of the two results does not record them.
    """

    suite: str
    task_index: int
    initial_state: int
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
        hashes = (episode.bddl_sha256, episode.init_states_sha256 if states == OWN_STATES else None)
        description, own_states = (value or "" if hashed else "" for value in hashes)
        where = (episode.suite, episode.task_index, episode.initial_state)
        return cls(*where, episode.seed, displacement, states, description, own_states)

    @property
    def scene(self) -> StartIdentity:
        """The start whatever the seed. Rollouts of one scene are no independent trials: a seed moves fixtures at most.

        A displacement that was drawn by another seed is another scene.
        """
        return self._replace(seed=0)


def _states(results: Results) -> str:
    """Where the initial states came from: what the file held, or where that was not recorded its name."""
    digest = recorded_protocol(results).get("initial_states_sha256")
    return f"{_DIGEST} {digest}" if digest else str(results.config.get("initial_states_path", OWN_STATES))


_PARTS = dict(
    zip(
        StartIdentity._fields,
        ("suite", "task", "initial state", "seed", "displacement", "file of initial states")
        + ("BDDL file of the tasks (SHA-256)", "initial states of the tasks (SHA-256)"),
        strict=True,
    )
)


_FILES = (("description", "BDDL files"), ("own_states", "initial states"))
"""Parts of a start that hash a file of the task -> what such files are called."""


def unhashed_tasks(results: Sequence[Results]) -> set[tuple[str, int]]:
    """Tasks of which at least one rollout does not say by the hashes that count what they are."""
    found = set()
    for result in results:
        own_count = _states(result) == OWN_STATES
        for episode in result.episodes:
            if episode.bddl_sha256 is None or (own_count and episode.init_states_sha256 is None):
                found.add((episode.suite, episode.task_index))
    return found


class Tried(NamedTuple):
    """A rollout, and the number of the results that it came from."""

    episode: EpisodeRecord
    evaluation: int


def by_start(
    results: Sequence[Results], name: str, unhashed: Collection[tuple[str, int]]
) -> tuple[dict[StartIdentity, Tried], int]:
    """The rollouts of one policy, and how many of them were given twice (equal actions); these are there once.

    Args:
        unhashed: tasks that are told apart by their number only.

    Raises:
        ValueError: when there is none, or an episode is there twice with different actions.
    """
    found: dict[StartIdentity, Tried] = {}
    copies = 0
    for number, result in enumerate(results):
        for episode in result.episodes:
            start = StartIdentity.of(episode, result, (episode.suite, episode.task_index) not in unhashed)
            if start in found:
                before = found[start].episode.actions_sha256
                if before is not None and before == episode.actions_sha256:
                    copies += 1
                    continue
                raise ValueError(
                    f"{name} has {start.suite} task {start.task_index}, initial state {start.initial_state}, seed "
                    f"{start.seed} twice; give each rollout once, and compare several training runs one by one"
                )
            found[start] = Tried(episode, number)
    if not found:
        raise ValueError(f"{name} has no rollouts; evaluate it first")
    return found, copies


def why_nothing_pairs(first: Iterable[StartIdentity], second: Iterable[StartIdentity], names: tuple[str, str]) -> str:
    """What two policies' episodes differ in, for the error message where they have none in common."""
    lines = []
    for part, label in _PARTS.items():
        values = [{getattr(start, part) for start in side} for side in (first, second)]
        if not values[0] & values[1]:
            lines.append(f"{label}: {_listing(values[0])} against {_listing(values[1])}")
    reason = "; ".join(lines) or "no combination of task, initial state, seed and displacement is in both"
    remedy = "Evaluate both with the same flags for initial states, displacement and seed"
    return f"{names[0]} and {names[1]} share no episode. {reason}. {remedy}"


def _listing(values: Iterable[Any], most: int = 4) -> str:
    ordered = sorted(values)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(str, ordered[:most])) + more


def unrecorded_files(starts: Iterable[StartIdentity]) -> list[str]:
    """Files of initial states of which nothing but the name is known."""
    files = {start.states for start in starts} - {OWN_STATES}
    return [
        f"what {file} held was not recorded; rollouts are paired by its name"
        for file in sorted(files)
        if _DIGEST not in file
    ]


def task_differences(
    sides: Sequence[Collection[StartIdentity]], unhashed: Collection[tuple[str, int]], names: tuple[str, str]
) -> list[str]:
    """Tasks that are not known to be the same for both policies, and those that are known not to be."""
    warnings = _unknown_tasks(unhashed, "paired")
    for part, words in _FILES:
        seen: list[dict[tuple[str, int], set[str]]] = [{}, {}]
        for found, side in zip(seen, sides, strict=True):
            for start in side:
                if getattr(start, part):
                    found.setdefault((start.suite, start.task_index), set()).add(getattr(start, part))
        other = [task for task in seen[0] if task in seen[1] and seen[0][task] != seen[1][task]]
        warnings += [
            f"not the same task: {suite} task {index} had other {words} (SHA-256) for {names[0]} than for {names[1]}; "
            "such rollouts are not paired"
            for suite, index in sorted(other)
        ]
    return warnings


def mixed_tasks(sides: Sequence[Side]) -> list[str]:
    """As `task_differences`, for a table that pairs nothing: among all results, of one policy or of several."""
    warnings = _unknown_tasks(unhashed_tasks([result for _, results in sides for result in results]), "put together")
    for part, words in _FILES:
        seen: dict[tuple[str, int], dict[str, dict[str, None]]] = {}
        for name, results in sides:
            for start in (StartIdentity.of(episode, result) for result in results for episode in result.episodes):
                if digest := getattr(start, part):
                    task = seen.setdefault((start.suite, start.task_index), {})
                    task.setdefault(name, {})[digest[:_SHOWN]] = None
        warnings += [
            f"not the same task: {suite} task {index} had different {words}, SHA-256 {listed(list(of.items()))}"
            for (suite, index), of in sorted(seen.items())
            if len({digest for digests in of.values() for digest in digests}) > 1
        ]
    return warnings


def _unknown_tasks(unhashed: Collection[tuple[str, int]], done: str) -> list[str]:
    suites = ", ".join(sorted({suite for suite, _ in unhashed}))
    text = f"no hashes of the tasks' files are recorded for all of {suites}; tasks are {done} by their number"
    return [text] if unhashed else []
