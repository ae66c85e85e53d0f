"""What is kept of a study: small results, a file per arm and seed, and by which definition they were made."""

import json
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.robot.libero.results.results import Results
from lightvla.study.definition import Scene, Study
from lightvla.study.measures import peak_memory, query_flops, rounded
from lightvla.study.places import Places, measured
from prismatic.atomic_files import write_atomically
from prismatic.report.figures import points_of, read_metrics, spread
from prismatic.training.runs.files import METRICS_FILE, RUN_FILE

FORMAT = 1
CURVES = ("loss", "tokens_kept", "val_loss", "val_tokens_kept")
_POINTS = 200


@dataclass(frozen=True)
class Rollout:
    """One rollout.

    Attributes:
        task: its index in the suite.
        state: the initial state.
        round: how often the states had been gone round before.
        steps: control steps taken.
        tokens: kept per policy query, mean.
        queries: of the policy.
        jerk: RMS of the end effector's jerk in m/s^3; None where it was not recorded.
    """

    task: int
    state: int
    round: int
    success: bool
    steps: int
    tokens: float
    queries: int
    jerk: float | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """What two arms' rollouts have in common."""
        return self.task, self.state, self.round


@dataclass
class ArmResult:
    """What is kept of one arm of one training seed.

    Attributes:
        study_sha256: of the definition that it was made by.
        command: that evaluated it, as a person would type it.
        pruner: of the evaluated policy, with its options.
        made: device, versions, commit, date, seconds and warnings of the evaluation; `weights`, the fingerprint of
            the policy. Of a trained arm also `parent` and `data`, the fingerprints of what it was trained from and on,
            and `computing`, dtype and kernels.
        tasks: index as text -> instruction.
        rollouts: all of them; none is invalid.
        query_ms: median time inside the policy of a query, on one thread with other evaluations beside it.
        flops: of a query at the mean number of tokens, rounded (`models/flops.py`); None where it was not counted.
        training: `seconds` of the whole command and `host_peak_gb`; empty where the arm was not trained.
        curves: of its training: name -> [steps, values]; empty likewise.
        variant: in which way it was measured beside the comparison (`variants.py`); empty: as the arm itself.
    """

    study: str
    study_sha256: str
    scene: str
    arm: str
    seed: int
    command: str
    pruner: str
    num_visual_tokens: int
    made: dict[str, Any]
    tasks: dict[str, str]
    rollouts: list[Rollout]
    query_ms: float | None = None
    flops: int | None = None
    training: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    variant: str = ""

    @property
    def tokens_kept(self) -> float:
        """Mean over all policy queries."""
        queries = sum(rollout.queries for rollout in self.rollouts)
        return sum(rollout.tokens * rollout.queries for rollout in self.rollouts) / queries

    def save(self, path: Path) -> None:
        """Atomically, a rollout and a curve a line, so that a change of one shows as one."""
        content = asdict(self)
        rollouts = [list(asdict(rollout).values()) for rollout in self.rollouts]
        content |= {"rollouts": "@ROLLOUTS", "curves": "@CURVES"}
        text = json.dumps({"format": FORMAT, "rollout_fields": _ROLLOUT_FIELDS, **content}, indent=1)
        lines = ",\n  ".join(json.dumps(rollout) for rollout in rollouts)
        curves = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in self.curves.items())
        text = text.replace('"@ROLLOUTS"', f"[\n  {lines}\n ]").replace('"@CURVES"', f"{{\n  {curves}\n }}")
        write_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: Path) -> "ArmResult":
        """Raises ValueError for a file that is none, or holds a rollout twice."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT or content.pop("rollout_fields") != _ROLLOUT_FIELDS:
                raise ValueError("another format")
            content["rollouts"] = [Rollout(*row) for row in content["rollouts"]]
            found = cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no result of a study ({error!r}); remove it, and run the arm again") from error
        if len({rollout.key for rollout in found.rollouts}) < len(found.rollouts):
            raise ValueError(f"{path} holds a rollout twice, and a copy is no trial; remove it, and run the arm again")
        return found


_ROLLOUT_FIELDS = [field.name for field in fields(Rollout)]


def extract(
    study: Study, name: str, scene: str, arm: str, seed: int, evaluation: Path, trained: tuple[Path, float] | None
) -> ArmResult:
    """The small result of a complete evaluation.

    `trained`: where the arm was trained, the folder of its run, and how many seconds that took.

    Raises ValueError for an invalid rollout, which is no result.
    """
    results = Results.load(evaluation)
    if any(episode.success is None for episode in results.episodes):
        raise ValueError(f"{evaluation} holds invalid rollouts, which count neither way; the same command repeats them")
    rollouts = [
        Rollout(
            episode.task_index, episode.initial_state, episode.key[-1], bool(episode.success), episode.steps,
            float(np.mean(episode.tokens_kept)), len(episode.tokens_kept), rounded(episode.jerk),
        )
        for episode in results.episodes
    ]  # fmt: skip
    times = [time for episode in results.episodes for time in episode.policy_ms]
    run, seconds = trained if trained is not None else (None, 0.0)
    return ArmResult(
        study=name,
        study_sha256=study.sha256,
        scene=scene,
        arm=arm,
        seed=seed,
        command=shlex.join([*results.run["command"][0].split(), *results.run["command"][1:]]),
        pruner=str(results.policy.get("pruner")),
        num_visual_tokens=max(episode.num_visual_tokens for episode in results.episodes),
        made={
            "device": results.run["device"],
            "git_commit": results.run["git_commit"],
            "started": results.run["started"],
            "seconds": results.run["seconds"],
            "versions": results.versions,
            "warnings": list(results.run["warnings"]),
            "weights": results.policy["weights_fingerprint"],
            **({} if run is None else _origin(run)),
        },
        tasks={str(episode.task_index): episode.task_name.replace("_", " ") for episode in results.episodes},
        rollouts=rollouts,
        query_ms=rounded(float(np.median(times))) if times else None,
        flops=query_flops(results),
        training={} if run is None else {"seconds": round(seconds, 1), **peak_memory(run / METRICS_FILE)},
        curves={} if run is None else _curves(run / METRICS_FILE),
    )


def _origin(run: Path) -> dict[str, Any]:
    facts = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))["facts"]
    return {"parent": facts["base_fingerprint"], "data": facts["data"], "computing": facts["computing"]}


def _curves(metrics: Path) -> dict[str, list[list[float]]]:
    """Training curves with at most 200 points each, rounded to four digits."""
    records, found = read_metrics(metrics), {}
    for key in CURVES:
        steps, values = points_of(records, key)
        chosen = spread(steps.size, _POINTS) if steps.size else []
        if chosen:
            found[key] = [[float(steps[i]) for i in chosen], [rounded(values[i]) for i in chosen]]
    return found


class Missing(NamedTuple):
    """A result that is not there: of an arm, or of a variant (`measured`)."""

    scene: str
    name: str
    seed: int


def load_all(study: Study, places: Places) -> tuple[list[ArmResult], list[Missing]]:
    """The results that are there, in the order of scenes, arms and seeds, and which are not."""
    found, missing = list[ArmResult](), list[Missing]()
    for scene in study.scenes:
        for arm in study.arms:
            for seed in study.training.seeds:
                path = places.result(study, scene.name, arm.name, seed)
                if path.is_file():
                    found.append(load_result(study, path, scene, arm.name, seed, scene.trials_per_task))
                else:
                    missing.append(Missing(scene.name, arm.name, seed))
    return found, missing


def load_result(study: Study, path: Path, scene: Scene, arm: str, seed: int, trials: int) -> ArmResult:
    """Raises ValueError for a result that is not what its place says, or lacks rollouts of its definition."""
    result = ArmResult.load(path)
    holds, wanted = (result.scene, result.arm, result.seed), (scene.name, arm, seed)
    if holds != wanted:
        said, expected = (f"scene {s}, arm {a}, seed {n}" for s, a, n in (holds, wanted))
        raise ValueError(f"{path} holds the result of {said}; expected {expected}: put the right file there")
    rollouts = trials * len(scene.tasks)
    if result.study_sha256 == study.sha256 and len(result.rollouts) != rollouts:
        raise ValueError(
            f"{path} holds {len(result.rollouts)} of {rollouts} rollouts that the definition fixes; restore it, or "
            "remove it and run the arm again"
        )
    return result


def check_unchanged(study: Study, places: Places, force: bool) -> None:
    """Raises ValueError where an arm was run by another definition; with `force` it is put down as a change instead."""
    if not places.plan.is_file():
        return
    plan = json.loads(places.plan.read_text())
    before = plan["study_sha256"]
    if before == study.sha256:
        return
    if not force:
        raise ValueError(
            f"{places.definition} was changed after arms had been run by it (SHA-256 {before[:12]}, now "
            f"{study.sha256[:12]}), and what is fixed in advance stays: put it back, write the new one as "
            "studies/ANOTHER_NAME/study.yaml, or pass --force True, which the report then tells"
        )
    change = {"time": _now(), "from": before, "to": study.sha256}
    _write(places, {**plan, "study_sha256": study.sha256, "forced": [*plan["forced"], change]})


def fix(study: Study, places: Places) -> None:
    """Put down by which definition the first arm is run; nothing where that was done."""
    if not places.plan.is_file():
        _write(places, {"study_sha256": study.sha256, "fixed": _now(), "forced": []})


def forced_changes(places: Places) -> Sequence[dict[str, str]]:
    """Every change of the definition after an arm had been run."""
    return json.loads(places.plan.read_text())["forced"] if places.plan.is_file() else []


def foreign(study: Study, results: Iterable[ArmResult]) -> list[str]:
    """Results that were made by another definition, in words."""
    others = [result for result in results if result.study_sha256 != study.sha256]
    return [f"{other.scene}, {measured(other.arm, other.variant)}, seed {other.seed}" for other in others]


def _write(places: Places, plan: dict[str, Any]) -> None:
    places.plan.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(places.plan, json.dumps(plan, indent=1) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
