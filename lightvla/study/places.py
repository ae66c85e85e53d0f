"""Where a study's parts lie."""

from dataclasses import dataclass
from pathlib import Path

from lightvla.study.definition import Study

DEFINITION, PLAN_FILE = "study.yaml", "plan.json"


def measured(arm: str, variant: str) -> str:
    """`lightvla`, `lightvla@step400`: what files and steps of an arm or of one of its variants are called."""
    return f"{arm}@{variant}" if variant else arm  # no arm has such a letter in its name


@dataclass(frozen=True)
class Places:
    """Below `studies/NAME`: what is kept (definition, results, report), and `work`, which git does not see."""

    root: Path

    @property
    def definition(self) -> Path:
        return self.root / DEFINITION

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def plan(self) -> Path:
        """By which definition the first arm was run, and every change that was forced since."""
        return self.results / PLAN_FILE

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def data(self) -> Path:
        return self.work / "data"

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    def base(self, seed: int) -> Path:
        """The untrained policy."""
        return self.work / f"base-seed{seed}"

    def evaluation(self, step: str) -> Path:
        return self.work / "evaluations" / step

    def record(self, step: str) -> Path:
        """What is known of a step that was begun."""
        return self.work / "steps" / f"{step}.json"

    def log(self, step: str) -> Path:
        return self.work / "logs" / f"{step}.log"

    def result(self, study: Study, scene: str, arm: str, seed: int, variant: str = "") -> Path:
        """The small result that is kept, of an arm or a variant; in a folder of its scene where there are several."""
        return self._of_scene(study, scene) / f"{measured(arm, variant)}-seed{seed}.json"

    def benchmark(self, study: Study, scene: str) -> Path:
        """What is kept of the benchmark of a scene."""
        return self._of_scene(study, scene) / "benchmark.json"

    def _of_scene(self, study: Study, scene: str) -> Path:
        return self.results / scene if len(study.scenes) > 1 else self.results
