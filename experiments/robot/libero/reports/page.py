"""The report of one or several evaluations: `results.json` and the videos beside it as a page and a Markdown file."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.robot.libero.comparison.caveats import evaluation_warnings
from experiments.robot.libero.reports.cost import latency_section, tokens_section
from experiments.robot.libero.reports.evaluation import (
    CONTROL_TEXT,
    Evaluation,
    initial_states_text,
    load_evaluations,
)
from experiments.robot.libero.reports.groups import Group, group_evaluations, suites
from experiments.robot.libero.reports.protocol import assumptions, commands, protocol_table, versions_table
from experiments.robot.libero.reports.rollouts import rollout_sections
from experiments.robot.libero.reports.success import success_section, whole_count
from experiments.robot.libero.results.measures import latency_text, waiting_text
from experiments.robot.libero.results.naming import policy_name
from experiments.robot.libero.settings.flags import MAX_EMBEDDED_MB
from prismatic.report.data import Headline, ReportData, Section, counted, duration
from prismatic.report.html import write_report
from prismatic.report.markdown import write_markdown
from prismatic.report.media import MediaFiles
from prismatic.significance import wilson_interval

HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"


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
    groups = group_evaluations(evaluations)
    wholes = [group.whole for group in groups]
    rollouts = rollout_sections(evaluations, files)
    sections = [
        success_section(groups),
        *rollouts[:2],
        tokens_section(wholes),
        latency_section(wholes),
        *rollouts[2:],
        Section("Protocol", [protocol_table(groups), *assumptions(groups)]),
        Section("Commands and versions", [*commands(groups), versions_table(groups)]),
    ]
    return ReportData(
        title=f"LIBERO evaluation: {', '.join(suites(evaluations))}",
        summary=[_summary(groups)],
        alerts=[*alerts(evaluations, groups), *unembedded(files)],
        headlines=headlines(wholes),
        sections=sections,
        footer="Rates carry Wilson 95 % intervals. Invalid rollouts count as neither success nor failure.",
    )


def _summary(groups: Sequence[Group]) -> str:
    """Who was evaluated on what, and how it went; of several evaluations only who."""
    policies = list(dict.fromkeys(_policy_text(group.whole) for group in groups))
    evaluations = [part for group in groups for part in group.parts]
    if len(evaluations) > 1:
        return f"{len(evaluations)} evaluations of {'; '.join(policies)}."
    results, summary = evaluations[0].results, evaluations[0].results.summary()
    config, count, seconds = results.config, summary["all"], results.run.get("seconds")
    time = f", in {duration(seconds)}" if seconds is not None else ""
    names = str(config.get("task_suite_name", "an unnamed suite")).replace(",", ", ")
    return (
        f"{policies[0]} solved {count['successes']} of {counted(count['trials'], 'rollout')} ({_rate(count)}) over "
        f"{counted(len(summary['tasks']), 'task')} of {names} from "
        f"{initial_states_text(evaluations[0])}{time}."
    )


def _policy_text(evaluation: Evaluation) -> str:
    policy = evaluation.results.policy
    parameters = policy.get("parameters")  # a server's own words, where the policy is behind one
    size = f"{_million(parameters)} parameters, " if isinstance(parameters, int | float) else ""
    return f"{policy_name(policy)} ({size}pruner {policy.get('pruner', 'unknown')})"


def _million(count: float) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _rate(count: dict[str, Any]) -> str:
    """`67 %, 95 % interval 30 to 90`."""
    if count["rate"] is None:
        return "no valid rollout"
    low, high = (100 * edge for edge in count["interval_95"])
    return f"{100 * count['rate']:.0f} %, 95 % interval {low:.0f} to {high:.0f}"


def alerts(evaluations: Sequence[Evaluation], groups: Sequence[Group]) -> list[str]:
    """What must be known before the numbers are read."""
    found = [
        f"Incomplete: {evaluation.name} did not get to its end. The figures are those of the "
        f"{counted(len(evaluation.results.episodes), 'rollout')} that it recorded; those of later tasks may be missing."
        for evaluation in evaluations
        if not evaluation.complete
    ]
    for group in groups:
        if control := group.whole.control:
            meaning = CONTROL_TEXT.get(control, "not an ordinary evaluation")
            found.append(f"Control ({control.replace('_', ' ')}): in {group.name}, {meaning}.")
    for group in groups:
        episodes = group.whole.results.episodes
        if invalid := sum(episode.invalid is not None for episode in episodes):
            found.append(
                f"Invalid: {invalid} of {counted(len(episodes), 'rollout')} of {group.name} ended in an error."
            )
    notes = [note for group in groups for note in group.notes]
    notes += evaluation_warnings((group.name, group.results) for group in groups)
    return [*found, *(f"Mind: {note}." for note in notes)]


def unembedded(files: MediaFiles) -> list[str]:
    """That clips lie beside the page, where some do."""
    if not files.linked:
        return []
    total, links = files.embedded + files.linked, "is a link" if files.linked == 1 else "are links"
    return [
        f"Not all clips and pictures are inside this page: {files.embedded} of {total} are "
        f"({files.used_bytes / 1e6:.1f} MB), {files.linked} {links} to files beside it. Keep page and files "
        f"together, or raise --max_embedded_mb (now {files.max_bytes / 1e6:g})."
    ]


def headlines(evaluations: Sequence[Evaluation]) -> list[Headline]:
    """Success of each evaluation or group; of a single one also tokens, time per policy query and steps."""
    found = []
    for evaluation in evaluations:
        count, (solved, trials) = evaluation.results.summary()["all"], whole_count(evaluation)
        solved_text = _rate(count)
        if trials < count["trials"]:
            low, high = wilson_interval(solved, trials)
            solved_text = f"{100 * solved / trials:.0f} %, 95 % interval {100 * low:.0f} to {100 * high:.0f}"
            solved_text += f" ({counted(trials, 'initial state')}, with several seeds)"
        text = f"{evaluation.label}, solved: {solved_text}" if len(evaluations) > 1 else f"solved: {solved_text}"
        found.append(Headline(f"{count['successes']} of {count['trials']}", text))
    if len(evaluations) > 1:
        return found
    (evaluation,) = evaluations
    summary = evaluation.results.summary()
    if tokens := summary["tokens_kept"]:
        found.append(Headline(f"{tokens['mean']:.1f} of {tokens['of']}", "visual tokens kept on average"))
    if latency := summary["latency_ms"]:
        waiting, tail = waiting_text(latency), f"95th percentile {latency['p95']:.1f} ms"
        label = f"per policy query{' and waiting' * latency['includes_waiting']}, median ({tail})"
        text = latency_text({**latency, "includes_waiting": False})
        found.append(Headline(text, f"{label}; waiting apart: {waiting}" if waiting else label))
    numbers = summary["all"]
    if (steps := numbers["mean_steps_to_success"]) is not None:
        label = f"to a success on average ({numbers['mean_seconds_to_success']:.1f} s of simulated time)"
        found.append(Headline(f"{steps:.0f} steps", label))
    if (jerk := numbers["mean_jerk"]) is not None:
        found.append(Headline(f"{jerk:.1f} m/s³", "jerk of the end effector in successes (RMS)"))
    return found
