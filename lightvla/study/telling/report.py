"""The report of a study, Markdown and HTML, made of its definition and its kept results: no run is needed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.robot.libero.comparison.compare import ALPHA, p_text, points, span
from lightvla.study.benchmarks import SceneBenchmark, load_benchmarks
from lightvla.study.definition import BASELINE, PRUNED, Study
from lightvla.study.places import Places, measured
from lightvla.study.records import ArmResult, Missing, forced_changes, foreign, load_all
from lightvla.study.telling.checkpoints import checkpoint_sections, checkpoints_text
from lightvla.study.telling.costs import benchmark_table, cost_note, cost_table, costs
from lightvla.study.telling.figures import ArmFigures, Primary, arm_figures, primary_answers
from lightvla.study.telling.origins import mixed_origins
from lightvla.study.telling.perturbed import perturbed_sections, perturbed_text
from lightvla.study.variants import load_variants
from prismatic.report.charts import RateBars
from prismatic.report.data import (
    Block,
    Cell,
    CodeBlock,
    Headline,
    Notes,
    ReportData,
    Row,
    Section,
    Table,
    counted,
    share_cell,
)
from prismatic.report.figures import Curve
from prismatic.report.html import write_report as write_html
from prismatic.report.markdown import write_markdown

NAMES = ("report.md", "report.html")

COMMANDS = {
    "--list True": "the steps, what is done, how long the rest takes",
    "": "run what is left; interrupted, the same command goes on",
    "--only {arm}": "one arm, and what it needs",
    "--report_only True": "this report from the kept results, in seconds",
}


def write_reports(study: Study, places: Places) -> list[Path]:
    """Write both forms below the study's folder; raises ValueError for kept results that cannot be read."""
    results, missing = load_all(study, places)
    beside, missing_beside = load_variants(study, places)
    data = report_data(study, places, results, [*missing, *missing_beside], beside)
    return [write_markdown(data, places.root / NAMES[0]), write_html(data, places.root / NAMES[1])]


def report_data(
    study: Study,
    places: Places,
    results: Sequence[ArmResult],
    missing: Sequence[Missing],
    beside: Sequence[ArmResult] = (),
) -> ReportData:
    """Everything in the report; `beside` are results of variants, which are in no comparison."""
    figures, answers, name = arm_figures(study, results), primary_answers(study, results), places.root.name
    alone, sections = load_benchmarks(study, places), list[Section]()
    for scene in study.scenes:
        own = [each for each in figures if each.scene == scene.name]
        if not own:
            continue
        title = f": {scene.name}" if len(study.scenes) > 1 else ""
        benchmark = alone.get(scene.name)
        in_scene, beside_in_scene = ([r for r in found if r.scene == scene.name] for found in (results, beside))
        names = {int(index): task for result in in_scene for index, task in result.tasks.items()}
        sections += [
            Section(f"Success{title}", [_bars(own), success_table(own)], note=_success_note()),
            Section(f"Against {BASELINE}{title}", [difference_table(own)], note=_difference_note()),
            Section(f"Task by task{title}", [task_table(own, names)]),
            Section(f"Seed by seed{title}", [seed_table(own, study.training.seeds)], note=_seed_note(study, own)),
            Section(f"Cost and movement{title}", _cost_tables(study, in_scene, benchmark), note=cost_note()),
            Section(f"Training{title}", _curves(in_scene), columns=2),
            *checkpoint_sections(study, scene, in_scene, beside_in_scene),
            *perturbed_sections(study, scene, in_scene, beside_in_scene),
        ]
    return ReportData(
        title=f"Study: {name}",
        summary=[study.question, *(answer.sentence for answer in answers)],
        alerts=_alerts(study, places, results, beside, alone, missing),
        headlines=_headlines(study, figures, answers),
        sections=[
            *sections,
            Section("What was fixed in advance", [_fixed_table(study), *_scene_tables(study), _arm_table(study)]),
            Section("Commands", [CodeBlock("", _commands(name, study.arms[0].name))]),
            Section("Made with", _made([*results, *beside])),
        ],
        footer="A small-scale study: a policy of a few million parameters, scripted demonstrations, a simulator.",
    )


def _cost_tables(study: Study, results: Sequence[ArmResult], benchmark: SceneBenchmark | None) -> list[Table]:
    by_arm = {arm.name: [result for result in results if result.arm == arm.name] for arm in study.arms}
    baseline = by_arm.get(BASELINE, [])
    found = [costs(name, own, baseline if name != BASELINE else []) for name, own in by_arm.items() if own]
    return [cost_table(found), *([benchmark_table(benchmark)] if benchmark is not None else [])]


def _commands(name: str, arm: str) -> str:
    lines = {f"lightvla study {name} {flags.format(arm=arm)}".rstrip(): said for flags, said in COMMANDS.items()}
    width = max(map(len, lines))
    return "\n".join(f"{command:<{width}}   # {said}" for command, said in lines.items())


