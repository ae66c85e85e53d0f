"""Names of the files in a run's folder, and whether a run is being trained. Imports nothing heavy."""

import fcntl
from pathlib import Path

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
REPORT_FILE = "report.html"
TRACKER_FILE = "tracker.json"
PICTURES = "pictures"
ROLLOUTS_FILE = "rollouts.jsonl"


def is_held(run: Path) -> bool | None:
    """Whether a process holds the run, and so trains it; None where the file system cannot tell."""
    try:
        with (run / LOCK_FILE).open("rb") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(lock.fileno(), fcntl.LOCK_UN)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
