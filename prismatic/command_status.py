"""How a command ends: its exit status, and the line that says why it could not do what it was asked for."""

from rich.console import Console

UNWANTED = 1
"""It ran to its end, and what it found is not what one wants: a wrong checkpoint, another outcome, missing parts."""
UNUSABLE = 2
"""Flags, files or a checkpoint cannot be used. argparse ends so, too."""
INVALID = 3
"""Some rollouts of an evaluation say nothing about the policy."""
PREEMPTED = 75
"""A scheduler's signal ended it, and the same command goes on (EX_TEMPFAIL: try again)."""
STOPPED = 130
"""Interrupted (128 + SIGINT, as shells have it)."""


def print_error(message: object) -> None:
    """Write `error: ...` to stderr; the message is text, not markup, and never broken into lines."""
    console = Console(stderr=True)
    console.print("[bold red]error:[/] ", end="")
    console.print(str(message), markup=False, highlight=False, soft_wrap=True)