def _alerts(
    study: Study,
    places: Places,
    results: Sequence[ArmResult],
    beside: Sequence[ArmResult],
    benchmarks: Mapping[str, SceneBenchmark],
    missing: Sequence[Missing],
) -> list[str]:
    alerts = [
        f"study.yaml was changed after arms had been run ({change['time']}, SHA-256 {change['from'][:12]} to "
        f"{change['to'][:12]}): what follows was not all fixed in advance."
        for change in forced_changes(places)
    ]
    every = [*results, *beside]
    other = [f"the benchmark of {scene}" for scene, each in benchmarks.items() if each.study_sha256 != study.sha256]
    if other := [*foreign(study, every), *other]:
        alerts.append(
            f"Made by another study.yaml than the present one, and compared among themselves alone: {'; '.join(other)}."
        )
    if mixed := mixed_origins(study, results, beside):
        alerts.append(f"Does not belong together: {'; '.join(mixed)}.")
    warned: dict[str, list[str]] = {}
    for each in every:
        for warning in each.made.get("warnings", []):
            warned.setdefault(warning, []).append(f"{measured(each.arm, each.variant)}, seed {each.seed}")
    alerts += [f"{'; '.join(names)}: {warning}." for warning, names in warned.items()]
    waiting = _by_seeds(missing, name_scenes=len(study.scenes) > 1)
    if any(arm.name == PRUNED and arm.kind == "trained" for arm in study.arms):
        waiting += [f"the benchmark of {scene.name}" for scene in study.scenes if scene.name not in benchmarks]
    if waiting:
        alerts.append(f"Not run yet: {'; '.join(waiting)}.")
    return alerts


def _by_seeds(missing: Sequence[Missing], name_scenes: bool) -> list[str]:
    """`random, grid (seeds 7 and 11)`."""
    seeds: dict[str, list[str]] = {}
    for scene, name, seed in missing:
        seeds.setdefault(f"{name} in {scene}" if name_scenes else name, []).append(str(seed))
    together: dict[tuple[str, ...], list[str]] = {}
    for name, own in seeds.items():
        together.setdefault(tuple(own), []).append(name)
    return [f"{', '.join(names)} (seed{'s' * (len(own) > 1)} {' and '.join(own)})" for own, names in together.items()]


def _headlines(study: Study, figures: Sequence[ArmFigures], answers: Sequence[Primary]) -> list[Headline]:
    def place(scene: str) -> str:
        return f", {scene}" if len(answers) > 1 else ""

    found = [Headline(each.answer, f"primary comparison{place(each.scene)}") for each in answers]
    for each in figures:
        if each.arm in study.fixed.primary:
            label = f"{each.arm}, {100 * each.token_share:.0f} % of the tokens{place(each.scene)}"
            found.append(Headline(f"{each.successes} of {each.trials}", label))
    return found


def _bars(figures: Sequence[ArmFigures]) -> RateBars:
    counts = [(each.successes, each.trials) for each in figures]
    return RateBars("All tasks and seeds together", [each.arm for each in figures], {"solved": counts})


def success_table(figures: Sequence[ArmFigures]) -> Table:
    """Success, tokens and completion time of every arm."""
    rows: list[Row] = [
        (
            Cell(each.arm, note=f"{each.kind}, {each.pruner}"),
            share_cell(each.successes, each.trials),
            Cell(f"{100 * each.rate:.1f} ({span(each.clustered)})", sort=each.rate),
            Cell(f"{each.tokens:.1f} of {each.of_tokens}", sort=each.tokens),
            f"{100 * each.token_share:.1f} %",
            f"{each.steps:.1f}" if each.steps is not None else "–",
        )
        for each in figures
    ]
    columns = ("arm", "solved", "% by initial states", "tokens kept", "share", "steps to success")
    return Table("Every arm", columns, rows, sortable=True)


def _success_note() -> str:
    return (
        "Solved: all rollouts, with Wilson's 95 % interval as if each were a trial of its own. By initial states: the "
        "mean over tasks, with Wilson's interval for as many trials as the rollouts are worth, since those from one "
        "initial state resemble each other. Steps: control steps of the successful rollouts."
    )


def difference_table(figures: Sequence[ArmFigures]) -> Table:
    """Every arm against the baseline, on the same starts."""
    rows: list[Row] = []
    for each in figures:
        if (found := each.difference) is None:
            continue
        counts = found.counts
        rows.append((
            each.arm,
            Cell(points(found.value), sort=found.value),
            span(found.interval, signed=True),
            f"{counts.both}/{counts.only_first}/{counts.only_second}/{counts.neither}",
            str(found.states),
            p_text(found.p_value),
            p_text(found.corrected_p),
            found.verdict,
        ))  # fmt: skip
    columns = (
        "arm", "points", "95 % interval", f"both/arm only/{BASELINE} only/neither", "initial states", "p", "p (Holm)",
        "verdict",
    )  # fmt: skip
    return Table(f"Paired difference to {BASELINE}", columns, rows, sortable=True)


