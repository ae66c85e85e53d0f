"""Look at a dataset before a policy is trained on it: what it holds, and what is wrong with it, as a report.

    lightvla inspect-dataset datasets/kitchen_1 --robot libero --gripper open1

Writes `report.html`, a page that opens offline, and `report.md`, with pictures beside them. Shards that have not been
compared with their checksums are, as training would. Ends with 0, 1 when there are problems, 2 when the dataset cannot
be read.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

from rich.console import Console

from lightvla.datasets.problems import find_problems
from lightvla.datasets.reading import read_dataset
from prismatic.command_status import UNUSABLE, UNWANTED, print_error
from prismatic.report.data import counted
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec, read_spec_file


def main(arguments: argparse.Namespace, console: Console) -> int:
    """Read, write the report, say what is wrong; returns the exit status."""
    try:
        if missing := [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]:
            raise ImportError(f"the report needs {' and '.join(missing)}: pip install 'lightvla[report]'")
        if arguments.pictures < 1:
            raise ValueError(f"--pictures {arguments.pictures}: expected at least 1")
        folder: Path = arguments.dataset_dir.resolve()
        file = read_spec_file(arguments.dataset_spec)
        spec = find_dataset_spec(folder.name, arguments.robot, arguments.gripper, file)
        data = read_dataset(folder, spec, arguments.pictures, console)
        problems = find_problems(data)
        from lightvla.datasets.page import write_reports

        page, text = write_reports(data, problems, arguments.output_dir or Path("dataset_reports") / folder.name)
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        return UNUSABLE
    _say(
        console, f"{folder.name}: {counted(len(data.lengths), 'episode')}, {counted(int(data.lengths.sum()), 'frame')}"
    )
    for problem in problems:
        console.print("[bold red]wrong:[/] ", end="")
        _say(console, f"{problem.name}: {problem.found}. {problem.meaning} {problem.remedy}")
    if not problems:
        console.print("[green]nothing wrong was found[/]")
    _say(console, f"{page}\n{text}")
    return UNWANTED if problems else 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def command(flags: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    logging.basicConfig(level=logging.ERROR)
    return main(flags, Console())
