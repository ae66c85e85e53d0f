"""The report's sections on how evaluations were done: conventions, assumptions, commands, versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.robot.libero.reports.evaluation import Evaluation, initial_states_text, state_numbers_text
from experiments.robot.libero.reports.groups import Group
from experiments.robot.libero.results.naming import policy_name
from prismatic.report.data import CodeBlock, Notes, Table

_VALUES_SHOWN = 6  # Of several evaluations in a cell.


def protocol_table(groups: Sequence[Group]) -> Table:
    """What was done, one column per group; where evaluations of a group differ, what each did."""
    facts = [_joined([_protocol(part) for part in group.parts]) for group in groups]
    return _table("What was done", "setting", [group.name for group in groups], facts)


def versions_table(groups: Sequence[Group]) -> Table:
    facts = [
        _joined([{name: str(version) for name, version in part.results.versions.items()} for part in group.parts])
        for group in groups
    ]
    return _table("Versions", "package", [group.name for group in groups], facts)


def _table(title: str, what: str, columns: Sequence[str], facts: Sequence[Mapping[str, str]]) -> Table:
    names = list(dict.fromkeys(name for one in facts for name in one))
    return Table(
        title, (what, *columns), [(name, *(one.get(name, "–") for one in facts)) for name in names], numeric=False
    )


def _joined(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Fact -> its value, or the different values of several evaluations."""
    names = dict.fromkeys(name for one in facts for name in one)
    return {name: _several(list(dict.fromkeys(one.get(name, "–") for one in facts))) for name in names}


def _several(values: Sequence[str]) -> str:
    if len(values) <= _VALUES_SHOWN:
        return "; ".join(values)
    return f"{values[0]}; … ; {values[-1]} ({len(values)} different ones)"


def _protocol(evaluation: Evaluation) -> dict[str, str]:
    """Fact -> value, as text."""
    config, run, policy = evaluation.results.config, evaluation.results.run, evaluation.results.policy
    suite = str(config.get("task_suite_name", "unknown")).replace(",", ", ")
    backend = run.get("rendering_backend", "unknown")
    protocol = dict(run.get("protocol") or {})
    deviations = "; ".join(protocol.get("deviations", ())) or None
    known: dict[str, Any] = {
        "protocol": protocol.get("name") or "none named",
        "deviations from it": deviations if protocol.get("name") else None,
        "suite": suite,
        "tasks": config.get("task_ids") or "all",
        "initial states": initial_states_text(evaluation),
        "their numbers": state_numbers_text(evaluation),
        "control": evaluation.control.replace("_", " ") or "none",
        "settle steps": config.get("num_steps_wait"),
        "cap on control steps": protocol.get("max_steps")
        or "; ".join(f"{suite}: {own['max_steps']}" for suite, own in (protocol.get("suites") or {}).items())
        or "unknown",
        "open-loop steps of a chunk": evaluation.results.open_loop_steps,
        "seed": run.get("seed", config.get("seed")),
        "seeding": protocol.get("seeding"),
        "simulators": run.get("num_envs"),
        "renderer": f"{config.get('renderer', 'unknown')}, {backend}",
        "rendered pictures": f"{config.get('env_img_res', 'unknown')} px",
        "policy": policy_name(policy),
        "pruner": policy.get("pruner"),
        "action head": policy.get("action_head"),
        "action read-out": policy.get("action_readout"),
        "images, side": f"{policy.get('num_images', 'unknown')}, {policy.get('image_size', 'unknown')} px",
        "centre crop": policy.get("center_crop"),
        "reads the robot's state": policy.get("use_proprio"),
        "dtype, device": f"{policy.get('dtype', 'unknown')}, {run.get('device', 'unknown')}",
        "started": run.get("started"),
        "warnings": "; ".join(run.get("warnings") or ()) or None,
    }
    return {name: _text(value) for name, value in known.items() if value is not None}


def _text(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def assumptions(groups: Sequence[Group]) -> list[Notes]:
    """What was assumed about the checkpoints because they do not say."""
    found = []
    for group in groups:
        items = dict.fromkeys(
            str(item) for part in group.parts for item in part.results.policy.get("assumptions") or ()
        )
        if items:
            found.append(Notes(list(items), f"Assumed about the checkpoint of {group.name}"))
    return found or [Notes(["Nothing had to be assumed about the checkpoint."], "Assumptions")]


def commands(groups: Sequence[Group]) -> list[CodeBlock]:
    """The command lines of each group."""
    found = []
    for group in groups:
        code = "\n\n".join(dict.fromkeys(_command(part) for part in group.parts))
        commits = dict.fromkeys(str(part.results.run.get("git_commit", "an unknown commit")) for part in group.parts)
        found.append(CodeBlock(group.name, code, f"Code at {', '.join(commits)}."))
    return found


def _command(evaluation: Evaluation) -> str:
    words = ["python", *map(str, evaluation.results.run.get("command") or ["unknown"])]
    return " ".join(("\\\n    " if word.startswith("--") else "") + shlex.quote(word) for word in words)
