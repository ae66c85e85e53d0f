"""What arms solve where LIBERO-PRO has perturbed their scene, made of kept results alone."""

from collections.abc import Sequence

from experiments.robot.libero.comparison.compare import p_text, points, span
from lightvla.study.definition import BASELINE, Scene, Study
from lightvla.study.records import ArmResult
from lightvla.study.telling.figures import ArmFigures, figures_of
from prismatic.report.data import Cell, Row, Section, Table, share_cell


def perturbed_sections(
    study: Study, scene: Scene, results: Sequence[ArmResult], beside: Sequence[ArmResult]
) -> list[Section]:
    """One section for a scene that was measured perturbed, else none; a table for each perturbation.

    Args:
        results, beside: of the scene's arms, and of their variants.
    """
    tables = [
        _table(perturbation, found, plain)
        for perturbation in scene.perturbations
        if (found := _figures(study, scene, [result for result in beside if result.variant == perturbation]))
        for plain in [{each.arm: each.rate for each in _figures(study, scene, results)}]
    ]
    title = f": {scene.name}" if len(study.scenes) > 1 else ""
    note = (
        "The same arms where LIBERO-PRO (arXiv 2510.03827) changes the scene, which none was trained on; no part of "
        f"the primary comparison. Differences are to {BASELINE}, perturbed alike, on the same starts of the same "
        "training seed; p is McNemar's by initial states, not corrected."
    )
    return [Section(f"Perturbed scenes{title}", tables, note=note)] if tables else []


def _figures(study: Study, scene: Scene, results: Sequence[ArmResult]) -> list[ArmFigures]:
    arms = [arm for arm in study.arms if arm.name in scene.perturbed_arms]
    by_arm = {arm.name: [result for result in results if result.arm == arm.name] for arm in arms}
    baseline = by_arm.get(BASELINE, [])
    return [
        figures_of(arm.name, arm.kind, own, baseline if arm.name != BASELINE else [])
        for arm in arms
        if (own := by_arm[arm.name])
    ]


def _table(perturbation: str, figures: Sequence[ArmFigures], plain: dict[str, float]) -> Table:
    """Args: plain: arm -> success rate where nothing is perturbed."""
    rows: list[Row] = []
    for each in figures:
        found = each.difference
        rows.append((
            each.arm,
            share_cell(each.successes, each.trials),
            Cell(f"{100 * each.rate:.1f} ({span(each.clustered)})", sort=each.rate),
            f"{100 * plain[each.arm]:.1f}" if each.arm in plain else "–",
            f"{each.tokens:.1f} of {each.of_tokens}",
            *((points(found.value), span(found.interval, signed=True), p_text(found.p_value)) if found else "–––"),
        ))  # fmt: skip
    columns = (
        "arm", "solved", "% by initial states", "% unperturbed", "tokens kept", f"points to {BASELINE}",
        "95 % interval", "p",
    )  # fmt: skip
    return Table(f"Perturbed: {perturbation}", columns, rows)


def perturbed_text(scene: Scene) -> list[str]:
    """`position, object: none, lightvla`, for the table of what was fixed; nothing where there is none."""
    if not scene.perturbations:
        return []
    return [f"{', '.join(scene.perturbations)}: {', '.join(scene.perturbed_arms)}"]
