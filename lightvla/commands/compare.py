"""Tables of evaluations, and whether one policy is better than another.

    lightvla compare OURS/results.json --against THEIRS/results.json --names ours theirs
    lightvla compare RUN/results.json --format latex --output table.tex

With `--against` rollouts on identical episodes are paired. Each side may be several files, one per suite or seed.
Without it one file gives a row per task; several give a row per policy, and a column per suite. Folders stand for the
results.json in them. Ends with 0, or with 2 when the results cannot be read or compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from experiments.robot.libero.comparison.compare import Comparison, compare, p_text, plan_unpaired, points, span
from experiments.robot.libero.comparison.copies import without_copies
from experiments.robot.libero.comparison.policies_table import overall_rate, policies_table
from experiments.robot.libero.comparison.table_formats import WARNING, Table, to_csv, to_latex, to_markdown
from experiments.robot.libero.comparison.tables import (
    comparison_table,
    outcome_name,
    outcomes_of,
    result_table,
)
from experiments.robot.libero.results.journal import load_results
from experiments.robot.libero.results.naming import distinct_names, policy_names
from experiments.robot.libero.results.results import FILE_NAME, Results
from lightvla.flags import TABLE_SUFFIXES, compare_parser
from prismatic.command_status import UNUSABLE, print_error
from prismatic.significance import PairedCounts

WRITERS: dict[str, Callable[[Table], str]] = {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}

_WIDTH = 110  # Of text that does not go to a terminal.
_BAR = 16


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    return command(compare_parser().parse_args(arguments))


def command(options: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    try:
        kind = options.format or _kind_of(options.output)
        comparison, table, plan = _evaluate(options)
    except (OSError, ValueError) as error:
        print_error(error)
        return UNUSABLE
    beside = Console(stderr=True)
    if kind == "text" or options.output:
        terminal = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
        show(table, comparison, plan, terminal)
    if options.output:
        write(Path(options.output), kind, table, comparison, plan)
        beside.print(f"{kind}: {escape(str(options.output))}", highlight=False, soft_wrap=True)
    elif kind != "text":
        sys.stdout.write(WRITERS[kind](table))
        # CSV has no place for notes; the other formats have the verdict among theirs.
        for line in [*(table.notes if kind == "csv" else []), *plan]:
            beside.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


def show(table: Table, comparison: Comparison | None, plan: Sequence[str], console: Console) -> None:
    """The table for the terminal; below it notes, warnings, what is planned, and last the verdict."""
    console.print(escape(table.title), style="bold", highlight=False)
    console.print(drawn_comparison(comparison) if comparison else drawn_table(table))
    lines = [
        *((note, "yellow" if note.startswith(WARNING) else "dim") for note in table.notes),
        *((line, "") for line in plan),
    ]
    if comparison is not None:
        colour = "bold green" if comparison.distinguishable else "bold yellow"
        verdict = comparison.verdict
        lines = [*(line for line in lines if line[0] != verdict), ("", ""), (verdict, colour)]
    for text, style in lines:
        console.print(escape(text), style=style, highlight=False, soft_wrap=not console.is_terminal)


def drawn_table(table: Table) -> RichTable:
    """A table as it stands."""
    drawn = _empty(table.headings)
    first_total = len(table.rows) - table.totals
    for number, row in enumerate(table.rows):
        drawn.add_row(*map(escape, row), style="bold" * (number >= first_total), end_section=number == first_total - 1)
    return drawn


def drawn_comparison(comparison: Comparison) -> RichTable:
    """A comparison drawn narrow: intervals below their numbers, and a bar of how the episodes came out."""
    outcomes = outcomes_of(comparison)
    drawn = _empty(("task", *comparison.names, "both/only first/\nonly second/neither", "difference", "p"))
    for column in drawn.columns[3:]:
        column.no_wrap = True
    for number, outcome in enumerate(outcomes):
        total = number >= len(comparison.tasks)
        rates = [
            f"{100 * rate:.1f}\n{_faint(span(ends))}" for rate, ends in zip(outcome.rates, outcome.wilson, strict=True)
        ]
        tally = f"{'/'.join(map(str, outcome.counts))}\n{tally_bar(outcome.counts)}"
        p_value = outcome.p_value if outcome.corrected_p is None else outcome.corrected_p
        drawn.add_row(
            escape(outcome_name(outcome, comparison)),
            *rates,
            tally,
            f"{points(outcome.difference)}\n{_faint(span(outcome.interval, signed=True))}",
            p_text(p_value),
            style="bold" * total,
            end_section=number == len(comparison.tasks) - 1,
        )
    return drawn


def tally_bar(counts: PairedCounts) -> str:
    """Shares of both, only the first, only the second and neither as a bar with rich's colours."""
    ends = [round(float(_BAR * sum(counts[: number + 1]) / counts.trials)) for number in range(4)]
    widths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    parts = (("█", "green"), ("▓", "cyan"), ("▒", "magenta"), ("░", "bright_black"))
    return "".join(f"[not bold {colour}]{mark * width}[/]" for (mark, colour), width in zip(parts, widths, strict=True))


