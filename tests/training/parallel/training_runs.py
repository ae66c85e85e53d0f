"""Run under torchrun: trains, one after another in one group of processes, the runs whose flags a JSON file lists.

With `copied_from` beside its flags, a run is copied from there first, to go on at the step that `resume` names.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from prismatic.training.build import Run, agreed_resumption, build
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks, ranks
from prismatic.training.loop import train
from prismatic.training.parallel.shards import own_part
from prismatic.training.runs.folder import RunFolder

PATHS = ("data_root_dir", "run_root_dir")


def held_bytes(run: Run) -> dict[str, int]:
    """What this process holds between two steps."""
    training = run.training
    parameters = dict(run.module.named_parameters())
    moments = [value for moment in training.optimizer.state.values() for value in moment.values() if value.ndim]
    average = list(training.average.state_dict().values()) if training.average else []

    def count(tensors: Any) -> int:
        return sum(own_part(tensor).nbytes for tensor in tensors)

    return {
        "trained": count(training.trained.values()),
        "frozen": count(value for name, value in parameters.items() if name not in training.trained),
        "optimizer": count(moments),
        "average": count(average),
    }


def train_run(flags: dict[str, Any], group: Ranks) -> None:
    copied_from = flags.pop("copied_from", None)
    config = FinetuneConfig(**flags | {name: Path(flags[name]) for name in PATHS})
    if group.is_main:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if copied_from is not None:
            shutil.copytree(copied_from, config.run_dir, dirs_exist_ok=True)
    group.barrier()
    resumption = agreed_resumption(config, group)
    run = build(config, group, resumption)
    if resumption is not None and group.is_main:
        RunFolder(config.run_dir).go_back_to(resumption.step)
    train(run)
    held = group.gather(held_bytes(run))
    if group.is_main:
        (config.run_dir / "held.json").write_text(json.dumps(held))


if __name__ == "__main__":
    with ranks("cpu") as group:
        for flags in json.loads(Path(sys.argv[1]).read_text()):
            train_run(flags, group)
