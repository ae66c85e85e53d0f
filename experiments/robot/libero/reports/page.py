"""The report of one or several evaluations: `results.json` and the videos beside it as a page and a Markdown file."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.reports.cost import latency_section, query_times, tokens_section
from experiments.robot.libero.reports.evaluation import (
    CONTROL_TEXT,
    Evaluation,
    initial_states_text,
    load_evaluations,
    state_numbers_text,
)
from experiments.robot.libero.reports.rollouts import rollout_sections
from experiments.robot.libero.results.comparison import compare
from experiments.robot.libero.results.naming import policy_name
from experiments.robot.libero.results.success import success_rows, suite_order
from experiments.robot.libero.settings.flags import MAX_EMBEDDED_MB
from prismatic.report.charts import RateBars
from prismatic.report.data import (
    Cell,
    CodeBlock,
    Headline,
    Notes,
    ReportData,
    Row,
    Section,
    Table,
    counted,
    duration,
    share_cell,
)
from prismatic.report.html import write_report
from prismatic.report.markdown import write_markdown
from prismatic.report.media import MediaFiles

HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"

Outcomes = dict[tuple[str, int | None], tuple[int, int]]


def write_reports(
    paths: Sequence[str | Path], output_dir: str | Path | None = None, max_embedded_mb: float = MAX_EMBEDDED_MB
) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` on results files, or the ones inside folders; returns their paths.

    Args:
        output_dir: None: the folder of the results, of several the one that holds them all.
        max_embedded_mb: Clips and pictures beyond it are linked relatively, not embedded.

    Raises:
        FileNotFoundError: where there are no results.
        ValueError: for results of another schema, one file given twice, no file at all, or a limit that is negative or
            not finite.
    """
    if not paths:
        raise ValueError("no results were given; name results.json files or the folders that hold them")
    if not (math.isfinite(max_embedded_mb * 1e6) and max_embedded_mb >= 0):
        raise ValueError(f"max_embedded_mb is {max_embedded_mb}; give 0 (embed nothing) or more, a finite number")
    evaluations = load_evaluations(paths)
    folder = Path(output_dir or os.path.commonpath([evaluation.folder for evaluation in evaluations]))
    data = report_data(evaluations, MediaFiles(folder, round(max_embedded_mb * 1e6)))
    return write_report(data, folder / HTML_NAME), write_markdown(data, folder / MARKDOWN_NAME)


def report_data(evaluations: Sequence[Evaluation], files: MediaFiles) -> ReportData:
    """Everything in the report.

    Args:
        files: Takes up clips and pictures, and knows where the report will be.
    """
    rollouts = rollout_sections(evaluations, files)
    sections = [
        success_section(evaluations),
        *rollouts[:2],
        tokens_section(evaluations),
        latency_section(evaluations),
        *rollouts[2:],
        Section("Protocol", [protocol_table(evaluations), *assumptions(evaluations)]),
        Section("Commands and versions", [*commands(evaluations), versions_table(evaluations)]),
    ]
    given = ",".join(str(e.results.config.get("task_suite_name", "unknown suite")) for e in evaluations)
    suites = list(dict.fromkeys(given.split(",")))
    return ReportData(
        title=f"LIBERO evaluation: {', '.join(suites)}",
        summary=[_summary(evaluations)],
        alerts=alerts(evaluations, files),
        headlines=headlines(evaluations),
        sections=sections,
        footer="Rates carry Wilson 95 % intervals. Invalid rollouts count as neither success nor failure.",
    )


def _summary(evaluations: Sequence[Evaluation]) -> str:
    """Who was evaluated on what, and how it went; of several evaluations only who."""
    policies = list(dict.fromkeys(_policy_text(evaluation) for evaluation in evaluations))
    if len(evaluations) > 1:
        return f"{len(evaluations)} evaluations of {'; '.join(policies)}."
    results, summary = evaluations[0].results, evaluations[0].results.summary()
    config, count, seconds = results.config, summary["all"], results.run.get("seconds")
    time = f", in {duration(seconds)}" if seconds is not None else ""
    suites = str(config.get("task_suite_name", "an unnamed suite")).replace(",", ", ")
    return (
        f"{policies[0]} solved {count['successes']} of {counted(count['trials'], 'rollout')} ({_rate(count)}) over "
        f"{counted(len(summary['tasks']), 'task')} of {suites} from "
        f"{initial_states_text(evaluations[0])}{time}."
    )


def _policy_text(evaluation: Evaluation) -> str:
    policy = evaluation.results.policy
    parameters = policy.get("parameters")  # a server's own words, where the policy is behind one
    size = f"{parameters / 1e6:.1f} million parameters, " if isinstance(parameters, int | float) else ""
    return f"{policy_name(policy)} ({size}pruner {policy.get('pruner', 'unknown')})"


