"""Put the shards of one evaluation together.

    lightvla eval ... --shard 1/2 --output_dir logs/part1      # on one machine
    lightvla eval ... --shard 2/2 --output_dir logs/part2      # on another
    lightvla merge-results logs/whole logs/part1 logs/part2

Writes `results.json` into the first folder, as one evaluation of all rollouts would have; `lightvla report` makes the
report. Videos and records stay where they are. Ends with 0, with 1 when shards or some of their rollouts are missing,
or with 2 when they cannot be put together.
"""

import argparse
import sys

from experiments.robot.libero.results.merging import merge_results
from experiments.robot.libero.results.results import FILE_NAME
from lightvla.flags import merge_results_parser
from prismatic.command_status import UNUSABLE, UNWANTED, print_error


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    return command(merge_results_parser().parse_args(arguments))


def command(given: argparse.Namespace) -> int:
    """Merge, write, say where; returns the exit status."""
    try:
        file = given.output_dir / FILE_NAME
        if file.exists():
            raise ValueError(f"{file} is there already; name a new folder first, then those of the shards")
        results, lacks = merge_results(given.shards, given.output_dir)
        results.save(file)
    except (OSError, ValueError) as error:
        print_error(error)
        return UNUSABLE
    for line in lacks:
        print(f"warning: {line}", file=sys.stderr)
    print(f"results: {file} ({len(results.episodes)} rollouts of {len(given.shards)} shards)")
    print(f"report: lightvla report {given.output_dir}")
    return UNWANTED if lacks else 0