def _difference_note() -> str:
    return (
        "On the same starts of the same training seed, averaged over tasks, with Tango's interval for as many pairs as "
        "the rollouts are worth, since those from one initial state resemble each other. p: McNemar's test by initial "
        f"states. The verdict goes by Holm's p at {ALPHA:g}."
    )


def task_table(figures: Sequence[ArmFigures], names: dict[int, str]) -> Table:
    """Solved by task: a row for each arm, or for each task where there are more of these."""

    def cell(each: ArmFigures, task: int) -> Cell | str:
        return share_cell(*each.by_task[task]) if task in each.by_task else "–"

    tasks = sorted(names)
    if len(tasks) > len(figures):
        rows: list[Row] = [(names[task], *(cell(each, task) for each in figures)) for task in tasks]
        return Table("Solved by task", ("task", *(each.arm for each in figures)), rows)
    rows = [(each.arm, *(cell(each, task) for task in tasks)) for each in figures]
    return Table("Solved by task", ("arm", *(names[task] for task in tasks)), rows)


def seed_table(figures: Sequence[ArmFigures], seeds: Sequence[int]) -> Table:
    """Solved by training seed."""
    rows: list[Row] = [
        (each.arm, *(share_cell(*each.by_seed[seed]) if seed in each.by_seed else "–" for seed in seeds))
        for each in figures
    ]
    return Table("Solved by training seed", ("arm", *(f"seed {seed}" for seed in seeds)), rows)


def _seed_note(study: Study, figures: Sequence[ArmFigures]) -> str:
    planned, run = len(study.training.seeds), len({seed for each in figures for seed in each.by_seed})
    count = counted(planned, "training seed") if run == planned else f"{run} of {counted(planned, 'training seed')}"
    return f"{count}: the intervals above are about these trainings alone."


def _curves(results: Sequence[ArmResult]) -> list[Block]:
    """Loss and tokens of every trained arm, one line each."""
    trained = [result for result in results if result.curves]
    blocks: list[Block] = []
    for key, title, unit in (
        ("loss", "Loss: L1 of normalised actions", "L1"),
        ("tokens_kept", "Visual tokens kept in training", "per sample"),
    ):
        records, keys = [], {}
        for result in trained:
            label = f"{result.arm}, seed {result.seed}"
            keys[label] = label
            steps, values = result.curves.get(key, [[], []])
            records += [{"step": step, label: value} for step, value in zip(steps, values, strict=True)]
        if records:
            blocks.append(Curve(title, keys, records, unit))
    return blocks


def _fixed_table(study: Study) -> Table:
    training, fixed = study.training, study.fixed
    rows = [
        ("primary comparison", f"{fixed.primary[0]} against {fixed.primary[1]}"),
        ("non-inferior where", f"the lower 95 % bound lies above -{fixed.margin_points:g} points"),
        *(("excluded", sentence) for sentence in fixed.exclusions),
        ("training seeds", ", ".join(map(str, training.seeds))),
        ("steps", f"{training.parent_steps} of the parent without pruning, {training.arm_steps} of every trained arm"),
        ("batch size, learning rate", f"{training.batch_size}, {training.learning_rate:g}"),
        ("SHA-256 of the definition", study.sha256),
    ]
    return Table("The study", ("what", "is"), rows, numeric=False)


def _scene_tables(study: Study) -> list[Table]:
    return [
        Table(
            f"Scene {scene.name}",
            ("what", "is"),
            [
                ("tasks", f"{scene.suite} {', '.join(map(str, scene.tasks))}"),
                ("demonstrations", f"{scene.demonstrations_per_task} a task from initial states {scene.train_states}"),
                ("measured on", f"{scene.trials_per_task} rollouts a task from initial states {scene.held_out_states}"),
                ("objects moved by", f"up to {100 * scene.wide_starts_m:g} cm in x and in y, seed {scene.starts_seed}"),
                ("pictures", f"{scene.image_size} px"),
                *(("measured while training", text) for text in checkpoints_text(study, scene)),
                *(("perturbed, too", text) for text in perturbed_text(scene)),
            ],
            numeric=False,
        )
        for scene in study.scenes
    ]


def _arm_table(study: Study) -> Table:
    rows = [(arm.name, arm.kind, arm.flags) for arm in study.arms]
    return Table("Arms", ("arm", "kind", "flags"), rows, numeric=False)


def _made(results: Sequence[ArmResult]) -> list[Block]:
    """Machines, commits and versions, each once, and the command of one evaluation."""
    if not results:
        return []
    facts = dict.fromkeys(
        f"{result.made['device']}, commit {result.made['git_commit']}, "
        + ", ".join(f"{name} {version}" for name, version in result.made["versions"].items())
        for result in results
    )
    return [Notes(list(facts)), CodeBlock(f"How {results[0].arm} was evaluated", results[0].command)]
