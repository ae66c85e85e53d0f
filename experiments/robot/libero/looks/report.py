"""`looks.md` and `looks.html`, made of `looks.json` and the pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.robot.libero.comparison.compare import p_text, points, span
from experiments.robot.libero.looks.classes import CLASSES
from experiments.robot.libero.looks.config import UNBLANKED
from experiments.robot.libero.looks.counts import Counts, Rollout
from experiments.robot.libero.looks.figures import STAYS_POINTS, Against, Blanked, Take, against_chance, blanked
from experiments.robot.libero.looks.phases import AT_GOAL_M, JUST_RELEASED_STEPS, LIFTED_M, NEAR_M, PHASES
from experiments.robot.libero.looks.shares import ALL_BACKGROUND, LIES_ON
from prismatic.atomic_files import write_atomically
from prismatic.report.charts import StackedBars
from prismatic.report.data import (
    Block,
    Cell,
    Clip,
    CodeBlock,
    Headline,
    Media,
    Notes,
    Picture,
    ReportData,
    Row,
    Section,
    Table,
    counted,
    share_cell,
)
from prismatic.report.html import write_report as write_html
from prismatic.report.markdown import write_markdown
from prismatic.report.media import MediaFiles
from prismatic.significance import holm

FORMAT_VERSION = 1
NAMES = ("looks.json", "looks.md", "looks.html")
MAX_EMBEDDED_BYTES = 12 << 20
WORDS = {
    "target": "what is moved",
    "goal": "where it goes",
    "gripper": "fingers and hand",
    "arm": "the rest of the robot",
    "distractors": "other objects and fixtures",
    "background": "table, floor, walls",
}
_BLANKED = {
    "target": f"on the target, at least {100 * LIES_ON:.0f} % of the patch",
    "goal": f"on the goal, at least {100 * LIES_ON:.0f} % of the patch",
    "background": f"on background alone, at least {100 * ALL_BACKGROUND:.0f} % of the patch",
    "random": "as many others as lie on the target, at random",
}


@dataclass
class Looks:
    """Everything that tables are made of: `looks.json`.

    Attributes:
        made: command, checkpoint, weights, versions, commit, flags, time.
        rollouts: of all conditions.
    """

    made: dict[str, Any]
    rollouts: list[Rollout]

    def save(self, path: Path) -> None:
        """Write atomically, a line per rollout."""
        thresholds = {
            "lifted_m": LIFTED_M, "at_goal_m": AT_GOAL_M, "near_m": NEAR_M, "just_released_steps": JUST_RELEASED_STEPS,
            "lies_on": LIES_ON, "all_background": ALL_BACKGROUND,
        }  # fmt: skip
        content = {
            "format_version": FORMAT_VERSION,
            "made": self.made,
            "classes": CLASSES,
            "phases": PHASES,
            "thresholds": thresholds,
        }
        head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(rollout.to_json(), allow_nan=False)}" for rollout in self.rollouts)
        write_atomically(path, f'{head},\n "rollouts": [\n{lines}\n ]\n}}\n')

    @classmethod
    def load(cls, path: Path) -> Looks:
        """Raises ValueError for a file of another format version."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if (found := content.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {found}, this code reads {FORMAT_VERSION}; run the command again"
            )
        return cls(content["made"], [Rollout.from_json(each) for each in content["rollouts"]])

    @property
    def unblanked(self) -> list[Rollout]:
        return [rollout for rollout in self.rollouts if rollout.condition == UNBLANKED]

    @property
    def cameras(self) -> list[str]:
        return list(dict.fromkeys(camera for rollout in self.rollouts for camera in rollout.of))

    @property
    def tasks(self) -> dict[tuple[str, int], Rollout]:
        """Suite and index of each task -> one of its rollouts."""
        return {(rollout.suite, rollout.task): rollout for rollout in reversed(self.unblanked)}


def write_reports(folder: Path) -> list[Path]:
    """Write both forms beside a folder's `looks.json`."""
    looks = Looks.load(folder / NAMES[0])
    data = report_data(looks, folder)
    return [write_markdown(data, folder / NAMES[1]), write_html(data, folder / NAMES[2])]


