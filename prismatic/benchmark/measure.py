"""Runs a benchmark: a process per engine, dtype and number of threads, whose arms are called in turn."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import prismatic
from prismatic.benchmark.config import (
    REFERENCE,
    Arm,
    BenchmarkConfig,
    Setting,
    arms_of,
    check_words,
    pruner_names,
)
from prismatic.benchmark.random_policy import SIZES, meta_parts
from prismatic.benchmark.subject import Job
from prismatic.checkpoints.components import head_kind
from prismatic.checkpoints.files import check_complete, read_config, resolve
from prismatic.checkpoints.options import assumed_original
from prismatic.checkpoints.weight_files import num_values
from prismatic.extern.hf.building import NoValues, build_backbone, model_sizes
from prismatic.extern.hf.original import as_original
from prismatic.inference.engine import ENGINES
from prismatic.models.autoregressive import AUTOREGRESSIVE, check_decodable
from prismatic.models.precision import choose_dtype
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.sites import ModelSizes, Projector
from prismatic.stored_files import component_file

KNOWN_ENGINES = (REFERENCE, *ENGINES)
Tell = Callable[[str], None]
"""Told what is being done, in a line."""


@dataclass
class Measured:
    """What was found of an arm.

    Attributes:
        arm: which.
        dtype: that its policy computes in.
        calls: in order: seconds by stage, kept tokens, actions; the same numbers of call in all arms are neighbours.
        account: work, bytes, launches; see `figures.account`.
        ceilings: of its device, in its dtype with its threads.
        cold: seconds from process start to first action, with their split, of each fresh process.
        memory: bytes beyond what the process held before there was a policy, of each fresh process.
    """

    arm: Arm
    dtype: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    account: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    cold: list[dict[str, float]] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


class Process:
    """A worker and the way to ask it. Errors of its own are raised here, with its last words where it dies."""

    def __init__(self, job: Job, only_cold: bool = False) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by `end`
        words = [sys.executable, "-m", "prismatic.benchmark.worker", json.dumps(dataclasses.asdict(job))]
        words += [repr(time.time()), "cold" if only_cold else "stay"]
        self._process = subprocess.Popen(
            words, env=_environment(job.setting.threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._stderr, text=True,
        )  # fmt: skip

    def hear(self) -> dict[str, Any]:
        """Its next answer. Raises ValueError for what it could not do, RuntimeError where it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._stderr.seek(0)
            raise RuntimeError(f"a process of the benchmark died:\n{self._stderr.read().strip()[-4000:]}")
        found = json.loads(line)
        if "error" in found:
            raise ValueError(found["error"])
        return found

    def ask(self, do: str, place: int = 0, number: int = 0) -> dict[str, Any]:
        """As `hear`, of a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "place": place, "number": number}) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def end(self) -> None:
        """Have it end, and wait for it."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