def _rate(count: dict[str, Any]) -> str:
    """`67 %, 95 % interval 30 to 90`."""
    if count["rate"] is None:
        return "no valid rollout"
    low, high = (100 * edge for edge in count["interval_95"])
    return f"{100 * count['rate']:.0f} %, 95 % interval {low:.0f} to {high:.0f}"


def alerts(evaluations: Sequence[Evaluation], files: MediaFiles) -> list[str]:
    """What must be known before the numbers are read."""
    found = []
    for evaluation in evaluations:
        episodes = evaluation.results.episodes
        if not evaluation.complete:
            found.append(
                f"Incomplete: {evaluation.name} did not get to its end. The figures are those of the "
                f"{counted(len(episodes), 'rollout')} that it recorded; those of later tasks may be missing."
            )
        if evaluation.control:
            meaning = CONTROL_TEXT.get(evaluation.control, "not an ordinary evaluation")
            found.append(f"Control ({evaluation.control.replace('_', ' ')}): in {evaluation.name}, {meaning}.")
        if invalid := sum(episode.invalid is not None for episode in episodes):
            found.append(
                f"Invalid: {invalid} of {counted(len(episodes), 'rollout')} of {evaluation.name} ended in an error."
            )
    if files.linked:
        total, links = files.embedded + files.linked, "is a link" if files.linked == 1 else "are links"
        found.append(
            f"Not all clips and pictures are inside this page: {files.embedded} of {total} are "
            f"({files.used_bytes / 1e6:.1f} MB), {files.linked} {links} to files beside it. Keep page and files "
            f"together, or raise --max_embedded_mb (now {files.max_bytes / 1e6:g})."
        )
    return found


def headlines(evaluations: Sequence[Evaluation]) -> list[Headline]:
    """Success of each evaluation; of a single one also tokens, time per policy query and steps."""
    found = []
    for evaluation in evaluations:
        count = evaluation.results.summary()["all"]
        text = f"{evaluation.label}, solved: {_rate(count)}" if len(evaluations) > 1 else f"solved: {_rate(count)}"
        found.append(Headline(f"{count['successes']} of {count['trials']}", text))
    if len(evaluations) > 1:
        return found
    (evaluation,) = evaluations
    summary = evaluation.results.summary()
    if tokens := summary["tokens_kept"]:
        found.append(Headline(f"{tokens['mean']:.1f} of {tokens['of']}", "visual tokens kept on average"))
    if (times := query_times(evaluation).whole).size:
        median, high = np.percentile(times, (50, 95))
        found.append(Headline(f"{median:.1f} ms", f"per policy query, median (95th percentile {high:.1f} ms)"))
    if (steps := summary["all"]["mean_steps_to_success"]) is not None:
        seconds = evaluation.seconds_per_step
        time = f" ({steps * seconds:.1f} s of simulated time)" if seconds else ""
        found.append(Headline(f"{steps:.0f} steps", f"to a success on average{time}"))
    return found


def outcomes(evaluation: Evaluation) -> dict[str, Outcomes]:
    """Label -> task -> (successes, trials); where another task's instruction was given also of that goal."""
    rows = success_rows(evaluation.results.episodes)
    own = {(row.suite, row.task_index): (row.successes, row.trials) for row in rows}
    instructed = {(row.suite, row.task_index): row.other_goal for row in rows if row.other_goal is not None}
    if not instructed:
        return {evaluation.label: own}
    return {f"{evaluation.label}: own goal": own, f"{evaluation.label}: the instructed goal": instructed}


def success_section(evaluations: Sequence[Evaluation]) -> Section:
    """Bars and a table, one row per task and one column per evaluation."""
    columns = {label: counts for evaluation in evaluations for label, counts in outcomes(evaluation).items()}
    every = [row for evaluation in evaluations for row in success_rows(evaluation.results.episodes)]
    tasks = {(row.suite, row.task_index): row.name for row in every if row.is_task}
    if not tasks:
        return Section("Success", [])
    keys = sorted(tasks, key=lambda key: (suite_order(key[0]), key[1]))
    bars = RateBars(
        "Success per task",
        [tasks[key] for key in keys],
        {label: [counts.get(key, (0, 0)) for key in keys] for label, counts in columns.items()},
    )
    single = evaluations[0] if len(evaluations) == 1 else None
    suites = len({suite for suite, _ in keys}) > 1
    rows: list[Row] = [
        (
            Cell(tasks[key], sort=float(place), note=f"{key[0] if suites else 'task'} {key[1]}"),
            *(share_cell(*counts.get(key, (0, 0))) for counts in columns.values()),
            *(_details(single, key) if single else ()),
        )
        for place, key in enumerate(keys)
    ]
    names = list(dict.fromkeys(suite for suite, _ in keys))
    totals: list[Row] = [
        (
            suite,
            *(share_cell(*_sum(c, suite)) for c in columns.values()),
            *(_details(single, (suite, None)) if single else ()),
        )
        for suite in (names if suites else ())
    ]
    overall = [_mean_of_suites(c, names) if suites else share_cell(*_sum(c)) for c in columns.values()]
    name = "mean of suites" if suites else "all"
    totals.append((name, *overall, *(_details(single, ("", None)) if single else ())))
    heads = ["solved"] if single and len(columns) == 1 else list(columns)
    details = ("invalid", "steps to success", "tokens kept", "ms per policy query") if single else ()
    note = "Successes of valid rollouts, the rate, and its Wilson 95 % interval in percent."
    table = Table("Tasks", ("task", *heads, *details), rows, note, totals=tuple(totals), sortable=True)
    return Section("Success", [bars, table, *differences(evaluations)])


