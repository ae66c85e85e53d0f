"""`lightvla looks` by the path of a file."""

import sys
from pathlib import Path

# Instead of this file's folder: the packages of this tree come first, whatever else is installed or on PYTHONPATH.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from lightvla.__main__ import run

if __name__ == "__main__":
    sys.exit(run("looks"))
