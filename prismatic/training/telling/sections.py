"""The sections of a run's report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from prismatic.report.data import Advice, Block, Cell, Clip, Notes, Picture, Row, Section, Table, counted, share_cell
from prismatic.report.figures import Curve
from prismatic.report.media import MediaFiles, relative_address
from prismatic.training.config import FinetuneConfig
from prismatic.training.runs.files import PICTURES
from prismatic.training.telling.folder import RunRecord, moment, seconds_of

_LINES_OF_A_CHART = 8
"""There are as many colours."""
_CLIPS = 6
_EVENTS = 30


def learning(run: RunRecord) -> Section:
    """Loss, tokens kept, rate, noise, gradient."""
    both = [*run.history.lines.records, *run.history.validations.records]
    kept = {"mean": "tokens_kept", "fewest of a sample": "tokens_kept_min", "most of a sample": "tokens_kept_max"}
    cameras = len(run.history.last.get("tokens_kept_per_image", ()))
    prunes = run.flags.get("pruner") != "none"
    tokens = [
        Curve("Visual tokens kept", {**kept, "held out": "val_tokens_kept"}, both, "tokens"),
        Curve(
            "Visual tokens kept per camera",
            {f"camera {number + 1}": f"tokens_kept_per_image/{number}" for number in range(cameras)},
            [_listed(line, "tokens_kept_per_image") for line in both], "tokens",
        ),
    ]  # fmt: skip
    curves = [
        Curve("Loss", {"training": "loss", "held out": "val_loss"}, both, "loss"),
        Curve(
            "L1 of normalised actions",
            {
                "first action": "l1_current", "the others": "l1_next",
                "first, held out": "val_l1_current", "others, held out": "val_l1_next",
                "sampled": "sampled_l1",
            },
            both, "L1",
        ),
        *(tokens if prunes else ()),
        Curve("Norm of the gradient", {"norm": "grad_norm"}, both, "norm", log_scale=True),
        _schedules(run, prunes),
    ]  # fmt: skip
    note = "Tokens kept in training are those of its batches, with the noise of the step; held out, without noise."
    blocks = _drawn(curves)
    return Section("Learning", blocks, note if blocks and prunes else "", columns=2)


def _schedules(run: RunRecord, noise: bool) -> Curve:
    """Learning rate and, where there is any, noise, each as a share."""
    records = run.history.lines.records
    highest = max((line["learning_rate"] for line in records if "learning_rate" in line), default=0.0) or 1.0
    lines = [{**line, "rate": line["learning_rate"] / highest} if "learning_rate" in line else line for line in records]
    keys = {f"learning rate (1 is {highest:.3g})": "rate"}
    if not noise:
        return Curve(f"Learning rate (1 is {highest:.3g})", keys, lines, "share of the highest")
    keys["noise on the pruner's scores"] = "noise_scale"
    return Curve("Learning rate and noise", keys, lines, "share of the highest")


def by_dimension(run: RunRecord) -> Section:
    """L1 on held-out frames of each action dimension: now, and over the steps."""
    last, names = run.history.last, run.action_names
    if not names:
        return Section("Validation by action dimension", [])
    whole, first = last["val_l1_dimensions"], last.get("val_l1_current_dimensions", [])
    if len(first) != len(whole):
        first = [None] * len(whole)
    top = max(*whole, 1e-12)
    rows: list[Row] = [
        (name, Cell(f"{value:.4f}", sort=value, interval=(0.0, value / top, value / top)), _number(begin, 4))
        for name, value, begin in zip(names, whole, first, strict=True)
    ]
    table = Table(
        f"L1 on held-out frames at step {run.history.validations.records[-1]['step']}",
        ("action dimension", "whole chunk", "its first action"), rows, sortable=True,
        note="Of normalised actions: 1 is half the range of the data. Pictures are prepared as inference does.",
    )  # fmt: skip
    lines = [_listed(line, "val_l1_dimensions") for line in run.history.validations.records]
    keys = {name: f"val_l1_dimensions/{number}" for number, name in enumerate(names)}
    groups = [dict(list(keys.items())[at : at + _LINES_OF_A_CHART]) for at in range(0, len(keys), _LINES_OF_A_CHART)]
    titles = ["L1 of each dimension"] if len(groups) == 1 else [f"L1, {next(iter(group))} and on" for group in groups]
    curves = [Curve(title, group, lines, "L1") for title, group in zip(titles, groups, strict=True)]
    return Section("Validation by action dimension", [table, *_drawn(curves)], columns=2)


def pictures(run: RunRecord, files: MediaFiles) -> Section:
    """What the pruner keeps on frames that stay the same."""
    folder, listed, blocks = run.path / PICTURES, run.pictures(), []
    if strip := files.add(folder, "strip.webp", "image/webp"):
        words = "Pruned patches are dimmed. A number is of the tokens of this frame, without noise."
        blocks.append(Picture("One frame as training goes on", strip, words, own_size=True))
    if listed and (newest := files.add(folder, str(listed[-1]["file"]), "image/webp")):
        words = _kept_text(listed[-1].get("tokens_kept"))
        blocks.append(Picture(f"Step {listed[-1]['step']}", newest, words, own_size=True))
    film: list[Block] = []
    if video := files.add(folder, "kept.mp4", "video/mp4"):
        words = f"{counted(len(listed), 'picture')}, from the first step on."
        film.append(Clip("As a film", video, words, own_size=True))
    return Section("What the pruner keeps", [*blocks, *film])


def _kept_text(tokens_kept: Any) -> str:
    """Of the frames of a picture, each a number per image."""
    try:
        frames = [sum(images) for images in tokens_kept]
        mean = f"{sum(frames) / len(frames):.1f} tokens kept" if frames else ""
        return mean and f"{mean}: the mean of {counted(len(frames), 'frame')} that stay the same, without noise."
    except TypeError:
        return ""


def rollouts(run: RunRecord, files: MediaFiles) -> Section:
    """How the policy did in the simulator on the way."""
    listed = run.rollouts()
    if not listed:
        return Section("Rollouts", [])
    by_step: dict[int, list[dict[str, Any]]] = {}
    for item in listed:
        by_step.setdefault(item["step"], []).append(item)
    shares = {step: [bool(item.get("success")) for item in items] for step, items in by_step.items()}
    rows: list[Row] = []
    for step, items in sorted(by_step.items(), reverse=True):
        took = [item["steps"] for item in items if item.get("success") and isinstance(item.get("steps"), int)]
        mean = f"{sum(took) / len(took):.0f}" if took else "–"
        rows.append((Cell(str(step), sort=step), share_cell(sum(shares[step]), len(items)), mean))
    lines = [{"step": step, "rate": 100 * sum(found) / len(found)} for step, found in shares.items()]
    table = Table(
        "Success by step", ("step", "solved", "steps to a success"), rows, sortable=True, folded=len(rows) > 12
    )
    blocks: list[Block] = [*_drawn([Curve("Success rate", {"solved": "rate"}, lines, "% of rollouts")]), table]
    for item in list(reversed(listed))[:_CLIPS]:
        if item.get("video") and (video := files.add(run.path, str(item["video"]), "video/mp4")):
            outcome = "solved" if item.get("success") else "not solved"
            told = f"step {item['step']}, initial state {item.get('initial_state', '–')}: {outcome}."
            blocks.append(Clip(str(item.get("instruction") or f"task {item.get('task', '–')}"), video, told))
    return Section("Rollouts", blocks, "Short rollouts of the policy as it was at that step.", columns=2)


def checkpoints(run: RunRecord, page: MediaFiles) -> Section:
    """What can be loaded, and which has the lowest validation loss."""
    found = run.checkpoints()
    losses = [item.validation_loss for item in found if item.validation_loss is not None]
    rows: list[Row] = [
        (
            Cell(str(item.step), sort=item.step),
            Cell(_number(item.validation_loss, 4), sort=item.validation_loss,
                 mark=True if losses and item.validation_loss == min(losses) else None),
            "–" if item.size is None else f"{item.size / 1e6:.1f} MB",
            ", ".join(item.pointers),
            Cell(item.path.name, address=relative_address(item.path, page.folder)),
        )
        for item in reversed(found)
    ]  # fmt: skip
    note = "The tick is at the lowest validation loss. " if losses else ""
    note += "checkpoints/latest is what the run's folder stands for."
    columns = ("step", "validation loss", "size", "pointer", "folder")
    table = Table("", columns, rows, note, sortable=len(rows) > 1, folded=len(rows) > 12, numeric=False)
    return Section("Checkpoints", [table] if found else [])


def speed(run: RunRecord) -> Section:
    """Time of a step, how much of it is waiting for data, samples, memory."""
    lines = [_with_wait_share(line) for line in run.history.lines.records]
    curves = [
        Curve("Time of a step", {"all": "step_time_s", "waiting for data": "data_wait_s"}, lines, "seconds"),
        Curve("Waiting for data", {"share": "data_wait_share"}, lines, "% of the time"),
        Curve("Speed", {"samples": "samples_per_s"}, lines, "samples per second"),
        Curve("Most memory held", {"host": "host_peak_gb", "device": "device_peak_gb"}, lines, "GB"),
    ]
    note = "Validating and saving are not counted as steps. Memory is that of the process which has held most."
    return Section("Speed and memory", blocks := _drawn(curves), note if blocks else "", columns=2)


def health(run: RunRecord) -> Section:
    """What went wrong and was lived with."""
    history = run.history
    if not history.lines.records:
        return Section("Health", [])
    if not history.num_events:
        return Section("Health", [Notes(["No loss spike, no step left out, no picture that cannot be decoded."])])
    counts = Table("How often", ("what", "times"), [(what, str(count)) for what, count in history.num_events.items()])
    newest = list(history.events)[: -_EVENTS - 1 : -1]
    events = Table(
        f"The last {len(newest)}" if sum(history.num_events.values()) > len(newest) else "When",
        ("step", "what"), [(str(event.step), event.what) for event in newest],
        numeric=False, folded=len(newest) > 10,
    )  # fmt: skip
    return Section("Health", [counts, events], "A step is that of the line of metrics; the log says more.", columns=2)


def what_it_is(run: RunRecord) -> Section:
    """Base, data, flags, starts, versions."""
    facts, flags = run.content["facts"], run.flags
    rows: list[Row] = [
        ("base model", _words(facts.get("base"))),
        ("its weights", _words(facts.get("base_fingerprint"))),
    ]
    rows += [(f"data: {name}", _words(value)) for name, value in facts.get("data", {}).items()]
    rows += [("samples of a step", _words(facts.get("samples_per_step")))]
    rows += [(name, _words(value)) for name, value in facts.get("computing", {}).items()]
    defaults = {item.name: item.default for item in fields(FinetuneConfig)}
    given = [name for name, value in flags.items() if not _is_default(value, defaults.get(name))]
    blocks: list[Block] = [Table("Base and data", ("fact", "value"), rows, numeric=False)] if facts else []
    for title, names, folded in (
        ("Flags that were given", given, False),
        ("Flags at their defaults", [name for name in flags if name not in given], True),
    ):
        shown: list[Row] = [(f"--{name}", _words(flags[name])) for name in names]
        if shown:
            blocks.append(Table(title, ("flag", "value"), shown, numeric=False, folded=folded))
    return Section("The run", [*blocks, *_starts(run)])


def _starts(run: RunRecord) -> list[Table]:
    starts: list[Row] = []
    for start in run.starts:
        ended = start["ended"]
        outcome = f"{ended['how']} at step {ended['step']}, {moment(seconds_of(ended['time']))}" if ended else "–"
        place = f"{start.get('processes', '?')} x {start.get('device', '?')}"
        changes = "; ".join(f"--{c['flag']} {c['now']} (was {c['was']})" for c in start["changes"])
        starts.append((moment(seconds_of(start.get("time"))), str(start["step"]), place, outcome, changes or "none"))
    columns = ("started", "from step", "processes", "ended", "flags changed")
    tables = [Table("Starts", columns, starts, numeric=False)] if starts else []
    versions = run.starts[-1]["versions"] if run.starts else {}
    if versions:
        tables.append(Table("Versions", ("part", "version"), [*versions.items()], numeric=False, folded=True))
    return tables


def _drawn(curves: Sequence[Curve]) -> list[Block]:
    """Those that have something to draw."""
    return [curve for curve in curves if curve.series]


def _listed(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The step and the list of that name, number by number."""
    return {"step": line["step"], **{f"{name}/{place}": value for place, value in enumerate(line.get(name, ()))}}


def _with_wait_share(line: Mapping[str, Any]) -> dict[str, Any]:
    wait, time = line.get("data_wait_s"), line.get("step_time_s")
    return {**line, "data_wait_share": 100 * wait / time} if wait is not None and time else dict(line)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "–"


def _words(value: Any) -> str:
    return "–" if value is None else str(value)


def _is_default(value: Any, default: Any) -> bool:
    return bool(value == default or value == str(default))


def media_note(run: RunRecord, files: MediaFiles) -> list[Advice]:
    """Where pictures and videos are, where some are beside the page, and how to have one page with all of them."""
    if not files.linked:
        return []
    command = f"lightvla report {shlex.quote(str(run.path.resolve()))} --output_dir one_page"
    if files.max_bytes:  # the limit was not enough
        command += f" --max_embedded_mb {-(-(files.used_bytes + files.linked_bytes) // 10**6)}"
    return [Advice("Pictures and videos are files beside this page. One page that holds them:", command)]
