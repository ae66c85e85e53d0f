"""Say what a checkpoint holds and what is wrong with it, without loading it.

    lightvla inspect runs/my-run--10000_chkpt

A folder is only read; a hub id is downloaded first, as loading it would. Ends with 0 for a checkpoint that can be used,
1 when something is wrong with it, 2 when it cannot be read.
"""

import argparse
import logging

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prismatic.checkpoints.files import resolve
from prismatic.checkpoints.inspection import Inspection, inspect_checkpoint
from prismatic.command_status import UNUSABLE, UNWANTED, print_error


def main(path_or_hub_id: str) -> int:
    """Prints what was found; returns the exit status."""
    console = Console()
    try:
        found = inspect_checkpoint(resolve(path_or_hub_id))
    except (ValueError, OSError) as error:
        print_error(error)
        return UNUSABLE
    show(found, console)
    return UNWANTED if found.problems else 0


def show(found: Inspection, console: Console) -> None:
    """The facts as a table, then what is worth knowing, then what is wrong."""
    table = Table(show_header=False, title=escape(str(found.path)), title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in {"kind": found.kind, **found.facts}.items():
        table.add_row(label, escape(fact))
    console.print(table)
    for note in found.notes:
        console.print("[yellow]note:[/] ", end="")
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for problem in found.problems:
        console.print("[bold red]wrong:[/] ", end="")
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    if not found.problems:
        console.print("[green]nothing wrong was found[/]")


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    logging.basicConfig(level=logging.ERROR)
    return main(flags.checkpoint)
