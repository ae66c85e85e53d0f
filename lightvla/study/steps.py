"""The steps of a study and what each needs: collect, build, parent, arms, evaluations."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lightvla.small_scale import Collection, SmallTraining, build_command, quote
from lightvla.study.definition import BASELINE, COUNT, PRUNED, Arm, Scene, Study
from lightvla.study.places import Places, measured
from lightvla.study.variants import Variant, save_freq, variants
from prismatic.checkpoints.places import CHECKPOINTS, checkpoint_name

PROCESSES = "{processes}"
"""In a command: simulator processes, which change nothing but the time."""


KEPT = ("evaluate", "benchmark")
"""Kinds of steps that leave a small result, by which they count as done."""


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: unique; of its files.
        kind: collect, build, train, evaluate or benchmark.
        needs: names of the steps whose outcome it takes.
        command: as a person would type it, but for `PROCESSES` and `COUNT`.
        makes: the folder that it writes.
        proof: what lies there when it is whole; of evaluations `makes`.
        units: demonstrations, samples or rollouts: what its time is proportional to.
        scene, arm, seed: of arms and evaluations.
        variant: of an evaluation beside the comparison (`variants.py`); empty: of the arm itself.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    command: tuple[str, ...]
    makes: Path
    proof: Path
    units: float
    scene: str = ""
    arm: str = ""
    seed: int = 0
    variant: str = ""


def all_steps(study: Study, places: Places) -> dict[str, Step]:
    """By name, each behind what it needs."""
    steps: list[Step] = []
    for scene in study.scenes:
        steps.append(_collect(scene, places))
        for seed in study.training.seeds:
            base = _build(seed, places)
            parent = _train(study, scene, seed, places, None, base)
            steps += [] if base in steps else [base]
            steps.append(parent)
            trained = [arm for arm in study.arms if arm.kind == "trained"]
            # What others wait for comes first.
            first = sorted(trained, key=lambda arm: arm.name not in (BASELINE, PRUNED))
            for arm in [*first, *(arm for arm in study.arms if arm.kind != "trained")]:
                steps += [_train(study, scene, seed, places, arm, parent)] if arm.kind == "trained" else []
                steps += [_evaluate(scene, seed, places, arm, variant) for variant in variants(scene, arm)]
        if any(arm.name == PRUNED and arm.kind == "trained" for arm in study.arms):
            steps.append(_benchmark(study, scene, places))
    for key in ("name", "makes"):
        made = [str(getattr(step, key)) for step in steps]
        if twice := [each for each in made if made.count(each) > 1]:
            raise ValueError(f"{places.definition}: two steps would be called {twice[0]}; rename a scene or an arm")
    return {step.name: step for step in steps}


def wanted(steps: Mapping[str, Step], arm: str | None) -> list[Step]:
    """What is asked for: the evaluations of one arm, or everything that a result is kept of."""
    kinds = KEPT if arm is None else ("evaluate",)
    return [step for step in steps.values() if step.kind in kinds and arm in (None, step.arm)]


def fingerprints(steps: Mapping[str, Step], places: Places) -> dict[str, str]:
    """By step: a hash of its command and of all that it is made from; another one means another outcome.

    Where the study lies changes none: its folder may be moved, and be named in another way.
    """
    found: dict[str, str] = {}
    work = f"{places.work}/"
    for step in steps.values():
        words = [f"WORK/{word.removeprefix(work)}" if word.startswith(work) else word for word in step.command]
        parts = [*words, *(found[need] for need in step.needs)]
        found[step.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return found


def filled_in(step: Step, processes: int, count: int | None) -> list[str]:
    """The command with its numbers."""
    values = {PROCESSES: str(processes), COUNT: str(count)}
    words = list(step.command)
    for name, value in values.items():
        words = [word.replace(name, value) for word in words]
    return words


def needs_count(step: Step) -> bool:
    """Whether the pruned arm's number of tokens is part of the command."""
    return any(COUNT in word for word in step.command)


def ordered(steps: Mapping[str, Step], names: Iterable[str]) -> list[Step]:
    """Those of the steps, in the order of the study."""
    chosen = set(names)
    return [step for name, step in steps.items() if name in chosen]


def _dataset(scene: Scene) -> str:
    # A name that begins so has LIBERO's gripper.
    return f"libero_{scene.name.replace('-', '_').replace('.', '_')}_study"


def _tasks(scene: Scene) -> str:
    return ",".join(map(str, scene.tasks))


