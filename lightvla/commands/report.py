"""Make the report of one or several evaluations: a page that opens offline, and the same as Markdown.

    lightvla report experiments/logs/RUN
    lightvla report demo/evaluation/wide demo/evaluation/blank --output_dir compared

Reads `results.json` and the videos and pictures beside it; writes `report.html` and `report.md`. Nothing is
evaluated again. Ends with 0, or 2 when the results cannot be read.
"""

import argparse

from experiments.robot.libero.reports.page import write_reports
from lightvla.flags import report_parser
from prismatic.command_status import UNUSABLE, print_error


def main(arguments: list[str]) -> int:
    """Parse, write, say where; returns the exit status."""
    return command(report_parser().parse_args(arguments))


def command(given: argparse.Namespace) -> int:
    """What the command line runs; returns the exit status."""
    try:
        page, text = write_reports(given.results, given.output_dir, given.max_embedded_mb)
    except (ValueError, OSError) as error:
        print_error(error)
        return UNUSABLE
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)\n{text}")
    return 0
