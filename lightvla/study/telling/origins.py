"""Whether results that stand beside each other belong together: one parent a seed, and the policies that they name."""

import shlex
from collections.abc import Iterable, Sequence

from lightvla.study.definition import BASELINE, COUNT, PRUNED, Arm, Study
from lightvla.study.places import measured
from lightvla.study.records import ArmResult

_MEASURED_ON = {"untrained": BASELINE, "control": PRUNED}


def mixed_origins(study: Study, results: Sequence[ArmResult], beside: Sequence[ArmResult]) -> list[str]:
    """What does not belong together, in sentences: an arm that was run again, on another machine say, beside old ones.

    Args:
        results: of the arms.
        beside: of variants; a checkpoint has weights of its own, a perturbed scene its arm's.
    """
    found: list[str] = []
    for scene in study.scenes:
        for seed in study.training.seeds:
            own = {r.arm: r for r in results if (r.scene, r.seed) == (scene.name, seed)}
            where = f"seed {seed}" if len(study.scenes) == 1 else f"{scene.name}, seed {seed}"
            found += [f"{where}: {said}" for said in _mixed(study, own)]
            perturbed = [
                r for r in beside if (r.scene, r.seed) == (scene.name, seed) and r.variant in scene.perturbations
            ]
            found += [
                f"{where}: {measured(each.arm, each.variant)} was measured on another training of {each.arm} than its "
                "result here"
                for each in perturbed
                if each.arm in own and not _same(each, own[each.arm])
            ]
    return found


def _mixed(study: Study, own: dict[str, ArmResult]) -> Iterable[str]:
    parents: dict[str, list[str]] = {}
    for name, trained in own.items():
        if "parent" in trained.made:
            parents.setdefault(trained.made["parent"], []).append(name)
    if len(parents) > 1:
        yield f"not all were trained from one parent: {' / '.join(', '.join(names) for names in parents.values())}"
    for arm in study.arms:
        result, base = own.get(arm.name), own.get(_MEASURED_ON.get(arm.kind, ""))
        if result is None:
            continue
        if base is not None and not _same(result, base):
            yield f"{arm.name} was measured on another training of {base.arm} than its result here"
        if PRUNED in own and not _counts_alike(arm, result, max(1, round(kept := own[PRUNED].tokens_kept))):
            yield f"{arm.name} was measured at another number of tokens than the {kept:.1f} of {PRUNED}"


def _same(first: ArmResult, second: ArmResult) -> bool:
    """Whether both are of the same weights; results of before these were kept say nothing."""
    weights = [result.made.get("weights") for result in (first, second)]
    return None in weights or weights[0] == weights[1]


def _counts_alike(arm: Arm, result: ArmResult, count: int) -> bool:
    """Whether the command has the number that `lightvla` kept; training commands are not kept."""
    if COUNT not in arm.flags or arm.kind == "trained":
        return True
    return {*shlex.split(arm.flags.replace(COUNT, str(count)))} <= {*shlex.split(result.command)}
