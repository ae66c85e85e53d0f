"""Gather what the demo's stages left into one report."""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.comparison.compare import compare, points, span
from experiments.robot.libero.comparison.tables import outcome_name, outcomes_of
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.settings.flags import parse_indices
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from experiments.robot.libero.simulator.wide_starts import Displacement
from lightvla.demo.settings import STAGES, TASKS, DemoConfig, Paths, evaluations, stage_commands
from prismatic.models.flops import FlopCount, count_flops
from prismatic.pictures.frame import Caption, compose_frame
from prismatic.pictures.images import encode_png
from prismatic.pictures.overlay import dim_pruned, kept_grids
from prismatic.policy import Policy
from prismatic.report.charts import RateBars
from prismatic.report.data import (
    Cell,
    Clip,
    CodeBlock,
    Headline,
    Media,
    Notes,
    Picture,
    ReportData,
    Row,
    Section,
    Table,
    duration,
    share_cell,
)
from prismatic.report.figures import Curve, read_metrics
from prismatic.report.html import write_report as write_html

SUITE = "libero_goal"
LATENCY_CALLS = 40

COMMANDS_7B = """\
# fine-tune an OpenVLA-OFT checkpoint with the pruner, one process per GPU
torchrun --standalone --nproc-per-node 8 -m lightvla finetune \\
    --vla_path moojink/openvla-7b-oft-finetuned-libero-goal --run_id_override pruned \\
    --data_root_dir DATA --dataset_name libero_goal_no_noops --run_root_dir runs \\
    --use_l1_regression True --num_images_in_input 2 --use_proprio True --image_aug True --pruner lightvla \\
    --use_lora True --lora_rank 32 --batch_size 8 --learning_rate 5e-4 \\
    --num_steps_before_decay 100000 --max_steps 150005 --save_freq 10000
# evaluate it in the simulator, 50 trials a task
lightvla eval --pretrained_checkpoint runs/pruned \\
    --task_suite_name libero_goal --num_trials_per_task 50 --save_rollout_video True"""


def write_report(config: DemoConfig) -> Path:
    """Write the HTML report of the demo; returns its path."""
    paths = Paths(config.output_dir, config.suffix)
    results = {e.name: Results.load(paths.evaluation(e.name)) for e in evaluations(config)}
    policy = Policy.from_pretrained(paths.run, dtype="float32")  # as it was evaluated
    cost = measure_cost(config, policy, results["wide"])
    pictures, flops, latency = cost["pictures"], cost["flops"], cost["latency"]
    tokens = results["wide"].summary()["tokens_kept"]
    rows = success_rows(results)
    data = ReportData(
        title="LightVLA demo: a small pruned policy in the LIBERO simulator",
        summary=(
            f"A {policy.description()['parameters'] / 1e6:.1f}-million-parameter policy, built from scratch and "
            "fine-tuned on scripted demonstrations of three tasks that share a scene, acts from two camera views, the "
            "robot's state and a sentence. It learned to act first; then the pruner learned, from the action loss "
            f"alone, which visual tokens the language model needs (from step {config.unpruned_steps} on).",
        ),
        headlines=(
            Headline(f"{rows[0].successes} of {rows[0].trials}", "solved from LIBERO's own initial states"),
            Headline(f"{rows[1].successes} of {rows[1].trials}", "solved from wide starts"),
            Headline(f"{tokens['mean']:.1f} of {tokens['of']}", "visual tokens kept on average"),
            Headline(f"-{100 * (1 - flops[1].total / flops[0].total):.0f} %", "FLOPs by pruning"),
        ),
        sections=(
            Section("Success", success_blocks(config, rows)),
            *(
                [Section("What pruning costs", [against_baseline(results["wide"], results["baseline"])])]
                if config.baseline
                else []
            ),
            Section("Rollouts", clips(paths, results["wide"]), columns=2),
            Section("What the policy keeps", pictures, columns=2),
            Section("Training", training_curves(config), columns=2),
            Section("Cost", [cost_table(flops, latency, tokens)]),
            Section("Commands", [
                CodeBlock("The same with a 7B checkpoint", COMMANDS_7B),
                CodeBlock("What this demo ran", demo_commands(config)),
            ]),
            Section("Run", [stage_table(config), versions_table(results["wide"])], columns=2),
            Section("Notes", [Notes(items)] if (items := results["wide"].policy.get("assumptions", ())) else ()),
        ),
    )  # fmt: skip
    return write_html(data, paths.report)


_AIMED_ROLLOUTS = 36
"""Of a condition: so many the numbers that are asked for are of."""


@dataclass(frozen=True)
class SuccessRow:
    """Successes under one condition.

    Args:
        counts: Task -> (successes, trials).
        expected: What was asked for, as text; `met` says whether it holds (None: not judged).
    """

    name: str
    counts: Mapping[str, tuple[int, int]]
    note: str
    expected: str = ""
    met: bool | None = None

    @property
    def successes(self) -> int:
        return sum(successes for successes, _ in self.counts.values())

    @property
    def trials(self) -> int:
        return sum(trials for _, trials in self.counts.values())


