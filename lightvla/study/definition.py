"""What a study is: `study.yaml`, read strictly, and its hash.

Everything that could be chosen after looking at results stands in it: starts, trials, arms, the primary comparison, its
margin, what is excluded. The hash is of what the file says, not of how it says it: comments and order are free.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from experiments.robot.libero.settings.flags import parse_indices
from experiments.robot.libero.settings.suite_names import perturbed, task_count

Part = TypeVar("Part")

BASELINE, PRUNED = "none", "lightvla"
"""The arms that untrained arms and controls are made from."""
COUNT = "{lightvla}"
"""In the flags of an arm: the number of tokens that the pruned arm of the same seed kept, rounded."""
KINDS = {
    "trained": "fine-tuned from the parent with its flags of lightvla finetune, then evaluated",
    "untrained": f"the arm {BASELINE} evaluated with its flags of lightvla eval",
    "control": f"the arm {PRUNED} evaluated with its flags of lightvla eval",
}
LIBERO_STATES = 50
"""Initial states that LIBERO has of each task."""
MOST_CHECKPOINTS = 20
"""That one training may keep."""


@dataclass(frozen=True)
class Scene:
    """Tasks whose rollouts are compared, and their data.

    Attributes:
        name: of files.
        train_states, held_out_states: initial states as `0-29`; those to collect from and those to measure on.
        wide_starts_train_m, wide_starts_share: how far objects are moved in collection, and in which share of it.
        wide_starts_m: how far in measuring.
        trials_per_task: rollouts of each task; the held-out states are gone round for them.
        starts_seed: of collection and of the displacements that are measured on.
        checkpoint_trials_per_task: rollouts of each task from an arm's `checkpoints`, the first of those above; 0: all.
        perturbations: of the suite by LIBERO-PRO (`position`, `object`), in which, too,
        perturbed_arms: these arms are measured.
    """

    name: str
    suite: str
    tasks: tuple[int, ...]
    demonstrations_per_task: int
    image_size: int
    train_states: str
    held_out_states: str
    wide_starts_train_m: float
    wide_starts_share: float
    wide_starts_m: float
    trials_per_task: int
    starts_seed: int
    checkpoint_trials_per_task: int = 0
    perturbations: tuple[str, ...] = ()
    perturbed_arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Training:
    """Of the parent (without pruning) and, from it, of every trained arm; `seeds`: one of each for every one."""

    seeds: tuple[int, ...]
    parent_steps: int
    arm_steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Arm:
    """One thing that is measured.

    Attributes:
        kind: one of `KINDS`.
        flags: those that make it this arm.
        checkpoints: steps of its training that are measured too.
    """

    name: str
    kind: str
    flags: str
    checkpoints: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fixed:
    """What is decided before any arm is run.

    Attributes:
        primary: the arm that the study is about, and the one it is compared with.
        margin_points: in percentage points; the first is non-inferior where the lower 95 % bound of its difference to
            the second lies above minus this.
        exclusions: which rollouts do not count, in sentences.
    """

    primary: tuple[str, ...]
    margin_points: float
    exclusions: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A whole `study.yaml`."""

    question: str
    scenes: tuple[Scene, ...]
    training: Training
    arms: tuple[Arm, ...]
    fixed: Fixed

    @property
    def sha256(self) -> str:
        """Of everything that it says; an optional key at its default says nothing."""
        return hashlib.sha256(json.dumps(_said(self), sort_keys=True).encode()).hexdigest()

    def arm(self, name: str) -> Arm:
        """Raises ValueError for an unknown name, with the known ones."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise ValueError(f"no arm {name!r}; the arms are {', '.join(arm.name for arm in self.arms)}")


def read_study(path: Path) -> Study:
    """Raises ValueError for a file that cannot be read, for unknown or missing keys, and for values that do not fit."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such study; write that file, or name one that is there") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    try:
        study = _build(Study, content, "")
        _check(study)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return study


def _said(part: Any) -> Any:
    """As plain values, without fields at their default: a key that did not exist yet changes no hash."""
    if isinstance(part, tuple):
        return [_said(entry) for entry in part]
    if not dataclasses.is_dataclass(part):
        return part
    values = {field: getattr(part, field.name) for field in fields(part)}
    return {field.name: _said(value) for field, value in values.items() if value != field.default}


def _build(kind: type[Part], content: Any, where: str) -> Part:
    """A dataclass from plain values: all its keys but those with a default, and no others."""
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    place = f"in {where}" if where else "at the top"
    if not isinstance(content, Mapping):
        raise ValueError(f"{place} stands {content!r}; expected the keys {', '.join(known)}")
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"unknown keys {place}: {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := [key for key, value in known.items() if value is MISSING and key not in content]:
        raise ValueError(f"missing {place}: {', '.join(missing)}")
    types = get_type_hints(kind)
    return kind(**{key: _value(types[key], content[key], f"{where}.{key}".lstrip(".")) for key in content})


def _value(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} is {value!r}; expected a list with at least one entry")
        return tuple(_value(get_args(kind)[0], entry, f"{where}[{place}]") for place, entry in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)  # type: ignore[arg-type]
    if kind is float:
        # YAML takes 3e-4 for a word.
        if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
            value = float(value)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    else:
        fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    if not fits:
        name = {int: "a whole number", float: "a number", str: "text"}[kind]
        raise ValueError(f"{where} is {value!r}; expected {name}")
    return value


