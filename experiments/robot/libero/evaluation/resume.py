"""Going on with a stopped evaluation: what it has done, and whether what is asked for now is the same evaluation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.results.caveats import recorded_protocol
from experiments.robot.libero.results.journal import read_journals
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import FILE_NAME, TIME_FORMAT, EpisodeRecord, Results
from experiments.robot.libero.rollouts.rollout import new_record
from experiments.robot.libero.settings.flags import FREE_FLAGS, GROWING, EvaluationConfig

_EARLIER = "the first"
_PATHS = frozenset({"pretrained_checkpoint", "checkpoint", "initial_states_path"})
_FREE_OF_POLICY = frozenset({"device", "device_name", "policy_url", "server_metadata"})


def earlier_rollouts(plan: Plan) -> tuple[list[EpisodeRecord], dict[str, Any]]:
    """The valid rollouts of this plan that an earlier run left in its folder, and what it said of itself (`run`)."""
    path = plan.output_dir / FILE_NAME
    results = Results.load(path) if path.is_file() else Results()
    wanted = {start.key for start in itertools.chain(*plan.starts)}
    records = {record.key: record for record in [*results.episodes, *read_journals(plan.output_dir)]}
    valid = [record for record in records.values() if record.invalid is None and record.key in wanted]
    return valid, results.run


def check_resumable(plan: Plan) -> None:
    """Raises ValueError where `--resume` would join the rollouts of two different evaluations. Needs no policy."""
    if not plan.config.resume:
        return
    starts = {start.key: start for start in itertools.chain(*plan.starts)}
    check_asks_for_all(plan)
    for record in earlier_rollouts(plan)[0]:
        expected = new_record(starts[record.key], plan.config.control)
        where = f"task {record.task_index}, initial state {record.initial_state}, trial {record.trial}"
        for field in ("seed", "control", "instruction", "displacement", "other_task"):
            what = f"the rollout of {where} had another {field}"
            _check_equal(plan, what, getattr(record, field), getattr(expected, field))
        for field, name in (("bddl_sha256", "BDDL file"), ("init_states_sha256", "set of initial states")):
            if (recorded := getattr(record, field)) is not None:  # it was not, once
                what = f"task {record.task_index} had another {name} (SHA-256)"
                _check_equal(plan, what, recorded, getattr(expected, field))
    if (before := _earlier_results(plan)) is None:
        return
    backends = before.run.get("rendering_backend", "none"), plan.backend
    if "none" not in backends:  # else one of the two draws nothing, or nothing but videos
        _check_equal(plan, "it was drawn by another rendering backend (MUJOCO_GL)", *backends)
    file_before, file_now = (
        recorded_protocol(before).get("initial_states_sha256"),
        conventions.initial_states_sha256(plan.config),
    )
    _check_equal(plan, "its file of initial states held something else (SHA-256)", file_before, file_now)
    defaults = asdict(EvaluationConfig())
    _check_all_equal(
        plan, "it was run with another --", {**defaults, **before.config}, asdict(plan.config), FREE_FLAGS | GROWING
    )
    _check_all_equal(plan, "it was run with another version of ", before.versions, collect_versions(), {"lightvla"})
    changed = [path.name for path in weight_files(before.policy) if path.stat().st_mtime > _started(before)]
    if changed:
        _refuse(plan, f"{changed[0]} of the checkpoint was written after it began", before.run["started"], "later")


def check_asks_for_all(plan: Plan) -> None:
    """Raises ValueError where a folder holds valid rollouts that the plan leaves out: an evaluation may only grow."""
    wanted = {start.key for start in itertools.chain(*plan.starts)}
    before = _earlier_results(plan)
    records = [*(before.episodes if before else ()), *read_journals(plan.output_dir)]
    for record in records:
        if record.invalid is None and record.key not in wanted:
            where = f"{record.suite} task {record.task_index}, initial state {record.initial_state}"
            raise ValueError(
                f"--resume: {plan.output_dir} holds a rollout of {where}, which these flags do not ask for; ask for "
                "what it holds and more, or choose another --output_dir"
            )


def check_same_policy(plan: Plan, agent: Agent) -> None:
    """Raises ValueError where `--resume` would go on with another policy."""
    if plan.config.resume and (before := _earlier_results(plan)) is not None:
        _check_all_equal(plan, "its policy had another ", before.policy, agent.description(), _FREE_OF_POLICY)


def changed_conditions(earlier: Mapping[str, Any], now: Mapping[str, Any], rollouts: int) -> list[str]:
    """What else was not the same for the first rollouts of an evaluation (its `run`) that is gone on with: warnings."""
    names = {"git_commit": "the code at", "device": "a policy on"}
    kept = [line for line in earlier.get("warnings", ()) if line.startswith(_EARLIER)]
    return kept + [
        f"{_EARLIER} {rollouts} rollouts were made by {label} {earlier[name]}, later ones by {label} {now[name]}"
        for name, label in names.items()
        if rollouts and earlier.get(name, now[name]) != now[name]
    ]


def weight_files(policy: Mapping[str, Any]) -> list[Path]:
    """The weights of a described policy, where it is a folder here."""
    folder = Path(str(policy.get("checkpoint", "")))
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")]) if folder.is_dir() else []


def _earlier_results(plan: Plan) -> Results | None:
    return Results.load(plan.output_dir) if (plan.output_dir / FILE_NAME).is_file() else None


def _started(results: Results) -> float:
    """Seconds since the epoch at the end of the second in which an evaluation began."""
    return datetime.strptime(results.run["started"], TIME_FORMAT).timestamp() + 1


def _check_all_equal(
    plan: Plan, what: str, old: Mapping[str, Any], new: Mapping[str, Any], free: frozenset[str] | set[str]
) -> None:
    for key in sorted({*old, *new} - free):
        if key not in _PATHS or not _same_place(old.get(key), new.get(key)):
            _check_equal(plan, what + key, old.get(key), new.get(key))


def _same_place(old: Any, new: Any) -> bool:
    """Whether both name one file or folder of this machine, in different words."""
    return all(old_or_new and Path(old_or_new).exists() for old_or_new in (old, new)) and Path(old).samefile(new)


def _check_equal(plan: Plan, what: str, old: Any, new: Any) -> None:
    # As JSON, since that is what the old value has been through.
    if json.dumps(old, default=str) != json.dumps(new, default=str):
        _refuse(plan, what, old, new)


def _refuse(plan: Plan, what: str, old: Any, new: Any) -> None:
    raise ValueError(
        f"--resume: {plan.output_dir} holds another evaluation: {what}: {old!r}, now {new!r}; evaluate with the same, "
        "or into another --output_dir"
    )