def success_blocks(config: DemoConfig, rows: Sequence[SuccessRow]) -> list[RateBars | Table]:
    """Bars over all tasks, and a table of the tasks with what was asked for."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.counts))
    cells: list[Row] = [
        (
            Cell(row.name, note=row.note),
            *("{}/{}".format(*row.counts[task]) if task in row.counts else "–" for task in tasks),
            share_cell(row.successes, row.trials),
            Cell(row.expected, mark=row.met),
        )
        for row in rows
    ]
    note = (
        f"Initial states {config.held_out_states} were not used in training. Wide starts move the goal's objects "
        f"anywhere free within {100 * config.wide_starts_m:.0f} cm. Intervals are Wilson's, 95 %."
    )
    return [
        RateBars("All tasks together", [r.name for r in rows], {"solved": [(r.successes, r.trials) for r in rows]}),
        Table(
            "Closed-loop success on held-out initial states",
            ("condition", *tasks, "all, with 95 % interval", "asked for"), cells, note, sortable=True,
        ),
    ]  # fmt: skip


def against_baseline(pruned: Results, baseline: Results) -> Table:
    """The pruned policy and the one that was trained alike without pruning, on the same starts."""
    comparison = compare([pruned], [baseline], ("pruned", "not pruned"))
    rows = [
        (
            outcome_name(outcome, comparison),
            *(f"{solved} of {outcome.counts.trials}" for solved in outcome.solved),
            *map(str, outcome.counts),
            f"{points(outcome.difference)} ({span(outcome.interval, signed=True)})",
        )
        for outcome in outcomes_of(comparison)
    ]
    columns = (
        "task", "pruned", "not pruned", "by both", "by the pruned alone", "by the other alone", "by neither",
        "points (95 % interval)",
    )  # fmt: skip
    note = (
        "Both went on from one policy, with as many steps on the same data in the same order, and began from the same "
        f"wide starts. {comparison.verdict[:1].upper()}{comparison.verdict[1:]} {comparison.motion}"
    )
    return Table("Solved by the pruned policy and by one trained alike without pruning", columns, rows, note.strip())


def training_log(config: DemoConfig) -> list[dict[str, Any]]:
    """The records of both runs, the pruned one counted on from the unpruned one's last step."""
    paths = Paths(config.output_dir, config.suffix)
    later = read_metrics(paths.run / "metrics.jsonl")
    moved = [{**record, "step": record["step"] + config.unpruned_steps} for record in later]
    return [*read_metrics(paths.unpruned_run / "metrics.jsonl"), *moved]


def training_curves(config: DemoConfig) -> list[Curve]:
    """The curves over both runs."""
    log = training_log(config)
    return [
        Curve("Loss: L1 of normalised actions", {"training": "loss", "held out": "val_loss"}, log, "L1"),
        Curve("Visual tokens kept", {"training": "tokens_kept", "held out": "val_tokens_kept"}, log, "per sample"),
    ]


def success_rows(results: dict[str, Results]) -> list[SuccessRow]:
    """Own goals under every condition; under the swapped instruction also the goal whose instruction was given.

    What was asked for is said of the demo's own number of rollouts alone.
    """

    def row(name: str, title: str, note: str, expected: str = "", least: int = 0, most: int = 10**9) -> SuccessRow:
        counts = results[name].counts(other_goal=title.endswith("the other goal"))
        successes, rollouts = map(sum, zip(*counts.values(), strict=True))
        if rollouts != _AIMED_ROLLOUTS or not expected:
            return SuccessRow(title, counts, note)
        return SuccessRow(title, counts, note, expected, least <= successes <= most)

    swapped = "wide starts, another task's instruction"
    return [
        row("standard", "standard initial states", "LIBERO's own", "at least 30", least=30),
        row("wide", "wide starts", "objects moved", "at least 24", least=24),
        *(
            [row("baseline", "wide starts, not pruned", "trained alike without the pruner")]
            if "baseline" in results
            else []
        ),
        row("blank", "control: blank images", "wide starts, grey pictures", "at most 6", most=6),
        row("swapped", "control: swapped instruction, own goal", swapped, "at most 2", most=2),
        row("swapped", "control: swapped instruction, the other goal", swapped, "more than half", least=19),
        row("random", "control: random tokens", "wide starts, as many tokens, drawn at random"),
    ]


