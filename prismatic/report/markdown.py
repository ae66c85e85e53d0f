"""The same report as a Markdown file (GitHub's flavour): figures as tables, clips and pictures as links."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from prismatic.atomic_files import write_atomically
from prismatic.report.data import Advice, Block, Cell, Clip, CodeBlock, Notes, Picture, ReportData, Section, Table


def render_markdown(data: ReportData) -> str:
    """The report as text. Whatever would be markup in its strings is escaped."""
    parts = [
        f"# {escape(data.title)}",
        *(f"> **{escape(line)}**" for line in data.alerts),
        *(_advice(line) if isinstance(line, Advice) else _paragraph(line) for line in data.summary),
        "\n".join(f"- **{escape(item.value)}**: {escape(item.label)}" for item in data.headlines),
    ]
    for section in data.filled:
        parts += _section(section)
    parts.append(_paragraph(data.footer))
    return "\n\n".join(part for part in parts if part) + "\n"


def write_markdown(data: ReportData, path: str | Path) -> Path:
    """Write the file to `path`, atomically: readers see the old one or the new one."""
    return write_atomically(path, render_markdown(data))


def escape(text: str) -> str:
    """Text in which Markdown finds no markup; line breaks become spaces."""
    text = re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word `_` means nothing


def _paragraph(text: str) -> str:
    """A paragraph that begins as no heading, list or rule."""
    return re.sub(r"^([#+=-]|\d+(?=[.)]))", _at_start, escape(text))


def _advice(advice: Advice) -> str:
    fence = _fence(advice.command, 1)
    return f"{_paragraph(advice.words)} {fence}{advice.command}{fence}"


def _fence(code: str, least: int) -> str:
    """Backticks, more than stand beside each other in the code."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", code)), default=0))


def _at_start(match: re.Match[str]) -> str:
    return match[0] + "\\" if match[0].isdigit() else "\\" + match[0]


def _section(section: Section) -> Iterator[str]:
    bodies = [
        part for kind, blocks in groupby(section.blocks, key=lambda block: block.kind) for part in _run(kind, blocks)
    ]
    if bodies or section.note:
        yield f"## {escape(section.title)}"
        yield _paragraph(section.note)
        yield from bodies


def _run(kind: str, blocks: Iterator[Block]) -> Iterator[str]:
    """Neighbouring blocks of one kind."""
    if kind == "clip":
        yield _clips([block for block in blocks if isinstance(block, Clip)])
        return
    for block in blocks:
        title = f"### {escape(block.title)}" if block.title else ""
        body = _body(block)
        if body:
            yield from (part for part in (title, *body) if part)


def _body(block: Block) -> list[str]:
    if isinstance(block, Table):
        return [_table(block), _paragraph(block.note)]
    if isinstance(block, Notes):
        return ["\n".join(f"- {_paragraph(item)}" for item in block.items)]
    if isinstance(block, CodeBlock):
        fence = _fence(block.code, 3)
        return [_paragraph(block.note), f"{fence}\n{block.code}\n{fence}"]
    if isinstance(block, Picture):
        address, words = block.image.address, escape(block.description or block.title)
        return [f"![{words}]({address})", _paragraph(block.caption)] if address else []
    if isinstance(block, Clip):
        return [_clips([block])]
    figures = block.table()
    return [_table(figures), _paragraph(figures.note)] if figures else []


def _table(table: Table) -> str:
    align = "---:" if table.numeric else "---"
    rule = "|---" + f"|{align}" * (len(table.columns) - 1) + "|"
    rows = [_row([_cell(cell) for cell in row]) for row in table.cells]
    totals = [_row([f"**{_cell(cell)}**" if cell.text else "" for cell in row]) for row in table.total_cells]
    return "\n".join([_row([escape(column) for column in table.columns]), rule, *rows, *totals])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = f"[{escape(cell.text)}]({cell.address})" if cell.address else escape(cell.text)
    mark = {True: " ✓", False: " ✗", None: ""}[cell.mark]
    return f"{text}{mark}" + (f" ({escape(cell.note)})" if cell.note else "")


def _clips(clips: Sequence[Clip]) -> str:
    rows = []
    for clip in clips:
        links = [_link("video", clip.video.address)] if clip.video.address else []
        if clip.picture is not None and clip.picture.image.address:
            links.append(_link("picture", clip.picture.image.address))
        rows.append(_row([escape(clip.title), escape(clip.caption), " ".join(links)]))
    return "\n".join([_row(["rollout", "what happened", "files"]), "|---|---|---|", *rows])


def _link(words: str, address: str) -> str:
    return f"[{words}]({address})"
