"""The table of a benchmark and what goes with it: for the terminal, as Markdown, as JSON, as a picture."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prismatic.atomic_files import write_atomically
from prismatic.benchmark.accounting import COMPONENTS
from prismatic.benchmark.config import BenchmarkConfig, arms_of
from prismatic.benchmark.measure import title
from prismatic.benchmark.summary import Summary
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.sites import LlamaKeys
from prismatic.report.data import Notes, ReportData, Section, Table, counted
from prismatic.report.markdown import write_markdown

SCHEMA_VERSION = 1
ARM_COLUMNS = ("engine", "pruner", "tokens", "dtype", "threads")
"""Say which arm a row is of; the others hold figures."""


def main_table(rows: Sequence[Summary], device: dict[str, Any]) -> Table:
    """A row per arm. `device` as `describe_machine` tells it."""
    first = rows[0].measured.arm
    on_gpu = "memory_bytes" in device
    columns = (
        *ARM_COLUMNS, "p50 ms", "p95 ms", f"x {first.setting.engine}",
        f"x {first.setting.engine} {first.pruner}", "GFLOP", "weights MB", "memory MB",
        "kernels" if on_gpu else "aten calls", "of floor", "cold start s", "images ms", "off by",
    )  # fmt: skip
    return Table("", columns, [_cells(row) for row in rows], note=f"{device['device']}, torch {device['torch']}")


def _cells(row: Summary) -> list[str]:
    arm, account = row.measured.arm, row.measured.account
    return [
        arm.setting.engine,
        arm.pruner,
        kept_text(row),
        row.measured.dtype,
        str(arm.setting.threads or "all"),
        f"{1e3 * row.p50:.1f}",
        f"{1e3 * row.p95:.1f}",
        "–" if row.than_first_engine is None else str(row.than_first_engine),
        str(row.than_first_arm),
        f"{row.flops / 1e9:.4g}{'' if row.counter_agrees else ' (!)'}",
        f"{row.weight_bytes / 1e6:.0f}",
        "–" if row.memory is None else f"{row.memory / 1e6:.0f}",
        str(account["launched"]),
        f"{100 * row.floor / row.p50:.0f} %",
        "–" if row.cold is None else f"{row.cold['total']:.1f}",
        f"{1e3 * row.preparing:.1f}",
        "–" if row.off is None else f"{row.off:.1g}",
    ]


def kept_text(row: Summary) -> str:
    """`77 set`, `44 to 80 picked`, `512`, and where nothing is dropped `90 to 97 anew`."""
    fewest, most = row.kept
    number = str(fewest) if fewest == most else f"{fewest} to {most}"
    if row.measured.arm.pruner == "none":
        return number
    return f"{number} {'set' if row.tokens_set else 'anew' if _reuses(row) else 'picked'}"


def _reuses(row: Summary) -> bool:
    """Whether the arm's pruner drops nothing, and computes anew what changed."""
    return isinstance(PrunerSpec.parse(row.measured.arm.pruner).site, LlamaKeys)


def explanations(rows: Sequence[Summary], config: BenchmarkConfig, machine: dict[str, Any]) -> list[str]:
    """What the columns mean, how it was measured, and what does not agree."""
    first, ceilings = rows[0].measured.arm, {}
    for row in rows:
        threads = row.measured.arm.setting.threads
        on = f"{row.measured.dtype}{', ' + counted(threads, 'thread') if threads else ''}"
        ceilings[on] = f"{on}: {row.measured.ceilings['flops'] / 1e9:.4g} GFLOP/s"
    load = machine["load_average"]
    lines = [
        f"{config.repeats} calls of every arm, in turn with all others and every second time in the opposite order, "
        f"behind {config.warm_up} that do not count; batch of one, {rows[0].measured.account['prompt_tokens']} prompt "
        "tokens. p50 and p95 are of the model: from prepared inputs to actions on the CPU; images ms comes before it.",
        f"x {first.setting.engine}: how many times as fast as that engine at equal pruner, dtype and threads; "
        f"x {first.setting.engine} {first.pruner}: as that arm at equal dtype and threads; ratios of medians, with a "
        "bootstrapped 95 % interval.",
        "GFLOP: by formula, a multiply-add counts two; matrix products and convolutions only.",
        "weights MB: what an action reads of them, per image where images pass the ViTs one by one.",
        "of floor: the least time for this action (the larger of work at the peak and of reading the weights once, "
        f"component after component) as a share of p50; peaks measured here: {'; '.join(ceilings.values())}; "
        f"{rows[0].measured.ceilings['bytes'] / 1e9:.3g} GB/s copied.",
        "memory MB: at the peak of a call in a fresh process, above what it took before there was a policy. cold "
        "start: from process start to the first action.",
        f"off by: largest difference of actions from {first.setting.engine}'s, in the robot's units.",
    ]
    if any(row.tokens_set for row in rows):
        lines.append(f"lightvla was made to keep exactly {config.tokens} tokens (set), after all of its work.")
    if any(_reuses(row) for row in rows):
        lines.append(
            "anew: visual tokens whose keys and values are computed; those of the others are the last call's, and all "
            "are attended to. The calls are one session, whose first computes all; GFLOP is of the second."
        )
    if config.preset:
        lines.append(
            f"Preset {config.preset}, random weights: times and work mean something, actions and picks do not."
        )
    if load is not None and load > 0.5 * machine["cores"]:
        lines.append(f"The machine's load was {load:.1f} on {machine['cores']} cores: trust ratios, not times.")
    measured = {row.measured.arm for row in rows}
    if left_out := {arm.pruner for arm in arms_of(config) if arm not in measured}:
        lines.append(f"reference does not run {', '.join(sorted(left_out))}: the research code has no pruner there.")
    for row in rows:
        asked, ran = row.measured.arm.setting.engine, row.measured.account["engine"]
        if ran["name"] != asked and asked != "auto":
            lines.append(f"(!) {title(row.measured.arm)}: ran {ran['name']}: {ran.get('instead_of_compiled', ran)}")
    lines += [
        f"(!) {title(row.measured.arm)}: the formula says {row.flops / 1e9:.4g} GFLOP and torch's counter "
        f"{row.flops_counted / 1e9:.4g}, more than 1 % apart."
        for row in rows
        if row.flops_counted is not None and not row.counter_agrees
    ]
    if graphs := [title(row.measured.arm) for row in rows if row.flops_counted is None]:
        lines.append(f"Not counted by torch's counter, which does not see into CUDA graphs: {'; '.join(graphs)}.")
    return lines


