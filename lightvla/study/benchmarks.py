"""What is kept of a scene's benchmark: a row per pruner."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightvla.study.definition import Study
from lightvla.study.measures import rounded
from lightvla.study.places import Places
from prismatic.atomic_files import write_atomically


@dataclass(frozen=True)
class BenchmarkRow:
    """One pruner on one thread, in float32, with the eager engine.

    Attributes:
        pruner: with its options.
        tokens: visual tokens that it kept, fewest and most.
        flops: of a query.
        ms: median time of the model's part of a query.
        times_as_fast: as without pruning, call by call in turns: the value and its 95 % interval.
    """

    pruner: str
    tokens: tuple[int, int]
    flops: int
    ms: float
    times_as_fast: tuple[float, float, float]


@dataclass(frozen=True)
class SceneBenchmark:
    """Of one scene.

    Attributes:
        study_sha256: of the definition that it was made by.
        command: as a person would type it.
        machine: as the benchmark describes it.
    """

    study_sha256: str
    command: str
    machine: dict[str, Any]
    rows: tuple[BenchmarkRow, ...]

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "SceneBenchmark":
        """Raises ValueError for a file that is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                BenchmarkRow(**{**row, "tokens": tuple(row["tokens"]), "times_as_fast": tuple(row["times_as_fast"])})
                for row in content.pop("rows")
            ]
            return cls(**content, rows=tuple(rows))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no benchmark of a study ({error!r}); remove it, and run the study") from error


def benchmark_of(study: Study, folder: Path) -> SceneBenchmark:
    """The small form of what `lightvla benchmark` wrote into `folder`."""
    content = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    rows = []
    for arm in content["arms"]:
        summary, ratio = arm["summary"], arm["summary"]["than_first_arm"]
        fast = (rounded(ratio["value"]), rounded(ratio["low"]), rounded(ratio["high"]))
        fewest, most = summary["kept"]
        row = BenchmarkRow(arm["arm"]["pruner"], (fewest, most), summary["flops"], rounded(1e3 * summary["p50"]), fast)
        rows.append(row)
    return SceneBenchmark(study.sha256, content["command"], content["machine"], tuple(rows))


def load_benchmarks(study: Study, places: Places) -> dict[str, SceneBenchmark]:
    """By scene; those that are there."""
    paths = {scene.name: places.benchmark(study, scene.name) for scene in study.scenes}
    return {name: SceneBenchmark.load(path) for name, path in paths.items() if path.is_file()}
