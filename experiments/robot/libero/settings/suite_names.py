"""The names of the suites that can be evaluated: LIBERO's five, and LIBERO-PRO's perturbations of four of them.

LIBERO-PRO: arXiv 2510.03827; github.com/Zxy-MLlab/LIBERO-PRO, README, gives perturbed suites the step caps of the suite
that they perturb.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_CAPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Standard suite -> control steps after which an episode counts as failed (settle steps not included)."""


PERTURBATIONS = {"language": "lan", "object": "object", "position": "swap", "task": "task", "environment": "env"}
"""What LIBERO-PRO perturbs -> the end of the names of its suites."""


SHIFT = "shift"
"""The perturbation of `libero_object_temp_x0.1` and its like: all objects lie further along x or y."""


_PERTURBED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@dataclass(frozen=True)
class Suite:
    """A suite's name, the standard suite that it comes from (itself for a standard one), and what was perturbed."""

    name: str
    base: str
    perturbation: str | None = None


def _all_suites() -> dict[str, Suite]:
    found = [Suite(name, name) for name in STEP_CAPS]
    found += [
        Suite(f"{base}_{ending}", base, perturbation)
        for perturbation, ending in PERTURBATIONS.items()
        for base in _PERTURBED
    ]
    # The package's y0.5 lacks the initial states of one task.
    shifts = [f"{axis}0.{tenths}" for axis in "xy" for tenths in range(1, 6) if (axis, tenths) != ("y", 5)]
    found += [Suite(f"libero_object_temp_{shift}", "libero_object", SHIFT) for shift in shifts]
    return {suite.name: suite for suite in found}


SUITES = _all_suites()
"""Name -> suite."""


def listing() -> str:
    """All names, grouped by what is perturbed, for error messages."""
    groups: dict[str, list[str]] = {}
    for suite in SUITES.values():
        groups.setdefault(suite.perturbation or "standard", []).append(suite.name)
    return "; ".join(f"{group}: {', '.join(names)}" for group, names in groups.items())


def find_suite(name: str) -> Suite:
    """Raises ValueError for an unknown name, listing those there are."""
    if name not in SUITES:
        groups = ", ".join(f"{group} ({len(names)} of them)" for group, names in GROUPS.items())
        raise ValueError(f"unknown LIBERO suite {name!r}; known: {listing()}; several: {groups}, or names with commas")
    return SUITES[name]


GROUPS = {"libero_4": _PERTURBED, "all": tuple(STEP_CAPS)}
"""Names for several suites at once: the four of papers, and LIBERO's five."""


def suites_of(text: str) -> list[str]:
    """`libero_goal,libero_10` or a name of several -> the suites' names, in order.

    Raises:
        ValueError: for an unknown name, listing those there are, and for one that is there twice.
    """
    names = [name for part in text.split(",") for name in GROUPS.get(part.strip(), (part.strip(),))]
    for name in names:
        find_suite(name)
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--task_suite_name {text!r} names {twice[0]} twice; name each suite once")
    return names


def perturbed(name: str, perturbation: str) -> str:
    """The suite that perturbs a standard one, or the suite itself where it is perturbed so already.

    Raises:
        ValueError: for an unknown perturbation, and where LIBERO-PRO does not perturb the suite so.
    """
    if perturbation not in PERTURBATIONS:
        raise ValueError(f"unknown --perturbation {perturbation!r}; known: {', '.join(PERTURBATIONS)}")
    suite = find_suite(name)
    result = f"{suite.base}_{PERTURBATIONS[perturbation]}"
    if result not in SUITES or suite.name not in (suite.base, result):
        raise ValueError(
            f"--perturbation {perturbation} does not fit --task_suite_name {name}; expected {', '.join(_PERTURBED)}"
        )
    return result


def step_cap(name: str) -> int:
    """Control steps after which an episode counts as failed; a perturbed suite has its base's."""
    return STEP_CAPS[find_suite(name).base]


def task_count(name: str) -> int:
    """How many tasks a suite has, numbered from 0; LIBERO itself need not be installed."""
    return 90 if find_suite(name).base == "libero_90" else 10