def _empty(headings: Sequence[str]) -> RichTable:
    drawn = RichTable(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        drawn.add_column(escape(heading), justify="right" if number else "left", vertical="top", overflow="fold")
    return drawn


def _faint(text: str) -> str:
    return f"[not bold dim]{text}[/]"


def write(path: Path, kind: str, table: Table, comparison: Comparison | None, plan: Sequence[str]) -> None:
    """Write a file of the given kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        if kind == "text":
            show(table, comparison, plan, Console(file=stream, width=_WIDTH))
        else:
            stream.write(WRITERS[kind](table))


def _evaluate(options: argparse.Namespace) -> tuple[Comparison | None, Table, list[str]]:
    wanted = None if options.plan is None else options.plan / 100
    if wanted is not None and not 0.0 < wanted < 1.0:
        raise ValueError(f"--plan {options.plan:g}: expected a difference in percentage points, above 0 and below 100")
    if options.against and options.names is not None and len(options.names) != 2:
        raise ValueError(f"--names {' '.join(options.names)}: with --against give two names, one for each side")
    _check_given_once([*options.results, *(options.against or [])])
    first = [load_results(path) for path in options.results]
    if options.against:
        second = [load_results(path) for path in options.against]
        names = options.names or distinct_names([first, second], [options.results, options.against])
        comparison = compare(first, second, (names[0], names[1]))
        return comparison, comparison_table(comparison), comparison.plan(wanted) if wanted else []
    if options.names is not None and len(options.names) != len(first):
        raise ValueError(f"--names: {len(options.names)} names for {len(first)} files; name each, a policy's alike")
    policies: dict[str, list[Results]] = {}
    for name, result in zip(options.names or policy_names(first), first, strict=True):
        policies.setdefault(name, []).append(result)
    table = result_table(first[0]) if len(first) == 1 else policies_table(policies)
    return None, table, _plan(policies, wanted) if wanted else []


def _kind_of(output: str | None) -> str:
    """The format that a file's suffix asks for."""
    suffix = Path(output).suffix if output else ".txt"
    if suffix.lower() not in TABLE_SUFFIXES:
        known = ", ".join(f"{name} ({kind})" for name, kind in TABLE_SUFFIXES.items())
        raise ValueError(f"--output {output}: expected a name that ends with one of {known}, or give --format as well")
    return TABLE_SUFFIXES[suffix.lower()]


def _check_given_once(paths: Sequence[str]) -> None:
    given: set[Path] = set()
    for path in map(Path, paths):
        file = (path / FILE_NAME if path.is_dir() else path).resolve()
        if file in given:
            raise ValueError(f"{path}: the same results were given twice; name each results file or folder once")
        given.add(file)


def _plan(policies: dict[str, list[Results]], wanted: float) -> list[str]:
    lines = []
    for name, results in policies.items():
        if (found := overall_rate(without_copies(results, name)[0])) is not None:
            lines += plan_unpaired(name, *found, wanted)
    return lines