def _environment(threads: int) -> dict[str, str]:
    """This process's, with this tree's packages first, and so many threads from the start."""
    root = str(Path(prismatic.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return found | ({"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {})


@contextmanager
def opened(job: Job, only_cold: bool = False) -> Iterator[Process]:
    """A process that ends with the block."""
    process = Process(job, only_cold)
    try:
        yield process
    finally:
        process.end()


def check(config: BenchmarkConfig) -> None:
    """All that can be said against the flags before weights are made or read.

    Raises FileNotFoundError and ValueError.
    """
    check_words(config, KNOWN_ENGINES)
    specs = [PrunerSpec.parse(pruner) for pruner in pruner_names(config.pruners)]
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {config.output_dir} cannot be a folder for the results: {error}") from error
    directory = None
    if config.checkpoint:
        directory = resolve(config.checkpoint)
        check_complete(directory)
    sizes, recorded, decodes = _policy_of(config.preset, directory)
    if config.tokens > sizes.num_visual:
        raise ValueError(
            f"--tokens {config.tokens}: the policy has {sizes.num_visual} visual tokens; give as many or fewer"
        )
    for spec in (resolve_pruner(spec, recorded, "inference") for spec in specs):
        spec.check_fits(sizes)
        spec.check_runs_beside(resolve_pruner(None, recorded, "inference"))
        if decodes:
            check_decodable(spec.name)


def _policy_of(preset: str, directory: Path | None) -> tuple[ModelSizes, dict[str, Any] | None, bool]:
    """Of the policy of that preset, or in that folder: its sizes, its recorded pruner, whether it decodes tokens."""
    if directory is None:
        model = meta_parts(SIZES[preset])[0]
        return model.sizes, model.config.pruner_spec.to_json(), False
    config_json, config = read_config(directory)
    head: dict[str, Any] = {}
    assumed_original(directory, config_json, head)  # says it where there is no head at all
    if decodes := AUTOREGRESSIVE in (head.get("head"), config_json.get("action_head")):
        as_original(config)
    with NoValues():
        backbone = build_backbone(config)
    return model_sizes(config, backbone, config.num_images_in_input or 2), config_json.get("pruner"), decodes


def own_dtype(config: BenchmarkConfig) -> str:
    """What a policy chooses on the device: once, since what is measured may turn out another way in each process."""
    parameters = num_values(check_complete(resolve(config.checkpoint))) if config.checkpoint else None
    return str(choose_dtype(None, config.device, parameters).dtype).removeprefix("torch.")


def runs(arm: Arm) -> bool:
    """Whether the engine runs that pruner: the research code has one behind the projector only."""
    return arm.setting.engine != REFERENCE or isinstance(PrunerSpec.parse(arm.pruner).site, Projector)


def why_no_reference(checkpoint: str) -> str | None:
    """Why the research code's work cannot be done for a checkpoint, in words; None: it can, and for presets."""
    if not checkpoint:
        return None
    directory = resolve(checkpoint)
    if component_file(directory, "vision_backbone") is not None:
        return "it computes no FiLM"
    kind = head_kind(directory, read_config(directory)[0])
    return None if kind == "l1" else f"it computes the L1 head, not {kind or 'action tokens'}"


def job_of(config: BenchmarkConfig, setting: Setting, pruners: list[str]) -> Job:
    """What a process is told to hold."""
    return Job(
        setting, tuple(pruners), config.checkpoint, config.preset, config.tokens, config.device, config.instruction,
        config.camera_size,
    )  # fmt: skip


def measure(config: BenchmarkConfig, tell: Tell) -> list[Measured]:
    """Every arm of the flags, which must have passed `check`; `config.device` is a device's name.

    Raises ValueError as loading a policy does, RuntimeError where a process dies.
    """
    arms = [arm for arm in arms_of(config) if runs(arm)]
    if (reason := why_no_reference(config.checkpoint)) is not None:
        tell(f"engine reference is left out: {reason}")
        arms = [arm for arm in arms if arm.setting.engine != REFERENCE]
    found = [Measured(arm) for arm in arms]
    if not found:
        raise ValueError(f"engine 'reference' runs nothing of --pruners {config.pruners}; add eager to --engines")
    for each in found:
        for _ in range(config.cold_starts):
            tell(f"cold start: {title(each.arm)}")
            with opened(job_of(config, each.arm.setting, [each.arm.pruner]), only_cold=True) as process:
                answer = process.hear()
            each.cold.append(answer["cold"])
            each.memory.append(answer["memory"])
    processes: dict[Setting, Process] = {}
    try:
        for setting in dict.fromkeys(each.arm.setting for each in found):
            tell(f"loading: {setting_title(setting)}")
            processes[setting] = Process(job_of(config, setting, pruner_names(config.pruners)))
            dtype = processes[setting].hear()["dtype"]
            for each in (each for each in found if each.arm.setting == setting):
                each.dtype = dtype
        _measure_calls(config, found, processes, tell)
        _measure_work(found, processes, tell)
    finally:
        for process in processes.values():
            process.end()
    return found


def _measure_calls(
    config: BenchmarkConfig, found: list[Measured], processes: dict[Setting, Process], tell: Tell
) -> None:
    """A call of each arm, then the next one of each, every second time in the opposite order."""
    for each in found:
        tell(f"warming up: {title(each.arm)}")
        for number in range(config.warm_up):
            processes[each.arm.setting].ask("call", each.arm.place, number)
    for number in range(config.repeats):
        tell(f"calls of all arms in turn: {number + 1} of {config.repeats}")
        for each in found if number % 2 == 0 else reversed(found):
            each.calls.append(processes[each.arm.setting].ask("call", each.arm.place, number))


def _measure_work(found: list[Measured], processes: dict[Setting, Process], tell: Tell) -> None:
    """Work of every arm; what the device can do, once per dtype and number of threads."""
    ceilings: dict[tuple[str, int], dict[str, Any]] = {}
    for each in found:
        tell(f"counting: {title(each.arm)}")
        setting, process = each.arm.setting, processes[each.arm.setting]
        each.account = process.ask("account", each.arm.place)
        key = (each.dtype, setting.threads)
        if key not in ceilings:
            ceilings[key] = process.ask("ceilings")
        each.ceilings = ceilings[key]


def setting_title(setting: Setting) -> str:
    """`eager, float32, 1 thread`."""
    threads = f"{setting.threads} thread{'s' if setting.threads > 1 else ''}" if setting.threads else ""
    return ", ".join(filter(None, (setting.engine, setting.dtype, threads)))


def title(arm: Arm) -> str:
    """`eager, float32, 1 thread, lightvla`."""
    return f"{setting_title(arm.setting)}, {arm.pruner}"