def differences(evaluations: Sequence[Evaluation]) -> list[CodeBlock]:
    """Of several evaluations: how far each is from the first on the episodes they share, and the command for more.

    Those that share no episode, or measure something else under one name, cannot be compared; the command says why.
    """
    found = []
    for other in evaluations[1:]:
        first, names = evaluations[0], (evaluations[0].name, other.name)
        try:
            comparison = compare([first.results], [other.results], names)
        except ValueError as error:
            note = f"Not compared: {error}"
        else:
            note = " ".join([comparison.verdict, *(f"Mind: {warning}." for warning in comparison.warnings)])
        sides = [shlex.quote(evaluation.path or str(evaluation.folder)) for evaluation in (first, other)]
        command = f"lightvla compare {sides[0]} --against {sides[1]} --names {shlex.join(names)}"
        found.append(CodeBlock(f"The difference between {names[0]} and {names[1]}", command, note))
    return found


def _sum(counts: Outcomes, suite: str | None = None) -> tuple[int, int]:
    """Successes and trials of a suite's tasks; None: of all."""
    own = [count for (name, index), count in counts.items() if index is not None and suite in (None, name)]
    return sum(solved for solved, _ in own), sum(trials for _, trials in own)


def _mean_of_suites(counts: Outcomes, suites: Sequence[str]) -> Cell:
    """The mean of the suites' rates; a dash where one was not tried."""
    sums = [_sum(counts, suite) for suite in suites]
    if not all(trials for _, trials in sums):
        return Cell("–", sort=-1.0)
    rate = float(np.mean([solved / trials for solved, trials in sums]))
    return Cell(f"{100 * rate:.1f} %", sort=rate)


def _details(evaluation: Evaluation, key: tuple[str, int | None]) -> tuple[str, ...]:
    """Invalid rollouts, mean steps to success, mean tokens kept, median milliseconds per query."""
    rows = success_rows(evaluation.results.episodes)
    row = next(row for row in rows if (row.suite, row.task_index) == key)
    return (
        str(row.invalid),
        "–" if row.steps_to_success is None else f"{row.steps_to_success:.0f}",
        f"{row.tokens_kept['mean']:.1f}" if row.tokens_kept else "–",
        f"{row.latency_ms['median']:.1f}" if row.latency_ms else "–",
    )


def protocol_table(evaluations: Sequence[Evaluation]) -> Table:
    """What was done, one column per evaluation."""
    facts = [_protocol(evaluation) for evaluation in evaluations]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [(name, *(one.get(name, "–") for one in facts)) for name in names]
    return Table("What was done", ("setting", *(evaluation.name for evaluation in evaluations)), rows, numeric=False)


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
        "open-loop steps of a chunk": evaluation.open_loop_steps,
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


def assumptions(evaluations: Sequence[Evaluation]) -> list[Notes]:
    """What was assumed about the checkpoints because they do not say."""
    found = []
    for evaluation in evaluations:
        if items := evaluation.results.policy.get("assumptions"):
            found.append(Notes([str(item) for item in items], f"Assumed about the checkpoint of {evaluation.name}"))
    return found or [Notes(["Nothing had to be assumed about the checkpoint."], "Assumptions")]


def commands(evaluations: Sequence[Evaluation]) -> list[CodeBlock]:
    """The command line of each evaluation."""
    found = []
    for evaluation in evaluations:
        words = ["python", *map(str, evaluation.results.run.get("command") or ["unknown"])]
        command = " ".join(("\\\n    " if word.startswith("--") else "") + shlex.quote(word) for word in words)
        note = f"Code at {evaluation.results.run.get('git_commit', 'an unknown commit')}."
        found.append(CodeBlock(evaluation.name, command, note))
    return found


def versions_table(evaluations: Sequence[Evaluation]) -> Table:
    names = list(dict.fromkeys(name for evaluation in evaluations for name in evaluation.results.versions))
    rows = [(name, *(str(e.results.versions.get(name, "–")) for e in evaluations)) for name in names]
    return Table("Versions", ("package", *(evaluation.name for evaluation in evaluations)), rows, numeric=False)