def _collect(scene: Scene, places: Places) -> Step:
    collection = Collection(
        places.data, _dataset(scene), scene.suite, _tasks(scene), scene.train_states,
        str(scene.demonstrations_per_task), scene.image_size, scene.wide_starts_train_m, scene.wide_starts_share,
        scene.starts_seed,
    )  # fmt: skip
    makes = places.data / _dataset(scene)
    units = scene.demonstrations_per_task * len(scene.tasks)
    command = tuple(collection.command(PROCESSES))
    return Step(f"collect-{scene.name}", "collect", (), command, makes, makes / "1.0.0", units, scene.name)


def _build(seed: int, places: Places) -> Step:
    base = places.base(seed)
    return Step(f"build-seed{seed}", "build", (), tuple(build_command(base, seed)), base, base / "small_model.json", 1)


def _train(study: Study, scene: Scene, seed: int, places: Places, arm: Arm | None, origin: Step) -> Step:
    """The parent where there is no arm."""
    training = study.training
    name = f"{scene.name}-{'parent' if arm is None else arm.name}-seed{seed}"
    steps = training.parent_steps if arm is None else training.arm_steps
    every = None if arm is None else save_freq(arm)
    shared = SmallTraining(places.data, _dataset(scene), places.runs, training.batch_size, seed, every)
    flags = "--pruner none" if arm is None else arm.flags
    command = tuple(shared.command(origin.makes, name, flags, f"{training.learning_rate:g}", steps))
    makes = places.runs / name
    needs = (f"collect-{scene.name}", origin.name, *_for_count(flags, scene, seed))
    step = Step(
        f"train-{name}", "train", needs, command, makes,
        makes / CHECKPOINTS / checkpoint_name(name, steps), steps * training.batch_size, scene.name, "", seed,
    )  # fmt: skip
    return step if arm is None else replace(step, arm=arm.name)


def _for_count(flags: str, scene: Scene, seed: int) -> list[str]:
    """The step that tells the number of tokens, where flags name it."""
    return [f"evaluate-{scene.name}-{PRUNED}-seed{seed}"] if COUNT in flags else []


def _evaluate(scene: Scene, seed: int, places: Places, arm: Arm, variant: Variant) -> Step:
    trained = {"trained": arm.name, "untrained": BASELINE, "control": PRUNED}[arm.kind]
    run = f"{scene.name}-{trained}-seed{seed}"
    name = f"evaluate-{scene.name}-{measured(arm.name, variant.name)}-seed{seed}"
    flags = "" if arm.kind == "trained" else arm.flags
    needs = (f"train-{run}", *_for_count(flags, scene, seed))
    checkpoint, makes = places.runs / run, places.evaluation(name)
    if variant.step is not None:
        checkpoint = checkpoint / CHECKPOINTS / checkpoint_name(run, variant.step)
    command = shlex.split(f"""lightvla eval
        --pretrained_checkpoint {quote(checkpoint)}
        --task_suite_name {scene.suite} --task_ids {_tasks(scene)} --initial_states {scene.held_out_states}
        --num_trials_per_task {variant.trials} --wide_starts_m {scene.wide_starts_m}
        --env_img_res {scene.image_size} --renderer fast --seed {scene.starts_seed} --num_envs 1 --dtype float32
        --engine eager --resume True --report False --output_dir {quote(makes)}
        {f"--perturbation {variant.perturbation}" if variant.perturbation else ""}
        {flags}""")
    units = variant.trials * len(scene.tasks)
    return Step(
        name, "evaluate", needs, tuple(command), makes, makes, units, scene.name, arm.name, seed, variant.name
    )  # fmt: skip


def _benchmark(study: Study, scene: Scene, places: Places) -> Step:
    """What a query costs with the first seed's weights: without pruning, at the count of `lightvla`, untrained arms."""
    seed = study.training.seeds[0]
    name = f"benchmark-{scene.name}-seed{seed}"
    makes = places.evaluation(name)
    flags = [dict(zip(words[::2], words[1::2], strict=True)) for arm in study.arms
             if arm.kind == "untrained" and (words := shlex.split(arm.flags))]  # fmt: skip
    pruners = ["none", "lightvla", *(given["--pruner"] for given in flags if list(given) == ["--pruner"])]
    command = shlex.split(f"""lightvla benchmark
        --checkpoint {quote(places.runs / f"{scene.name}-{PRUNED}-seed{seed}")} --engines eager
        --pruners {shlex.quote(",".join(pruners))} --tokens {COUNT} --dtypes float32 --threads 1 --cold_starts 0
        --repeats 40 --output_dir {quote(makes)}""")
    needs = tuple(f"{kind}-{scene.name}-{PRUNED}-seed{seed}" for kind in ("train", "evaluate"))
    return Step(
        name, "benchmark", needs, tuple(command), makes, makes / "benchmark.json", 1, scene.name, "", seed
    )  # fmt: skip
