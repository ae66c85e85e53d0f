"""Shards of one evaluation, made on several machines, put together to what one machine would have found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.robot.libero.results.fields import shown
from experiments.robot.libero.results.journal import load_results
from experiments.robot.libero.results.naming import policy_name
from experiments.robot.libero.results.results import MEASURED, EpisodeRecord, Results
from experiments.robot.libero.settings.flags import FREE_FLAGS, parse_shard

_OF_THE_MACHINE = MEASURED | {"checkpoint", "device", "device_name", "policy_url", "server_metadata"}
"""Parts of a policy's description that may differ between machines; its name may not."""
_OF_THE_RUN = ("renderer", "rendering_backend", "protocol")
"""What all shards must have alike, beside flags and policy: it changes what is drawn and counted."""


def merge_results(paths: Sequence[str | Path], output_dir: Path) -> tuple[Results, list[str]]:
    """Put shards together, and say what is missing. Videos and records stay where they are, and are named from there.

    Args:
        paths: results files, or the folders that hold them.
        output_dir: where the merged results will lie.

    Raises:
        FileNotFoundError: where there are no results.
        ValueError: for results that are no shards, shards of different evaluations, and a rollout that two have.
    """
    parts = [(Path(path) if Path(path).is_dir() else Path(path).parent, load_results(path)) for path in paths]
    if not parts:
        raise ValueError("no results were given; name the folders of all shards")
    shards = [_shard_of(folder, results) for folder, results in parts]
    for folder, results in parts[1:]:
        _check_same_evaluation(parts[0], (folder, results))
    found: dict[tuple[Any, ...], EpisodeRecord] = {}
    for folder, results in parts:
        for episode in results.episodes:
            if episode.key in found:
                raise ValueError(
                    f"{folder}: {episode.suite} task {episode.task_index}, initial state {episode.initial_state} is in "
                    "another one too; give each shard once"
                )
            found[episode.key] = _named_from(episode, folder, output_dir)
    absent = sorted(set(range(1, shards[0][1] + 1)) - {part for part, _ in shards})
    cut = [
        part for (part, _), (_, results) in zip(shards, parts, strict=True) if results.run.get("complete") is not True
    ]
    lacks = [f"shard {part}/{shards[0][1]} is missing" for part in absent]
    lacks += [f"shard {part}/{shards[0][1]} did not get to its end" for part in cut]
    first = parts[0][1]
    runs = [results.run for _, results in parts]
    run = {
        **first.run,
        "merged_from": len(parts),
        "started": min(str(run.get("started", "")) for run in runs),
        "warnings": list(dict.fromkeys(line for run in runs for line in run.get("warnings", ())))
        + [*_several(runs, "git_commit", "code"), *_several(runs, "device", "devices"), *lacks],
        "worker_restarts": sum(run.get("worker_restarts", 0) for run in runs),
        "seconds": max(run.get("seconds", 0.0) for run in runs),
        "complete": not lacks,
    }
    episodes = [found[key] for key in sorted(found)]
    return Results(run, {**first.config, "shard": None}, first.policy, first.versions, episodes), lacks


def _several(runs: Sequence[Mapping[str, Any]], key: str, what: str) -> list[str]:
    """What may differ between machines, and is told."""
    values = list(dict.fromkeys(str(run.get(key, "not recorded")) for run in runs))
    return [f"the shards' {what}: {', '.join(values)}"] if values[1:] else []


def _tasks(results: Results) -> dict[str, str | None]:
    """Hashes of the tasks' files."""
    files = {"BDDL file": "bddl_sha256", "initial states": "init_states_sha256"}
    return {
        f"{what} of {episode.suite} task {episode.task_index}": getattr(episode, name)
        for episode in results.episodes
        for what, name in files.items()
    }


def _shard_of(folder: Path, results: Results) -> tuple[int, int]:
    shard = results.config.get("shard")
    if shard is None:
        raise ValueError(
            f"{folder} is no shard: it was evaluated without --shard; `lightvla compare` takes several files"
        )
    return parse_shard(shard)


def _check_same_evaluation(first: tuple[Path, Results], other: tuple[Path, Results]) -> None:
    """Raises ValueError naming the first thing in which two shards differ that would change what they find."""
    sides = [results for _, results in (first, other)]
    numbers = [{"number of shards": parse_shard(results.config["shard"])[1]} for results in sides]
    names = [{"policy": policy_name(results.policy)} for results in sides]
    compared: list[tuple[Sequence[Mapping[str, Any]], frozenset[str]]] = [
        (numbers, frozenset()),
        ([results.config for results in sides], FREE_FLAGS | {"shard", "pretrained_checkpoint"}),
        (names, frozenset()),
        ([results.policy for results in sides], _OF_THE_MACHINE),
        ([results.versions for results in sides], frozenset({"lightvla"})),
        ([{key: results.run.get(key) for key in _OF_THE_RUN} for results in sides], frozenset()),
    ]
    tasks = [_tasks(results) for results in sides]
    compared.append((tasks, frozenset({*tasks[0]} ^ {*tasks[1]})))  # a small shard has not every task
    for (one, two), free in compared:
        for key in sorted({*one, *two} - free):
            if one.get(key) != two.get(key):
                raise ValueError(
                    f"{first[0]} and {other[0]} are of different evaluations: {key} {shown(one.get(key))} and "
                    f"{shown(two.get(key))}; give shards of one"
                )


def _named_from(episode: EpisodeRecord, folder: Path, output_dir: Path) -> EpisodeRecord:
    """With the names of its files relative to another folder."""
    here = output_dir.resolve()
    video, record = (
        None if file is None else os.path.relpath((folder / file).resolve(), here)
        for file in (episode.video, episode.record)
    )
    return replace(episode, video=video, record=record)
