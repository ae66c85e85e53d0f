"""`looks.md` and `looks.html`, made of `looks.json` and the pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.robot.libero.looks.classes import CLASSES
from experiments.robot.libero.looks.config import UNBLANKED
from experiments.robot.libero.looks.counts import Rollout
from experiments.robot.libero.looks.figures import STAYS_POINTS, against_chance, all_blanked
from experiments.robot.libero.looks.phases import AT_GOAL_M, JUST_RELEASED_STEPS, LIFTED_M, NEAR_M, PHASES
from experiments.robot.libero.looks.shares import ALL_BACKGROUND, LIES_ON
from experiments.robot.libero.looks.tables import (
    blanked_table,
    class_table,
    composition,
    far_table,
    of_camera,
    phase_bars,
    phase_table,
    put_table,
    sentence,
)
from prismatic.atomic_files import write_atomically
from prismatic.report.data import (
    Block,
    Clip,
    CodeBlock,
    Headline,
    Media,
    Notes,
    Picture,
    ReportData,
    Section,
    counted,
)
from prismatic.report.html import write_report as write_html
from prismatic.report.markdown import write_markdown
from prismatic.report.media import MediaFiles

FORMAT_VERSION = 1
NAMES = ("looks.json", "looks.md", "looks.html")
MAX_EMBEDDED_BYTES = 12 << 20


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
    compared = all_blanked(looks.rollouts)
    both = " and ".join(looks.cameras)
    came = [table for table in (far_table(rollouts), put_table(rollouts)) if table is not None]
    overall = {kind: against_chance(rollouts, Rollout.counts, kind) for kind in CLASSES}
    sections = [
        Section("In pictures", picture_blocks(looks, folder), note=_picture_note()),
        Section(
            "On what kept tokens lie",
            _camera_tables(rollouts, looks.cameras),
            note=f"{_chance_note()} {_things(rollouts) if len(tasks) == 1 else ''}".strip(),
        ),
        Section("Phase by phase", [phase_bars(rollouts), phase_table(rollouts, both)], note=_phase_note()),
        Section("How far it came", came, note=_CAME_NOTE if came else ""),
        Section(
            "Does it need them there",
            [blanked_table(rollouts, compared), Notes([*map(sentence, compared), *_narrow(looks)])] if compared else [],
            note=_blanked_note([each.condition for each in compared]) if compared else "",
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
            *(sentence(each) for each in compared if each.condition in ("target", "background", "hidden")),
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
    taken = {camera: of_camera(camera) for camera in cameras}
    tables = [class_table(rollouts, take, camera) for camera, take in taken.items()]
    bars = composition(rollouts, taken, "Kept tokens, and as many by chance")
    return [bars, class_table(rollouts, Rollout.counts, "All cameras"), *tables]


def _things(own: Sequence[Rollout]) -> str:
    """Which bodies of a task are target and goal."""
    words = "; ".join(f"target {target}, goal {goal}" for target, goal in own[0].names)
    return f"{words[:1].upper()}{words[1:]}."


def _task_section(looks: Looks, task: tuple[str, int]) -> Section:
    own = [rollout for rollout in looks.unblanked if (rollout.suite, rollout.task) == task]
    solved = sum(rollout.success for rollout in own)
    blocks: list[Block] = [class_table(own, of_camera(camera), camera) for camera in looks.cameras]
    return Section(
        f"Task {task[1]}: {own[0].instruction}",
        [*blocks, phase_table(own, "Phase by phase, all cameras")],
        note=f"{_things(own)} {solved} of {len(own)} solved.",
    )


def _narrow(looks: Looks) -> list[str]:
    """What to know of starts at which objects hardly differ in place."""
    if float(looks.made["flags"].get("wide_starts_m") or 0):
        return []
    return [
        "In LIBERO's own initial states objects are moved by one to four centimetres, so little that a policy can "
        "succeed without looking; --wide_starts_m asks more of it."
    ]


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


_CAME_NOTE = "Distances are to the middle of the goal, horizontally: x away from the robot, y to its left."


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


def _blanked_note(conditions: Collection[str]) -> str:
    judged = (
        f"Success stays where the interval's lower end lies above -{STAYS_POINTS:g} points. It falls by p: McNemar's "
        "test by initial states, corrected by Holm over the questions. The interval is Tango's for as many pairs as "
        "the rollouts are worth, since those from one initial state resemble each other."
    )
    if set(conditions) == {"hidden"}:
        return f"The same starts once more, with the target left out of the pictures. {judged}"
    return (
        "The same starts once more: the content of these tokens is replaced by the mean token of their picture before "
        "the language model reads it, at every policy query. Number, positions and weights of tokens stay, and what is "
        f"kept is chosen before. {judged} Two things are left to the policy: where tokens are kept or blank says where "
        "something is, and in the vision backbone other tokens have seen it. Hidden leaves neither."
    )


def _made(made: dict[str, Any]) -> list[Block]:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    # Of files of before the conditions were told apart: when and by which code the report was written.
    runs, device = made.get("conditions", {"report": made}), made["device"]
    return [
        CodeBlock("Command", " ".join(made["command"])),
        Notes([
            f"weights {made['weights_fingerprint']}",
            *(f"{name}: commit {run['git_commit']}, {run['started']}, on {device}" for name, run in runs.items()),
            versions,
        ]),
    ]  # fmt: skip
