"""The model card of a checkpoint: what it is, how it did under which protocol, and how to repeat that."""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from experiments.robot.libero.comparison.caveats import own_caveats
from experiments.robot.libero.results.measures import completion_text, jerk_text, latency_text
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.results.success import SuccessRow, success_rows
from experiments.robot.libero.settings.flags import FREE_FLAGS, EvaluationConfig
from prismatic.checkpoints.inspection import Inspection

PAPER = "[arXiv 2509.12594](https://arxiv.org/abs/2509.12594)"
_FACTS = ("kind", "weights", "robot", "pruner", "images per sample", "action read-out", "statistics")
_NOT_OF_THE_RESULT = FREE_FLAGS | {
    "pretrained_checkpoint", "model_family", "lora_rank", "save_rollout_video", "max_videos_per_task",
    "video_every_steps",
}  # fmt: skip


def model_card(repo_id: str, found: Inspection, results: Sequence[Results], license_id: str) -> ModelCard:
    """The card as it stands in `README.md`, with success rates in its metadata too.

    Args:
        repo_id: `user/name` of the model on the hub.
        found: what the checkpoint holds.
        results: of evaluations; may be empty.
        license_id: as the hub names licences.
    """
    data = ModelCardData(
        license=license_id,
        library_name="lightvla",
        pipeline_tag="robotics",
        tags=["robotics", "vision-language-action", "openvla", "token-pruning"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=[row for result in results for row in _metadata(result)] or None,
    )
    facts = {"kind": found.kind, **found.facts}
    table = ["| | |", "|---|---|", *(f"| {name} | {facts[name]} |" for name in _FACTS if name in facts)]
    parts = [
        f"# {repo_id}",
        "A robot policy: camera images, a sentence and the robot's state in, a chunk of actions out. Unless the pruner "
        "below is `none`, visual tokens that a task does not need are dropped before the language model reads them "
        f"({PAPER}).",
        "\n".join(table),
        "## Results",
        *([_results(result, repo_id) for result in results] or ["No evaluation was recorded with this upload."]),
        "## Use",
        _usage(repo_id, found),
        "## Licence",
        f"`{license_id}`. Weights that were fine-tuned from a base model also follow the licence of that model.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def evaluation_command(result: Results, repo_id: str) -> str:
    """The command that repeats an evaluation with the uploaded checkpoint; flags at their defaults are left out."""
    words = ["lightvla", "eval", "--pretrained_checkpoint", repo_id]
    left_out = set(_NOT_OF_THE_RESULT)
    if result.config.get("initial_states") and not (result.run.get("protocol") or {}).get("num_trials_per_task"):
        left_out.add("num_trials_per_task")  # each of the states once: nobody gave the number that stands there
    for flag in fields(EvaluationConfig):
        value = result.config.get(flag.name, flag.default)
        if flag.name not in left_out and (value != flag.default or flag.name == "task_suite_name"):
            words += [f"--{flag.name}", str(value)]
    return shlex.join(words)


def _metadata(result: Results) -> list[EvalResult]:
    if result.config.get("control", "none") != "none":
        return []  # a control's rate is no merit
    wide = result.config.get("wide_starts_m") or 0
    found = []
    for summary in result.summary()["suites"]:
        if summary["rate"] is None:
            continue
        suite, (low, high), value = summary["suite"], summary["interval_95"], round(100 * summary["rate"], 1)
        name = f"LIBERO {suite}" + (f", wide starts {wide} m" if wide else "")
        counts = f"{summary['successes']} of {summary['trials']}, 95 % {low:.3f} to {high:.3f}"
        metric = f"success rate in percent ({counts})"
        found.append(
            EvalResult("robotics", suite, name, "success_rate", value, task_name="robotics", metric_name=metric)
        )
    return found


def _results(result: Results, repo_id: str) -> str:
    rows, config = success_rows(result.episodes), result.config
    swapped = any(row.other_goal is not None for row in rows)
    headings = ["task", "solved", "rate", "95 % interval", *(["other task's goal"] if swapped else []), "invalid"]
    lines = [
        f"### {str(config['task_suite_name']).replace(',', ', ')}{_conditions(config)}",
        "",
        f"| {' | '.join(headings)} |",
        f"|---{'|---:' * (len(headings) - 1)}|",
        *(_row(row, swapped) for row in rows),
        "",
        "Intervals are Wilson's. An invalid rollout ended in an error (simulator or policy) and counts as neither.",
        "",
        *_costs(result.summary()),
        f"Protocol: {_protocol(result)}.",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in sorted(result.versions.items()))}; "
        f"code at `{result.run.get('git_commit', 'unknown')}`.",
        "",
        *(line for warning in own_caveats(result) for line in (f"**Mind:** {warning}.", "")),
        "```bash",
        evaluation_command(result, repo_id),
        "```",
    ]
    return "\n".join(lines)


