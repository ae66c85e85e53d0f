"""The commands that the documents tell a person to type."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / name for name in ("README.md", "SETUP.md", "LIBERO.md")] + [*(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Typed:
    """A command of a document.

    Attributes:
        document: relative to the root.
        line: where it begins there, from 1.
        words: as a shell splits them, comments left out and `...` too.
    """

    document: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}:{self.line} {' '.join(self.words)[:60]}"


def commands() -> Iterator[Typed]:
    """Every command in a fenced block of bash, and behind every `$` in blocks without a language, in all documents."""
    for path in DOCUMENTS:
        text = path.read_text()
        for match in _FENCE.finditer(text):
            first = text[: match.start(3)].count("\n") + 1
            yield from _commands_of(str(path.relative_to(ROOT)), first, match[2], match[3])


def _commands_of(document: str, first: int, language: str, block: str) -> Iterator[Typed]:
    if language not in ("", "bash", "sh", "console"):
        return
    pending, begun = "", 0
    for number, line in enumerate(block.split("\n")):
        if not pending:
            if language in ("", "console"):
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            begun = first + number
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        for part in re.split(r" && |; then ", pending):
            words = [word for word in shlex.split(part, comments=True) if word != "..."]
            if words:
                yield Typed(document, begun, tuple(words))
        pending = ""