def measure_cost(config: DemoConfig, policy: Policy, results: Results) -> dict[str, Any]:
    """What is kept at held-out initial states, FLOPs, and latency with and without pruning (alternating calls)."""
    pictures = []
    first = parse_indices(config.held_out_states, "held_out_states")[0]
    for index in map(int, TASKS.split(",")):
        task = load_task(SUITE, index)
        with LiberoEnvironment(
            task,
            config.resolution,
            renderer="fast",
            seed=config.starts_seed,
            canonical_quaternion=policy.robot.canonical_quaternion,
        ) as environment:
            environment.reset(first, displacement=Displacement(config.wide_starts_m, config.starts_seed, "evaluation"))
            observation = environment.observe()
        kept = policy.act_batch([observation], [task.language]).selection.kept()[0].numpy()
        views = [observation[key] for key in policy.robot.cameras]
        grids = kept_grids(kept, len(views))
        dimmed = [dim_pruned(view, grid, policy.transform.center_crop) for view, grid in zip(views, grids, strict=True)]
        caption = Caption(task.language, f"kept {int(kept.sum())} of {kept.size} visual tokens")
        png = encode_png(compose_frame(views, dimmed, caption))
        pictures.append(Picture(task.language, Media("image/png", png)))
    recorded = policy.model.config.pruner_spec
    times: dict[str, list[dict[str, float]]] = {"none": [], "pruned": []}
    for call in range(LATENCY_CALLS):
        for name, spec in (("none", "none"), ("pruned", recorded)):
            policy.set_pruner(spec)
            timing = policy.act_batch([observation], [task.language]).timing
            if call >= 5:  # the first calls pay for lazy initialisation
                times[name].append(timing)
    latency = {
        name: {k: 1e3 * statistics.median(t[k] for t in calls) for k in calls[0]} for name, calls in times.items()
    }
    prompt = len(policy.transform.input_ids(task.language))
    kept_mean = round(results.summary()["tokens_kept"]["mean"])
    parts = (policy.model, policy.action_head, policy.proprio_projector)
    flops = [count_flops(*parts, None, prompt), count_flops(*parts, kept_mean, prompt)]
    return {"pictures": pictures, "flops": flops, "latency": latency}


def cost_table(flops: list[FlopCount], latency: dict[str, dict[str, float]], tokens: dict[str, Any]) -> Table:
    """Per stage: MFLOPs and milliseconds without and with pruning."""
    rows = []
    stages = (
        ("vision and projector", ("vision", "projector"), "vision"),
        ("pruner", ("pruner",), "pruner"),
        ("language model", ("llm",), "llm"),
        ("everything", ("total",), "total"),
    )
    for title, parts, stage in stages:
        work = [sum(getattr(count, part) for part in parts) / 1e6 for count in flops]
        rows.append(
            (title, *(f"{w:.1f}" for w in work), f"{latency['none'][stage]:.1f}", f"{latency['pruned'][stage]:.1f}")
        )
    note = (
        f"FLOPs (a multiply-add counts two) for {round(tokens['mean'])} kept tokens (the mean over wide starts) of "
        f"{tokens['of']}. Latency: median "
        "of alternating calls with one sample on this machine's CPU; 'everything' includes preparing the images. In a "
        "7B policy nearly all of it is the language model's, so the same share of tokens saves more there."
    )
    return Table(
        "Cost of one policy query",
        ("stage", "MFLOPs, all tokens", "MFLOPs, pruned", "ms, all tokens", "ms, pruned"),
        rows,
        note,
    )


def clips(paths: Paths, results: Results) -> list[Clip]:
    """One rollout video per task, as the evaluation recorded it."""
    found: dict[int, Clip] = {}
    for episode in results.episodes:
        if episode.video and episode.task_index not in found:
            outcome = "solved" if episode.success else "not solved"
            content = (paths.evaluation("wide") / episode.video).read_bytes()
            caption = (
                f"initial state {episode.initial_state}, {outcome}, {np.mean(episode.tokens_kept):.1f} tokens kept"
            )
            video = Media("video/mp4", content)
            found[episode.task_index] = Clip(episode.instruction, video, caption, autoplay=True)
    return list(found.values())


def demo_commands(config: DemoConfig) -> str:
    """Every command of the demo."""
    return "\n".join(shlex.join(command) for stage in STAGES for command in stage_commands(config, stage))


def stage_table(config: DemoConfig) -> Table:
    """How long the stages took that are done; the report cannot know its own time."""
    files = {stage: Paths(config.output_dir, config.suffix).stage(stage) for stage in STAGES if stage != "report"}
    seconds = {stage: json.loads(file.read_text())["seconds"] for stage, file in files.items() if file.is_file()}
    rows = [(stage, duration(time)) for stage, time in seconds.items()]
    return Table("Stage times", ("stage", "time"), rows, totals=[("together", duration(sum(seconds.values())))])


def versions_table(results: Results) -> Table:
    """Software and machine, as they were recorded."""
    facts = {**results.versions, "renderer": results.run["rendering_backend"], "git commit": results.run["git_commit"]}
    return Table("Versions", ("part", "version"), [(name, str(value)) for name, value in facts.items()], numeric=False)