def _costs(summary: dict[str, Any]) -> list[str]:
    """What a policy query keeps and takes, and what a success takes; no line where nothing was measured."""
    kept, latency, numbers = summary["tokens_kept"], summary["latency_ms"], summary["all"]
    parts = [f"{kept['mean']:.1f} of {kept['of']} visual tokens kept"] if kept else []
    parts += [f"{latency_text(latency)} per policy query (median)"] if latency else []
    parts += [f"{completion_text(numbers)} steps to success"] if numbers["successes"] else []
    parts += [f"jerk {jerk_text(numbers)} m/s³"] if numbers["mean_jerk"] is not None else []
    return [f"Costs: {'; '.join(parts)}.", ""] if parts else []


def _row(row: SuccessRow, swapped: bool) -> str:
    low, high = row.interval
    cells = [
        row.name if row.is_task else f"**{row.name}**",
        row.solved.replace("/", " of "),
        "" if row.rate is None else f"{row.rate:.1%}",
        f"{low:.1%} to {high:.1%}",
        *([row.other_goal_reached.replace("/", " of ")] if swapped else []),
        str(row.invalid),
    ]
    return f"| {' | '.join(cells)} |"


def _conditions(config: dict[str, Any]) -> str:
    wide = config.get("wide_starts_m") or 0
    control = config.get("control", "none")
    parts = [f"wide starts {wide} m"] if wide else []
    parts += [f"control {control}"] if control != "none" else []
    return "".join(f", {part}" for part in parts)


def _protocol(result: Results) -> str:
    config, policy, run = result.config, result.policy, result.run
    starts = config.get("initial_states") or f"the first {config.get('num_trials_per_task')}"
    protocol = run.get("protocol") or {}
    if config.get("initial_states") and (trials := protocol.get("num_trials_per_task")):
        starts += f" gone round for {trials} trials"
    steps = result.open_loop_steps
    parts = [
        f"initial states {starts} of each task",
        f"seed {config.get('seed')}",
        f"{steps} actions of each chunk executed",
        f"cameras at {config.get('env_img_res')} px, {run.get('renderer')} renderer ({run.get('rendering_backend')})",
        f"centre crop {policy.get('center_crop')}",
        f"pruner {policy.get('pruner')}",
        f"{policy.get('dtype')} on {run.get('device')}",
        f"started {run.get('started')}",
    ]
    assumed = [f"assumed: {text}" for text in policy.get("assumptions") or []]
    return "; ".join([*parts, *assumed])


def _usage(repo_id: str, found: Inspection) -> str:
    statistics = found.facts.get("statistics", "none").split(", ")
    key = f', unnorm_key="{statistics[0]}"' if len(statistics) > 1 else ""
    return "\n".join(
        [
            "```python",
            "from prismatic.policy import Policy",
            "",
            f'policy = Policy.from_pretrained("{repo_id}", device="cuda"{key})',
            'chunk = policy.act(observation, "put the bowl on the plate")  # (chunk, action_dim), un-normalised',
            "```",
        ]
    )
