"""Evaluate a policy in the LIBERO simulator.

    python experiments/robot/libero/run_libero_eval.py --pretrained_checkpoint CHECKPOINT --task_suite_name libero_goal

    torchrun --standalone --nproc-per-node 8 experiments/robot/libero/run_libero_eval.py ...    # a policy per GPU

Writes `results.json`, a report on it, and videos where asked for, into one folder; `--resume True` goes on with a
stopped evaluation. Ends with 0 when every rollout counts, 3 when some are invalid (an error inside the rollout; the
tracebacks are in the results), 2 when the flags or the checkpoint cannot be used or it cannot go on (the policy fails
or hangs, no simulator starts, the disk is full; `--resume True` goes on later), 130 when it was interrupted. torchrun
itself ends with 1 where one of its processes does not end with 0. Errors are one line on standard error.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Instead of this file's folder: the packages of this tree come first, whatever else is installed or on PYTHONPATH.
    sys.path[0] = str(Path(__file__).resolve().parents[3])


def command() -> int:
    """What the command line runs; returns the exit status."""
    from lightvla.__main__ import run

    return run("eval")


if __name__ == "__main__":
    sys.exit(command())
