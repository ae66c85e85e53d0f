"""What is done of a study, and how long the rest takes."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from experiments.robot.libero.results.results import is_complete
from lightvla.processes import evaluation_progress
from lightvla.study.benchmarks import SceneBenchmark, benchmark_of
from lightvla.study.definition import PRUNED, Study
from lightvla.study.places import Places
from lightvla.study.records import ArmResult, extract
from lightvla.study.steps import KEPT, Step, all_steps, fingerprints, needs_count, ordered, wanted
from prismatic.atomic_files import write_atomically

SECONDS_PER_UNIT = {
    "collect": 687 / 186, "build": 20.0, "train": 1310 / (3750 * 32), "evaluate": 2 * 330 / 180, "benchmark": 60.0
}  # fmt: skip
"""Of an earlier `lightvla demo` on two cores: a demonstration, a policy, a sample, a rollout (two ran beside each
other); of a benchmark a guess."""


@dataclass
class Record:
    """What is known of a step that was begun."""

    fingerprint: str
    done: bool
    seconds: float
    units: float


class Progress:
    """Which steps are done, by what lies on the disk.

    A step is done when its command ended well, was the one of now (`fingerprints`), and what it writes is whole. An
    evaluation or a benchmark is done when its small result is there: where others' results are kept, nothing of theirs
    is run again.
    """

    def __init__(self, study: Study, places: Places) -> None:
        self.study, self.places = study, places
        self.steps = all_steps(study, places)
        self._fingerprints = fingerprints(self.steps, places)

    def record(self, step: Step) -> Record | None:
        """None for a step that was never begun, or whose record cannot be read."""
        try:
            return Record(**json.loads(self.places.record(step.name).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def result_of(self, step: Step) -> Path:
        """Where the small result of an evaluation or a benchmark is."""
        if step.kind == "benchmark":
            return self.places.benchmark(self.study, step.scene)
        return self.places.result(self.study, step.scene, step.arm, step.seed, step.variant)

    def is_done(self, step: Step) -> bool:
        if step.kind in KEPT:
            path = self.result_of(step)
            kind = ArmResult if step.kind == "evaluate" else SceneBenchmark
            return path.is_file() and kind.load(path).study_sha256 == self.study.sha256
        record = self.record(step)
        known = record is not None and record.done and record.fingerprint == self._fingerprints[step.name]
        return known and step.proof.exists()

    def left(self, arm: str | None) -> list[Step]:
        """What is still to do for one arm, or all: in an order in which it can be done."""
        names: set[str] = set()

        def add(step: Step) -> None:
            if step.name not in names and not self.is_done(step):
                names.add(step.name)
                for need in step.needs:
                    add(self.steps[need])

        for step in wanted(self.steps, arm):
            add(step)
        return ordered(self.steps, names)

    def count_for(self, step: Step) -> int | None:
        """The tokens that the pruned arm of the same seed kept, rounded; None where the command does not say it."""
        if not needs_count(step):
            return None
        path = self.places.result(self.study, step.scene, PRUNED, step.seed)
        return max(1, round(ArmResult.load(path).tokens_kept))

    def begin(self, step: Step) -> float:
        """Record that a step is begun, and forget what another command had left there; returns its seconds before."""
        record, fingerprint = self.record(step), self._fingerprints[step.name]
        if record is not None and record.fingerprint != fingerprint and step.kind != "collect":
            shutil.rmtree(step.makes, ignore_errors=True)  # collection knows itself what it can keep
        same = record is not None and record.fingerprint == fingerprint and not record.done
        seconds = record.seconds if record is not None and same else 0.0
        self._write(step, Record(fingerprint, False, seconds, step.units))
        return seconds

    def end(self, step: Step, seconds: float, done: bool) -> None:
        """Record how long a step took so far, and whether it is done; keep the small result of an evaluation.

        Raises ValueError where what it should have made is not whole.
        """
        self._write(step, Record(self._fingerprints[step.name], False, seconds, step.units))
        if not done:
            return
        whole = is_complete(step.makes) if step.kind == "evaluate" else step.proof.exists()
        if not whole:
            raise ValueError(f"{step.name} ended well, but {step.proof} is not whole; run the same command again")
        if step.kind == "benchmark":
            benchmark_of(self.study, step.makes).save(self.result_of(step))
        if step.kind == "evaluate":
            own = self.study.arm(step.arm).kind == "trained" and not step.variant
            training = self.steps[step.needs[0]]
            record = self.record(training)
            trained = (training.makes, record.seconds) if own and record is not None else None
            name = self.places.root.name
            result = extract(self.study, name, step.scene, step.arm, step.seed, step.makes, trained)
            path = self.result_of(step)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(result, variant=step.variant).save(path)
        self._write(step, Record(self._fingerprints[step.name], True, seconds, step.units))

    def _write(self, step: Step, record: Record) -> None:
        path = self.places.record(step.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(record)))

    def measured(self) -> set[str]:
        """Kinds of which a step is finished, so that the others' times go by it."""
        records = ((step.kind, self.record(step)) for step in self.steps.values())
        return {kind for kind, record in records if record is not None and record.done}

    def estimates(self) -> dict[str, float]:
        """Seconds by step: measured where it is done, else as long per unit as others of its kind took here."""
        records = {step.name: self.record(step) for step in self.steps.values()}
        rates = {kind: _rate(kind, self.steps.values(), records) for kind in SECONDS_PER_UNIT}
        return {
            step.name: record.seconds
            if (record := records[step.name]) is not None and record.done
            else step.units * rates[step.kind]
            for step in self.steps.values()
        }


def wall_seconds(steps: Iterable[Step], seconds: Mapping[str, float], processes: int) -> float:
    """How long steps take together: evaluations run beside each other."""
    return sum(seconds[step.name] / (processes if step.kind == "evaluate" else 1) for step in steps)


def units_done(step: Step) -> float:
    """How much of a step that is running is there."""
    if step.kind == "evaluate":
        return evaluation_progress(step.makes)[0]
    if step.kind == "train":
        return _last_step(step.makes / "metrics.jsonl") / _of(step) * step.units
    if step.kind == "collect":
        return min(step.units, sum(1 for _ in step.makes.parent.glob(f".collect/{step.makes.name}-*/**/*.npz")))
    return 0.0


def _of(step: Step) -> int:
    return int(step.command[step.command.index("--max_steps") + 1])


def _last_step(metrics: Path) -> int:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def _rate(kind: str, steps: Iterable[Step], records: Mapping[str, Record | None]) -> float:
    """Seconds per unit of the finished steps of a kind; the demo's where there is none."""
    done = [record for step in steps if step.kind == kind and (record := records[step.name]) and record.done]
    units = sum(record.units for record in done)
    return sum(record.seconds for record in done) / units if units else SECONDS_PER_UNIT[kind]
