"""Where a run goes on: its own newest checkpoint that is whole, or its beginning."""

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismatic.checkpoints.places import stands_for
from prismatic.command_line import several_nodes
from prismatic.stored_files import read_json
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.runs.files import RUN_FILE
from prismatic.training.runs.folder import RunFolder
from prismatic.training.runs.identity import Change, check_changes, plain_flags
from prismatic.training.runs.record import code_digest, versions

log = logging.getLogger(__name__)

_PER_NODE = {
    "vla_path", "data_root_dir", "run_root_dir", "device", "num_workers", "num_threads", "tensorboard_log_dir",
    "use_wandb", "tracker", "wandb_entity", "wandb_project", "wandb_log_freq", "report_minutes",
}  # fmt: skip
"""Flags that may differ between the processes of a run."""


@dataclass
class Resumption:
    """A checkpoint of the run, from which it goes on.

    Attributes:
        folder: of the checkpoint.
        state: its training state.
        changes: flags that change what is learnt and are others from here on.
        finished: there is nothing left to do.
        explicit: `--resume True` or a step asked for it, `auto` did not find it.
    """

    folder: Path
    state: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    finished: bool = False
    explicit: bool = False

    @property
    def step(self) -> int:
        """Finished steps."""
        return int(self.state["step"])

    def release(self) -> None:
        """Forget all but the step: a mapped file keeps its room on the disk after its checkpoint is removed."""
        for key in set(self.state) - {"step"}:
            del self.state[key]


def find_resumption(config: FinetuneConfig, world_size: int) -> Resumption | None:
    """What `--resume` means for this run; None where it begins. Only the run's own checkpoints count.

    Raises:
        FileNotFoundError: where `--resume True` or a step finds none; names those that there are.
        ValueError: where the run exists and is not to go on, or the flags are those of another run.
    """
    step = config.step_to_resume
    run = RunFolder(config.run_dir)
    if config.resume == "False" and step is None:
        if saved := run.saved():
            newest, folder = list(saved.items())[-1]
            raise ValueError(
                f"run {config.run_id!r} already has a checkpoint (step {newest}: {folder}). To continue it leave out "
                "--resume False; to start anew pass another --run_id_note or --run_id_override, or remove the run"
            )
        return None
    explicit = config.resume != "auto" or step is not None
    if (found := run.newest_state(step)) is None:
        if explicit:
            raise FileNotFoundError(
                f"--resume True: run {config.run_id!r} has no checkpoint in {run.path}; pass the flags of the run that "
                "should go on (--resume auto begins a run that has none)"
            )
        if (run.path / RUN_FILE).is_file():
            check_changes(config, read_json(run.path / RUN_FILE)["flags"], run.path, announced=True)
        return None
    folder, state = found
    changes = check_changes(config, state["flags"], folder, announced=explicit)
    _check_samples(config, state, world_size, folder)
    finished = state["step"] >= config.max_steps
    if finished and explicit:
        raise ValueError(f"{folder} is at step {state['step']} already; to go on pass --max_steps above that")
    return Resumption(folder, state, changes, finished, explicit)


def _check_samples(config: FinetuneConfig, state: Mapping[str, Any], world_size: int, folder: Path) -> None:
    """Raises ValueError where a step would see another number of samples than the run's steps."""
    now, was = config.samples_per_step(world_size), state.get("samples_per_step")
    if was not in (None, now):
        raise ValueError(
            f"a step of {world_size} processes with --batch_size {config.batch_size} and --grad_accumulation_steps "
            f"{config.grad_accumulation_steps} has {now} samples, but those of the run in {folder} have {was}; choose "
            f"them so that their product is {was}"
        )


def base_of(config: FinetuneConfig, resumption: Resumption | None) -> str:
    """The checkpoint that frozen weights come from: an absolute path, or a hub id.

    Where `vla_path` is a checkpoint of the run itself, as the published code's `--resume True` wants it, it is what the
    run began with.
    """
    if (recorded := _recorded_base(config, resumption)) is not None:
        return recorded
    path = stands_for(Path(config.vla_path).expanduser())
    if not path.is_dir():
        return config.vla_path
    here = path.resolve()
    own = Path(config.run_dir).resolve()
    if resumption is not None and (own in here.parents or here in (own, resumption.folder.resolve())):
        return str(resumption.state["base"])
    return str(here)


def _recorded_base(config: FinetuneConfig, resumption: Resumption | None) -> str | None:
    """What the same `--vla_path` stood for when the run began: a run's folder stands for a newer checkpoint by now."""
    file = config.run_dir / RUN_FILE
    if resumption is not None:
        flags, base = resumption.state["flags"], resumption.state["base"]
    elif file.is_file():
        flags, base = (content := read_json(file))["flags"], content["facts"]["base"]
    else:
        return None
    return str(base) if flags.get("vla_path") == config.vla_path and Path(base).is_dir() else None


def check_data(fingerprints: Mapping[str, str], resumption: Resumption) -> None:
    """Raises ValueError where a dataset is another one than the run was trained on, unless that is asked for."""
    for name, recorded in (resumption.state.get("data") or {}).items():
        if (found := fingerprints.get(name)) == recorded:
            continue
        what = f"dataset {name!r} has changed since {resumption.folder} was written ({recorded}, now {found})"
        if not resumption.explicit:
            raise ValueError(
                f"{what}; put the old one back, pass --resume True if it was mended, or begin a new run by another "
                "--run_id_note or --run_id_override"
            )
        log.warning("%s: from here on the new one is learnt from", what)


def check_agreement(config: FinetuneConfig, fingerprints: Mapping[str, str], ranks: Ranks) -> None:
    """Raises ValueError, in all processes, where two of them have different flags, data or code; names their nodes."""
    flags = {name: value for name, value in plain_flags(config).items() if name not in _PER_NODE}
    facts = {f"--{name}": value for name, value in flags.items()}
    facts |= {f"dataset {name!r}": value for name, value in fingerprints.items()}
    facts |= {f"package {name}": value for name, value in versions().items() if name != "python"}
    facts["the code of prismatic"] = code_digest()
    (first_node, first), *others = ranks.gather((f" on node {socket.gethostname()}" if several_nodes() else "", facts))
    for rank, (node, other) in enumerate(others, 1):
        for name in (*first, *other):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"process 0{first_node} has {name} {first.get(name)}, process {rank} of {ranks.world_size}{node} "
                    f"has {other.get(name)}; give all processes the same flags, data, packages and code"
                )
