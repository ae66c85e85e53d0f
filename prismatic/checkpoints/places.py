"""Where checkpoints lie in the folder of a run, and which one a run's folder stands for. Imports nothing heavy.

RUN/checkpoints/RUN--2000_chkpt/
RUN/checkpoints/latest -> RUN--2000_chkpt
"""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""In a run's folder."""
LATEST, BEST = "latest", "best"
"""There: pointers to the newest checkpoint and to the one with the lowest validation loss."""


def checkpoint_name(run: str, step: int) -> str:
    """Of the folder of a checkpoint; the published code's name."""
    return f"{run}--{step}_chkpt"


def stands_for(path: Path) -> Path:
    """The checkpoint that a run's folder, a pointer in it, or a checkpoint's published place beside it stands for.

    Any other path is returned as it is. A pointer is followed once: whoever reads goes on with the same checkpoint when
    it moves.
    """
    if not path.exists() and (match := re.fullmatch(r"(.+)--\d+_chkpt", path.name)):
        inside = path.parent / match.group(1) / CHECKPOINTS / path.name
        return inside if inside.is_dir() else path
    if (path / CHECKPOINTS / LATEST).is_dir():
        path = path / CHECKPOINTS / LATEST
    return path.parent / path.readlink() if path.name in (LATEST, BEST) and path.is_symlink() else path
