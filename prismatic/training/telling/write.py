"""Write the report of a run once: `python -m prismatic.training.telling.write RUN`, which a run starts.

A person calls `lightvla report RUN`.
"""

import os
import sys
from pathlib import Path

from prismatic.training.telling.page import write_page


def main() -> None:
    """Beside a training, which comes first."""
    if hasattr(os, "nice"):
        os.nice(5)
    write_page(Path(sys.argv[1]), remember=True)


if __name__ == "__main__":
    main()