def report_data(looks: Looks, folder: Path) -> ReportData:
    """Everything in the report."""
    rollouts = looks.unblanked
    tasks = sorted(looks.tasks)
    compared = [found for kind in _BLANKED if (found := blanked(looks.rollouts, kind)) is not None]
    both = " and ".join(looks.cameras)
    overall = {kind: against_chance(rollouts, Rollout.counts, kind) for kind in CLASSES}
    sections = [
        Section("In pictures", picture_blocks(looks, folder), note=_picture_note()),
        Section("On what kept tokens lie", _camera_tables(rollouts, looks.cameras), note=_chance_note()),
        Section("Phase by phase", [_phase_bars(rollouts), phase_table(rollouts, both)], note=_phase_note()),
        Section(
            "Does it need them there",
            [blanked_table(looks, compared), Notes([sentence(each) for each in compared])] if compared else [],
            note=_blanked_note() if compared else "",
        ),
        *(_task_section(looks, task) for task in tasks if len(tasks) > 1),
        Section("Made with", _made(looks.made)),
    ]
    successes = sum(rollout.success for rollout in rollouts)
    kept, queries = sum(r.kept for r in rollouts), sum(r.queries for r in rollouts)
    target = overall["target"]
    times = target.ratio if target else None
    return ReportData(
        title="What the pruner looks at",
        summary=[
            f"{looks.made['policy']}, over {counted(len(rollouts), 'rollout')} of {counted(len(tasks), 'task')}: at "
            "every policy query the simulator's segmentation says what each patch shows.",
            *(sentence(each) for each in compared if each.condition in ("target", "background")),
        ],
        alerts=looks.made.get("warnings", []),
        headlines=[
            Headline(f"{successes} of {len(rollouts)}", "solved, nothing blanked"),
            Headline(f"{kept / queries:.1f}", "tokens kept per policy query"),
            *([Headline(f"{times:.2f} times", "as many on the target as by chance")] if times is not None else []),
        ],
        sections=sections,
        footer="Positions are the simulator's own; nothing is estimated from pictures.",
    )


def _camera_tables(rollouts: Sequence[Rollout], cameras: Sequence[str]) -> list[Block]:
    taken = {camera: _of_camera(camera) for camera in cameras}
    tables = [class_table(rollouts, take, camera) for camera, take in taken.items()]
    bars = composition(rollouts, taken, "Kept tokens, and as many by chance")
    return [bars, class_table(rollouts, Rollout.counts, "All cameras"), *tables]


def _of_camera(camera: str) -> Take:
    return lambda rollout: rollout.counts(cameras=[camera])


def composition(rollouts: Sequence[Rollout], taken: Mapping[str, Take], title: str) -> StackedBars:
    """A pair of bars for each way of taking: classes of the kept tokens, and of as many by chance."""
    parts: dict[str, list[float]] = {kind: [] for kind in CLASSES}
    names: list[str] = []
    for name, take in taken.items():
        total = Counts.total(map(take, rollouts))
        if total.kept:
            names += [f"{name}, kept", f"{name}, by chance"]
            for kind in CLASSES:
                parts[kind] += [100 * counts[kind] / total.kept for counts in (total.on, total.chance)]
    return StackedBars(title, names, parts, "% of tokens")


def class_table(rollouts: Sequence[Rollout], take: Take, title: str) -> Table:
    """Every class: share of the kept tokens, chance, and the ratio of both."""
    rows: list[Row] = []
    for kind in CLASSES:
        found = against_chance(rollouts, take, kind)
        if found is None:
            continue
        rows.append((
            Cell(kind, note=WORDS[kind]),
            Cell(_percent(found), sort=found.share),
            f"{100 * found.chance:.1f}",
            Cell(_ratio(found), sort=-1.0 if found.ratio is None else found.ratio),
            f"{100 * found.majority:.1f}",
        ))  # fmt: skip
    columns = ("class", "% of kept tokens (95 %)", "% by chance", "times chance (95 %)", "% by majority")
    return Table(title, columns, rows, sortable=True)