def _check(study: Study) -> None:
    """Raises ValueError for what does not fit together."""
    for kind, names in (
        ("scenes", [scene.name for scene in study.scenes]),
        ("arms", [arm.name for arm in study.arms]),
    ):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
                raise ValueError(f"the name {name!r} in {kind}: expected letters, digits, - _ and . (it names files)")
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} stands twice in {kind}; give each its own")
    for scene in study.scenes:
        _check_scene(scene)
        _check_perturbed(study, scene)
    training = study.training
    for key in ("parent_steps", "arm_steps", "batch_size", "learning_rate"):
        if not getattr(training, key) > 0:
            raise ValueError(f"training.{key} is {getattr(training, key)}; expected more than 0")
    if len(set(training.seeds)) < len(training.seeds) or min(training.seeds) < 0:
        raise ValueError(f"training.seeds are {list(training.seeds)}; expected different numbers from 0 on")
    for arm in study.arms:
        _check_arm(study, arm)
    if len(study.fixed.primary) != 2 or study.fixed.primary[0] == study.fixed.primary[1]:
        raise ValueError(f"fixed.primary is {list(study.fixed.primary)}; expected two arms: [lightvla, none], say")
    for name in study.fixed.primary:
        study.arm(name)
    if not 0 < study.fixed.margin_points < 100:
        raise ValueError(f"fixed.margin_points is {study.fixed.margin_points}; expected more than 0, below 100")


def _check_scene(scene: Scene) -> None:
    where = f"scene {scene.name}"
    for key in ("demonstrations_per_task", "image_size", "trials_per_task"):
        if getattr(scene, key) < 1:
            raise ValueError(f"{where}: {key} is {getattr(scene, key)}; expected 1 or more")
    try:
        count = task_count(scene.suite)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if unknown := [task for task in scene.tasks if not 0 <= task < count]:
        raise ValueError(f"{where}: {scene.suite} has no task {unknown[0]}; expected 0 to {count - 1}")
    if len(set(scene.tasks)) < len(scene.tasks):
        raise ValueError(f"{where}: tasks are {list(scene.tasks)}; name each once")
    if not (0 <= scene.wide_starts_m <= 0.3 and 0 <= scene.wide_starts_train_m <= 0.3):
        raise ValueError(f"{where}: wide_starts_m and wide_starts_train_m are metres; expected 0 to 0.3")
    if not 0 <= scene.checkpoint_trials_per_task <= scene.trials_per_task:
        raise ValueError(
            f"{where}: checkpoint_trials_per_task is {scene.checkpoint_trials_per_task}; expected at most the "
            f"{scene.trials_per_task} of trials_per_task, or 0 for all of them"
        )
    if not 0 <= scene.wide_starts_share <= 1:
        raise ValueError(f"{where}: wide_starts_share is {scene.wide_starts_share}; expected 0 to 1")
    train, held_out = (parse_indices(getattr(scene, key), key) for key in ("train_states", "held_out_states"))
    if max(*train, *held_out) >= LIBERO_STATES:
        raise ValueError(f"{where}: LIBERO's tasks have initial states 0 to {LIBERO_STATES - 1}")
    if both := sorted(set(train) & set(held_out)):
        raise ValueError(f"{where}: state {both[0]} is trained on and held out; held-out states are those that are not")
    if scene.trials_per_task > len(held_out) and not scene.wide_starts_m:
        raise ValueError(
            f"{where}: {scene.trials_per_task} trials of {len(held_out)} held-out states would repeat rollouts; ask "
            "for fewer, or displace objects by wide_starts_m"
        )


def _check_perturbed(study: Study, scene: Scene) -> None:
    where = f"scene {scene.name}"
    if bool(scene.perturbations) != bool(scene.perturbed_arms):
        raise ValueError(f"{where}: perturbations and perturbed_arms go together; give both, or neither")
    for key in ("perturbations", "perturbed_arms"):
        if len(set(getattr(scene, key))) < len(getattr(scene, key)):
            raise ValueError(f"{where}: {key} are {list(getattr(scene, key))}; name each once")
    try:
        for perturbation in scene.perturbations:
            perturbed(scene.suite, perturbation)
        for name in scene.perturbed_arms:
            study.arm(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if scene.perturbed_arms and BASELINE not in scene.perturbed_arms:
        raise ValueError(f"{where}: perturbed_arms lacks {BASELINE}, which the others are compared with; add it")


def _check_arm(study: Study, arm: Arm) -> None:
    if arm.kind not in KINDS:
        known = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
        raise ValueError(f"arm {arm.name} has kind {arm.kind!r}; known are {known}")
    if arm.name in (BASELINE, PRUNED) and COUNT in arm.flags:
        raise ValueError(
            f"arm {arm.name}: {COUNT} is what {PRUNED} keeps once it has been measured; neither it nor {BASELINE} "
            "can begin with that, so say a number"
        )
    if arm.checkpoints:
        _check_checkpoints(arm, study.training.arm_steps)
    needed = {"trained": None, "untrained": BASELINE, "control": PRUNED}[arm.kind]
    for name in filter(None, (needed, PRUNED if COUNT in arm.flags else None)):
        if not any(other.name == name and other.kind == "trained" for other in study.arms):
            raise ValueError(f"arm {arm.name} needs a trained arm named {name}; add it")


def _check_checkpoints(arm: Arm, steps: int) -> None:
    where = f"arm {arm.name}: checkpoints {list(arm.checkpoints)}"
    if arm.kind != "trained":
        raise ValueError(f"{where}: only a trained arm has some of its own; leave the key out")
    if list(arm.checkpoints) != sorted(set(arm.checkpoints) & set(range(1, steps))):
        raise ValueError(f"{where}: expected rising steps, from 1 to below the {steps} of training.arm_steps")
    if (kept := steps // (every := math.gcd(*arm.checkpoints)) + 1) > MOST_CHECKPOINTS:
        raise ValueError(
            f"{where}: to have these, one is kept every {every} steps, {kept} in all; give multiples of a number that "
            f"makes at most {MOST_CHECKPOINTS}"
        )
