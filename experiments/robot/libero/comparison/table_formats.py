"""A table as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prismatic.report.markdown import escape

INTERVALS = "Intervals are Wilson's, 95 %."


WARNING = "Mind:"
"""How the notes about doubtful comparisons begin."""


@dataclass(frozen=True)
class Table:
    """A table, as it is read and as it is computed with.

    Args:
        headings: Of the columns; the first one holds names, the others numbers.
        rows: Cells as text.
        records: The same rows for CSV: plain numbers, one per column, rates in [0, 1].
        notes: Sentences below it.
        intervals: Which of the notes says what the intervals are; a caption has it.
        totals: How many of the last rows sum up the others.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    records: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = ()
    intervals: str = ""
    totals: int = 0


def to_markdown(table: Table) -> str:
    """A GitHub table with its title above and its notes below."""
    lines = [list(map(escape, row)) for row in (table.headings, *table.rows)]
    first_total = len(lines) - table.totals
    for line in lines[first_total:]:
        line[:] = [f"**{cell}**" if cell else "" for cell in line]
    ruler = ["---", *["---:"] * (len(table.headings) - 1)]
    body = [f"| {' | '.join(line)} |" for line in (lines[0], ruler, *lines[1:])]
    return "\n".join([f"**{escape(table.title)}**", "", *body, *_paragraphs(table.notes)]) + "\n"


def to_csv(table: Table) -> str:
    """Plain numbers with a line of names above; what a row does not have stays empty."""
    names = list(dict.fromkeys(key for record in table.records for key in record))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return stream.getvalue()


def to_latex(table: Table) -> str:
    """A floating table with booktabs' rules (`\\usepackage{booktabs}`). Its caption: title, and what the intervals are.

    The other notes are set small below it, one to a line, so that a document can do without some.
    """
    lines = [" & ".join(map(latex_escaped, row)) + r" \\" for row in (table.headings, *table.rows)]
    first_total = len(lines) - table.totals
    totals = [r"\midrule", *lines[first_total:]] if table.totals else []
    caption = f"{table.title}. {table.intervals}".rstrip()
    below = [latex_escaped(note) + r"\par" for note in table.notes if note != table.intervals]
    box = ["", r"\medskip", r"\begin{minipage}{\linewidth}\footnotesize", *below, r"\end{minipage}"] if below else []
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escaped(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.headings) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:first_total],
            *totals,
            r"\bottomrule",
            r"\end{tabular}",
            *box,
            r"\end{table}",
            "",
        ]
    )


def latex_escaped(text: str) -> str:
    """Text that LaTeX sets as it stands."""
    escaped = "".join(_LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    # Behind the end of a row these two would be taken for its options.
    "[": "{[}",
    "*": "{*}",
}


def _paragraphs(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in ("", escape(note))]


def warned(caveat: str) -> str:
    return f"{WARNING} {caveat}."