def _percent(found: Against) -> str:
    low_high = found.share_interval
    return f"{100 * found.share:.1f}" + (f" ({span(low_high)})" if low_high else "")


def _ratio(found: Against) -> str:
    if found.ratio is None:
        return "–"
    ends = found.ratio_interval
    return f"{found.ratio:.2f}" + (f" ({ends.low:.2f} to {ends.high:.2f})" if ends else "")


def phase_table(rollouts: Sequence[Rollout], title: str) -> Table:
    """Every class by phase, in all cameras: share of the kept tokens and times chance."""
    queries = [sum(r.counts(phases=[phase]).queries for r in rollouts) // max(1, _number(rollouts)) for phase in PHASES]
    shown = [phase for phase, number in zip(PHASES, queries, strict=True) if number]
    rows: list[Row] = []
    for kind in CLASSES:
        cells: list[str | Cell] = [kind]
        for phase in shown:
            found = against_chance(rollouts, _of_phase(phase), kind)
            text = "–" if found is None else f"{100 * found.share:.1f} % · {_ratio(found)}"
            cells.append(text)
        rows.append(cells)
    per_query = [
        f"{sum(r.counts(phases=[p]).kept for r in rollouts) / number:.1f}"
        for p, number in zip(PHASES, queries, strict=True)
        if number
    ]
    totals: list[Row] = [
        ("tokens kept per query", *per_query),
        ("policy queries", *(str(number) for number in queries if number)),
    ]
    return Table(title, ("class", *shown), rows, totals=totals)


def _phase_bars(rollouts: Sequence[Rollout]) -> StackedBars:
    taken: dict[str, Take] = {phase: _of_phase(phase) for phase in PHASES}
    return composition(rollouts, taken, "Kept tokens by phase, all cameras")


def _of_phase(phase: str) -> Take:
    return lambda rollout: rollout.counts(phases=[phase])


def _number(rollouts: Sequence[Rollout]) -> int:
    """Cameras: each counts every query."""
    return max((len(rollout.of) for rollout in rollouts), default=1)


def _task_section(looks: Looks, task: tuple[str, int]) -> Section:
    own = [rollout for rollout in looks.unblanked if (rollout.suite, rollout.task) == task]
    moved = "; ".join(f"target {target}, goal {goal}" for target, goal in own[0].names)
    solved = sum(rollout.success for rollout in own)
    blocks: list[Block] = [class_table(own, _of_camera(camera), camera) for camera in looks.cameras]
    return Section(
        f"Task {task[1]}: {own[0].instruction}",
        [*blocks, phase_table(own, "Phase by phase, all cameras")],
        note=f"{moved[:1].upper()}{moved[1:]}. {solved} of {len(own)} solved.",
    )


def blanked_table(looks: Looks, compared: Sequence[Blanked]) -> Table:
    """Success with and without what was blanked, on the same starts."""
    rollouts = looks.unblanked
    kept = sum(r.kept for r in rollouts) / sum(r.queries for r in rollouts)
    solved = share_cell(sum(r.success for r in rollouts), len(rollouts))
    rows: list[Row] = [("nothing", f"0 of {kept:.1f}", solved, "", "", "", "")]
    corrected = holm([each.p_value for each in compared])
    for each, p_value in zip(compared, corrected, strict=True):
        counts = each.counts
        rows.append((
            Cell(each.condition, note=_BLANKED[each.condition]),
            f"{each.tokens:.1f} of {each.kept:.1f}",
            share_cell(int(counts.both + counts.only_first), int(counts.trials)),
            Cell(points(each.difference), sort=each.difference),
            span(each.interval, signed=True),
            f"{counts.both}/{counts.only_first}/{counts.only_second}/{counts.neither}",
            p_text(p_value),
        ))  # fmt: skip
    columns = (
        "blanked", "tokens per query", "solved", "points", "95 % interval", "both/blanked only/unblanked only/neither",
        "p (Holm)",
    )  # fmt: skip
    return Table("Success with blanked tokens", columns, rows)


def sentence(each: Blanked) -> str:
    """What a row of the table means."""
    numbers = (
        f"{points(each.difference)} points, 95 % interval {span(each.interval, signed=True)}; {each.tokens:.1f} of "
        f"{each.kept:.1f} kept tokens per query"
    )
    what = f"Kept tokens blanked {_BLANKED[each.condition].partition(',')[0]}"
    if each.condition == "random":
        what = "As many random others blanked as lie on the target"
    if not each.tokens:
        return f"{what}: none was kept there, so nothing can be said."
    if not each.counts.both + each.counts.only_second:
        return f"{what}: the policy solved nothing unblanked, so nothing can be said ({numbers})."
    if each.falls:
        return f"{what}: success falls ({numbers}). The policy uses what these tokens show."
    if each.stays:
        sinks = " If it needs these tokens, then as sinks of attention." if each.condition == "background" else ""
        return f"{what}: success stays ({numbers}). The policy does not need what these tokens show.{sinks}"
    return f"{what}: neither is shown, that success falls or that it stays within {STAYS_POINTS:g} points ({numbers})."


def picture_blocks(looks: Looks, folder: Path) -> list[Block]:
    """The sheet and the video of every task that has one."""
    media, blocks = MediaFiles(folder, MAX_EMBEDDED_BYTES), []
    for (suite, task), one in sorted(looks.tasks.items()):
        stem = picture_stem(suite, task)
        image, video = media.add(folder, f"{stem}.png", "image/png"), media.add(folder, f"{stem}.mp4", "video/mp4")
        title = f"Task {task}: {one.instruction}"
        blocks += _shown(title, image, video)
    return blocks


def _shown(title: str, image: Media | None, video: Media | None) -> list[Block]:
    words = "Both cameras at several moments of one rollout; pruned patches are dark, classes outlined"
    picture = [Picture(title, image, description=words)] if image else []
    return [*picture, *([Clip(f"{title}, as a video", video, own_size=True)] if video else [])]


def picture_stem(suite: str, task: int) -> str:
    """How the pictures of a task are named, without suffix."""
    return f"{suite}_task{task}"


def _picture_note() -> str:
    return (
        "What the policy was shown: kept patches as they are, pruned ones dark. Outlines: what is moved (green), where "
        "it goes (blue), the gripper (orange)."
    )


def _chance_note() -> str:
    return (
        "Of the kept tokens, by the pixels of their patches (every kept token counts once). By chance: what as many "
        "tokens lie on that are drawn from all of the same picture. By majority: each token on the class of most of "
        "its pixels. Intervals are drawn over initial states with all their rollouts (bootstrap)."
    )


def _phase_note() -> str:
    return (
        "Share of the kept tokens, and times chance. "
        "Reach: the target is not held. Grasp: it is held and less than "
        f"{100 * LIFTED_M:g} cm up, or the fingers close within {100 * NEAR_M:g} cm of it. Carry: it is held higher. "
        f"Place: it was lifted, and is within {100 * AT_GOAL_M:g} cm of the goal, horizontally, held or let go at most "
        f"{JUST_RELEASED_STEPS} steps ago."
    )


def _blanked_note() -> str:
    return (
        "The same starts once more: the content of these tokens is replaced by the mean token of their picture before "
        "the language model reads it, at every policy query. Number, positions and weights of tokens stay, and what is "
        f"kept is chosen before. Success stays where the interval's lower end lies above -{STAYS_POINTS:g} points. "
        "p: McNemar's test by initial states."
    )


def _made(made: dict[str, Any]) -> list[Block]:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return [
        CodeBlock("Command", " ".join(made["command"])),
        Notes([
            f"weights {made['weights_fingerprint']}",
            f"commit {made['git_commit']}, {made['started']}, on {made['device']}",
            versions,
        ]),
    ]  # fmt: skip
