"""What is measured of an arm beside the comparison: checkpoints of its training, perturbed scenes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightvla.study.definition import Arm, Scene, Study
from lightvla.study.places import Places, measured
from lightvla.study.records import ArmResult, Missing, load_result


@dataclass(frozen=True)
class Variant:
    """A way to measure an arm. But for the arm itself they are no arms: compared with no other, in no correction.

    Attributes:
        name: of its files, `step400`, `position`; empty: the arm itself.
        trials: rollouts of each task, the first of the arm's.
        step: of the checkpoint; None: the newest.
        perturbation: of the suite; empty: none.
    """

    name: str
    trials: int
    step: int | None = None
    perturbation: str = ""


def variants(scene: Scene, arm: Arm) -> list[Variant]:
    """The arm itself, then the others."""
    all_trials = scene.trials_per_task
    trials = scene.checkpoint_trials_per_task or all_trials
    perturbations = scene.perturbations if arm.name in scene.perturbed_arms else ()
    return [
        Variant("", all_trials),
        *(Variant(f"step{step}", trials, step=step) for step in arm.checkpoints),
        *(Variant(name, all_trials, perturbation=name) for name in perturbations),
    ]


def save_freq(arm: Arm) -> int | None:
    """Steps between the checkpoints that a training keeps, so that those to be measured are among them; None: none."""
    return math.gcd(*arm.checkpoints) if arm.checkpoints else None


def load_variants(study: Study, places: Places) -> tuple[list[ArmResult], list[Missing]]:
    """As `load_all`, of everything that is measured beside the comparison."""
    found, missing = list[ArmResult](), list[Missing]()
    for scene, arm, variant in _all_variants(study):
        for seed in study.training.seeds:
            path = places.result(study, scene.name, arm.name, seed, variant.name)
            if path.is_file():
                found.append(load_result(study, path, scene, arm.name, seed, variant.trials))
            else:
                missing.append(Missing(scene.name, measured(arm.name, variant.name), seed))
    return found, missing


def _all_variants(study: Study) -> Iterable[tuple[Scene, Arm, Variant]]:
    for scene in study.scenes:
        for arm in study.arms:
            yield from ((scene, arm, variant) for variant in variants(scene, arm) if variant.name)