def component_table(rows: Sequence[Summary]) -> Table:
    """GFLOP and megabytes of weights by component, of the arms that differ in them."""
    found = {}
    for row in rows:
        account = row.measured.account
        cells = [
            f"{account['flops'][name] / 1e9:.4g} / {account['weight_bytes'][name] / 1e6:.4g}" for name in COMPONENTS
        ]
        arm = row.measured.arm
        found[f"{arm.setting.engine}, {arm.pruner}, {row.measured.dtype}"] = cells
    return Table("", ("arm", *COMPONENTS), [[name, *cells] for name, cells in found.items()], "GFLOP / MB of weights")


def cold_table(rows: Sequence[Summary]) -> Table | None:
    """Seconds from process start to first action by part; None where none was measured."""
    started = [(title(row.measured.arm), row.cold) for row in rows if row.cold is not None]
    if not started:
        return None
    parts = list(started[0][1])
    return Table("", ("arm", *parts), [[name, *(f"{cold[part]:.2f}" for part in parts)] for name, cold in started])


def stage_table(rows: Sequence[Summary]) -> Table:
    """Median milliseconds by stage, the quickest call, and the median of what the process computed in a whole call."""
    stages = ("preprocessing", "vision", "pruner", "llm", "model")
    lines = []
    for row in rows:
        calls = [call["seconds"] for call in row.measured.calls]
        medians = [statistics.median(call.get(stage, 0.0) for call in calls) for stage in stages]
        values = (*medians, row.fastest, row.computing)
        ratios = [
            "–" if ratio is None else str(ratio)
            for ratio in (row.computing_than_first_engine, row.computing_than_first_arm)
        ]
        lines.append([title(row.measured.arm), *(f"{1e3 * value:.1f}" for value in values), *ratios])
    first = rows[0].measured.arm
    compared = (f"x {first.setting.engine}", f"x {first.setting.engine} {first.pruner}")
    return Table("", ("arm", *stages, "model, quickest", "computing", *compared), lines)


def write_all(
    rows: Sequence[Summary], config: BenchmarkConfig, machine: dict[str, Any], command: str
) -> dict[str, Path]:
    """Write benchmark.json, benchmark.md and, where matplotlib is installed, benchmark.png; returns them by suffix."""
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in config.__dict__.items()}
    arms = [{**row.measured.to_json(), "summary": row.to_json()} for row in rows]
    found = {"schema_version": SCHEMA_VERSION, "command": command, "machine": machine, "flags": flags, "arms": arms}
    sections = [
        Section("Arms", [main_table(rows, machine), Notes(explanations(rows, config, machine))]),
        Section("Work and weights by component", [component_table(rows)]),
        Section(
            "Milliseconds by stage",
            [stage_table(rows)],
            "Medians. Computing is what all threads of the process computed in a whole call, images included: other "
            "processes do not lengthen it by taking the cores. The ratios are of it.",
        ),
    ]
    if (cold := cold_table(rows)) is not None:
        sections.append(Section("Cold start", [cold], "Seconds from process start to first action."))
    data = ReportData("What an action costs", [command], sections=sections)
    written = {
        "json": write_atomically(folder / "benchmark.json", json.dumps(found, indent=1) + "\n"),
        "md": write_markdown(data, folder / "benchmark.md"),
    }
    if (picture := draw(rows, main_table(rows, machine).note, folder / "benchmark.png")) is not None:
        written["png"] = picture
    return written


def draw(rows: Sequence[Summary], device: str, path: Path) -> Path | None:
    """Bars of p50 with a line to p95, below the device's name; None, and nothing is written, without matplotlib."""
    try:
        from prismatic.report.figures import COLOURS, INK, chart_axes
    except ImportError:
        return None
    engines = list(dict.fromkeys(row.measured.arm.setting.engine for row in rows))
    with chart_axes(9.0, 0.8 + 0.3 * len(rows)) as axes:
        for place, row in enumerate(rows):
            colour = COLOURS[engines.index(row.measured.arm.setting.engine) % len(COLOURS)]
            axes.barh(place, 1e3 * row.p50, 0.7, color=colour, alpha=0.8)
            axes.hlines(place, 1e3 * row.p50, 1e3 * row.p95, color=INK, linewidth=1.3)
            both = f" {1e3 * row.p50:.3g} – {1e3 * row.p95:.3g}"
            axes.text(1e3 * row.p95, place, both, va="center", fontsize=9, color=INK)
        axes.set_yticks(range(len(rows)), [f"{title(row.measured.arm)}, {kept_text(row)}" for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3e3 * max(row.p95 for row in rows))
        axes.set_title(device, color=INK, fontsize=10, loc="right")
        axes.set_xlabel("milliseconds of the model: median – p95", color=INK)
        axes.grid(visible=False, axis="y")
        axes.figure.savefig(path, dpi=150)
    return path
