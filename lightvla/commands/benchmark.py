"""Measure what an action costs: work, latency, memory, launches, cold start; engines, pruners and dtypes side by side.

    lightvla benchmark --checkpoint FOLDER
    lightvla benchmark --preset small --random_weights True --tokens 77 --dtypes float32,bfloat16 --threads 1,2

Writes benchmark.json, benchmark.md and benchmark.png into `--output_dir`, and shows the table. Ends with 0, with 1
where formula and counter of an arm's work disagree, or with 2 when flags or checkpoint cannot be used.
"""

import shlex
import sys
from collections.abc import Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from prismatic.benchmark.config import BenchmarkConfig
from prismatic.benchmark.device import describe_machine
from prismatic.benchmark.measure import check, measure, own_dtype
from prismatic.benchmark.summary import Summary, summarize
from prismatic.benchmark.table import ARM_COLUMNS, explanations, main_table, write_all
from prismatic.command_status import STOPPED, UNUSABLE, UNWANTED, print_error
from prismatic.models.precision import check_device
from prismatic.report.data import Table as TableData

_LEAST_FIRST = (
    "images ms", "weights MB", "aten calls", "kernels", "memory MB", "cold start s", "of floor", "off by", "threads",
    "p95 ms", "dtype",
)  # fmt: skip
"""Columns that a narrow window goes without."""


def command(config: BenchmarkConfig) -> int:
    """What the command line runs; returns the exit status."""
    console = Console()
    try:
        device = check_device(config.device or "auto")
        config.device = str(device)
        check(config)
        config.dtypes = config.dtypes or own_dtype(config)
        machine = describe_machine(device)
        with _progress(Console(stderr=True)) as progress:
            task = progress.add_task("")
            rows = summarize(measure(config, lambda what: progress.update(task, description=what)), config.tokens)
        words = f"lightvla benchmark {shlex.join(sys.argv[1:])}"
        written = write_all(rows, config, machine, words)
    except (ValueError, OSError, RuntimeError) as error:
        print_error(error)
        return UNUSABLE
    except KeyboardInterrupt:
        print_error("stopped; nothing was written")
        return STOPPED
    _show(rows, config, machine, console)
    console.print(", ".join(str(path) for path in written.values()), soft_wrap=True)
    return 0 if all(row.counter_agrees for row in rows) else UNWANTED


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def _show(rows: list[Summary], config: BenchmarkConfig, machine: dict[str, object], console: Console) -> None:
    """The table, and what it means."""
    data = main_table(rows, machine)
    left_out = columns_to_leave_out(data, console)
    # What is left is whole whatever the window's width: a table cut off at the right says too little.
    table = _table(data, left_out)
    Console(width=max(_width(table, console), console.width)).print(table, highlight=False)
    if left_out:
        console.print(f"The window has no room for {', '.join(left_out)}, which benchmark.md has.", highlight=False)
    for line in explanations(rows, config, machine):
        console.print(line, markup=False, highlight=False)


def columns_to_leave_out(data: TableData, console: Console) -> list[str]:
    """As few as have the table fit into a terminal's window, those first that say least; none where it is a file."""
    left_out: list[str] = []
    for name in _LEAST_FIRST if console.is_terminal else ():
        if _width(_table(data, left_out), console) <= console.width:
            break
        left_out += [column for column in data.columns if column == name]
    return left_out


def _table(data: TableData, left_out: Sequence[str]) -> Table:
    table = Table(title=data.note, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown = [place for place, name in enumerate(data.columns) if name not in left_out]
    for place in shown:
        justify: Literal["left", "right"] = "left" if place < len(ARM_COLUMNS) else "right"
        table.add_column(data.columns[place].replace(" ", "\n"), justify=justify, no_wrap=True)
    for row in data.cells:
        table.add_row(*(row[place].text for place in shown))
    return table


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=1000)).maximum
