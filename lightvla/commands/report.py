"""Make the report of one or several evaluations: a page that opens offline, and the same as Markdown.

    lightvla report experiments/logs/RUN
    lightvla report demo/evaluation/wide demo/evaluation/blank --output_dir compared

Reads `results.json` and the videos and pictures beside it; writes `report.html` and `report.md`. Nothing is
evaluated again. Ends with 0, or 2 when the results cannot be read.
"""

import argparse
import sys
from pathlib import Path

from experiments.robot.libero.reports.page import MAX_EMBEDDED_MB, write_reports
from prismatic.command_status import UNUSABLE, print_error


def main(arguments: list[str]) -> int:
    """Parse, write, say where; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", nargs="+", type=Path, help="results.json files, or the folders that hold them")
    parser.add_argument(
        "--output_dir", type=Path, help="default: the folder of the results, of several the one that holds them all"
    )
    parser.add_argument(
        "--max_embedded_mb", type=float, default=MAX_EMBEDDED_MB,
        help="clips and pictures beyond so many megabytes are linked, not embedded (default: %(default)g)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        page, text = write_reports(given.results, given.output_dir, given.max_embedded_mb)
    except (ValueError, OSError) as error:
        print_error(error)
        return UNUSABLE
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)\n{text}")
    return 0


def command() -> int:
    """What the command line runs; returns the exit status."""
    return main(sys.argv[1:])
