"""Studies for tests: a definition as plain values, and results as they are kept, made by hand."""

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightvla.study.benchmarks import BenchmarkRow, SceneBenchmark
from lightvla.study.definition import COUNT, Study, read_study
from lightvla.study.places import Places
from lightvla.study.records import ArmResult, Rollout

CONTENT: dict[str, Any] = {
    "question": "Does it run?",
    "scenes": [
        {
            "name": "goal", "suite": "libero_goal", "tasks": [1, 4], "demonstrations_per_task": 3, "image_size": 64,
            "train_states": "0-9", "held_out_states": "30-34", "wide_starts_train_m": 0.07, "wide_starts_share": 0.7,
            "wide_starts_m": 0.06, "trials_per_task": 10, "starts_seed": 7,
        }
    ],
    "training": {"seeds": [7, 11], "parent_steps": 4, "arm_steps": 3, "batch_size": 4, "learning_rate": "3e-4"},
    "arms": [
        {"name": "none", "kind": "trained", "flags": "--pruner none"},
        {"name": "lightvla", "kind": "trained", "flags": "--pruner lightvla --noise_end_fraction 0.7"},
        {"name": "grid", "kind": "untrained", "flags": "--pruner grid:tokens={lightvla}"},
        {"name": "blind", "kind": "control", "flags": "--control blank_images"},
    ],
    "fixed": {"primary": ["lightvla", "none"], "margin_points": 10, "exclusions": ["Invalid rollouts are repeated."]},
}  # fmt: skip


def changed(where: str, value: Any) -> dict[str, Any]:
    """The definition with another value at `scenes.0.tasks`, say; a key that is not there is added."""
    content = copy.deepcopy(CONTENT)
    place: Any = content
    *path, last = [int(part) if part.isdigit() else part for part in where.split(".")]
    for part in path:
        place = place[part]
    place[last] = value
    return content


def write_study(folder: Path, content: Mapping[str, Any] = CONTENT) -> Places:
    """Write a definition."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(dict(content)))
    return Places(folder)


Outcome = Callable[[int, int, int, int], bool]
"""Whether the rollout of (seed, task, state, round) succeeded."""


def keep(
    places: Places, arm: str, solved: Outcome, tokens: float = 98.0, curve: bool = False, variant: str = "",
    trials: int | None = None, **more: Any,
) -> Study:  # fmt: skip
    """Write the results of one arm, or of a variant of it, for all training seeds, as an evaluation leaves them.

    `more` stands in `made`: `weights`, say.
    """
    study = read_study(places.definition)
    scene = study.scenes[0]
    trials = trials or scene.trials_per_task
    for seed in study.training.seeds:
        rollouts = [
            Rollout(task, 30 + trial % 5, trial // 5, solved(seed, task, 30 + trial % 5, trial // 5), 100 + trial,
                    tokens, 10, 0.5 * trial + seed)
            for task in scene.tasks for trial in range(trials)
        ]  # fmt: skip
        made = {"device": "a cpu", "git_commit": "c0ffee", "started": "today", "seconds": 1.0, "versions": {"x": "1"}}
        curves = {"loss": [[1.0, 2.0], [0.5, 0.25]], "tokens_kept": [[1.0, 2.0], [98.0, tokens]]} if curve else {}
        flags = study.arm(arm).flags.replace(COUNT, "17") if study.arm(arm).kind != "trained" else ""
        result = ArmResult(
            places.root.name, study.sha256, scene.name, arm, seed, f"lightvla eval {flags}", "none", 98, made | more,
            {"1": "put the bowl on the stove", "4": "put the bowl on the cabinet"}, rollouts,
            query_ms=10.0 + tokens / 10, flops=int(tokens * 1e6),
            training={"seconds": 60.0 * seed, "host_peak_gb": 1.5} if curve else {}, curves=curves, variant=variant,
        )  # fmt: skip
        path = places.result(study, scene.name, arm, seed, variant)
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
    return study


BENCHMARKED = (
    BenchmarkRow("none", (98, 98), 98_000_000, 12.34, (1.0, 1.0, 1.0)),
    BenchmarkRow("grid:tokens=17", (17, 17), 21_500_000, 6.17, (2.0, 1.9, 2.1)),
)


def keep_benchmark(places: Places, study: Study) -> Path:
    """Write that of the first scene; returns its file."""
    path = places.benchmark(study, study.scenes[0].name)
    SceneBenchmark(study.sha256, "lightvla benchmark", {"device": "a cpu"}, BENCHMARKED).save(path)
    return path


def table(markdown: str, title: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell, without notes; arms are rows, columns in the report or not."""
    block = markdown.split(f"### {title}\n")[1].split("\n#")[0]
    rows = [line.strip("|").split(" | ") for line in block.splitlines() if line.startswith("|")]
    if rows[0][0].strip() == "task":
        arms = [list(column) for column in zip(rows[0], *rows[2:], strict=True)]
        rows = [arms[0], [], *arms[1:]]
    return {re.sub(r" \(.*", "", row[0].strip()): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def check_numbers(places: Places) -> None:
    """The counts of `report.md` against the result files, counted here."""
    text = (places.root / "report.md").read_text()
    study = read_study(places.definition)
    [scene] = study.scenes
    found: dict[str, list[ArmResult]] = {}
    for file in sorted(places.results.glob("*-seed*.json")):
        result = ArmResult.load(file)
        if result.variant:
            continue
        found.setdefault(result.arm, []).append(result)
    success, by_seed = table(text, "Every arm"), table(text, "Solved by training seed")
    by_task, differences = table(text, "Solved by task"), table(text, "Paired difference to none")
    assert set(success) == set(by_seed) == set(by_task) == set(found), "every arm, those that lost included"
    assert set(differences) == set(found) - {"none"}
    baseline = {(r.seed, *rollout.key): rollout.success for r in found["none"] for rollout in r.rollouts}
    for arm, results in found.items():
        rollouts = [rollout for result in results for rollout in result.rollouts]
        solved = sum(rollout.success for rollout in rollouts)
        rate = 100 * solved / len(rollouts)
        assert success[arm][0].startswith(f"{solved}/{len(rollouts)} · {rate:.0f} %")
        assert float(success[arm][1].split()[0]) == pytest.approx(rate, abs=0.06), "equally many of each task"
        tokens = sum(r.tokens * r.queries for r in rollouts) / sum(r.queries for r in rollouts)
        assert success[arm][2] == f"{tokens:.1f} of {results[0].num_visual_tokens}"
        steps = [rollout.steps for rollout in rollouts if rollout.success]
        assert success[arm][4] == (f"{sum(steps) / len(steps):.1f}" if steps else "–")
        for column, task in enumerate(sorted(scene.tasks)):
            own = [rollout.success for rollout in rollouts if rollout.task == task]
            assert by_task[arm][column].startswith(f"{sum(own)}/{len(own)} ")
        for result in results:
            own = [rollout.success for rollout in result.rollouts]
            assert by_seed[arm][study.training.seeds.index(result.seed)].startswith(f"{sum(own)}/{len(own)} ")
        if arm != "none":
            pairs = Counter(
                (rollout.success, baseline[(result.seed, *rollout.key)])
                for result in results for rollout in result.rollouts
            )  # fmt: skip
            cells = "/".join(str(pairs[cell]) for cell in ((True, True), (True, False), (False, True), (False, False)))
            assert differences[arm][2] == cells
            gain = 100 * (pairs[True, False] - pairs[False, True]) / len(rollouts)
            assert float(differences[arm][0]) == pytest.approx(gain, abs=0.06)
