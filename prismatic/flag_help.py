"""What `--help` says about a configuration: its fields as flags, with types, comments and defaults."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import shutil
import textwrap
import tokenize
from dataclasses import dataclass
from typing import Any

_KINDS = {"bool": "True|False", "int": "INT", "float": "NUMBER", "str": "TEXT", "Path": "PATH"}
_INDENT = 30
_WIDEST = 100


@dataclass(frozen=True)
class FlagHelp:
    """One flag, as the source writes it down.

    Attributes:
        name: the flag, without its dashes.
        kind: the type's annotation.
        section: the comment that stands alone above a group of fields; empty above the first such.
        comment: the one behind the field.
        default: as text; None for a flag that must be given.
    """

    name: str
    kind: str
    section: str
    comment: str
    default: str | None

    @property
    def text(self) -> str:
        """The comment and, unless it says what is done without the flag, the default."""
        if self.default is None:
            return f"{self.comment} (must be given)"
        if self.default == "None" and ("None:" in self.comment or "default" in self.comment):
            return self.comment
        return f"{self.comment} (default: {self.default})".strip()


def flags_of(config_class: type[Any]) -> list[FlagHelp]:
    """All flags of a dataclass, in order: first those that it has from other dataclasses.

    A comment behind a field is its help; a line of its own names the section that begins there, and is no field's help.
    """
    return [flag for part in reversed(config_class.__mro__) if dataclasses.is_dataclass(part) for flag in _own(part)]


def _own(config_class: type[Any]) -> list[FlagHelp]:
    """The flags that stand in the dataclass itself."""
    source = textwrap.dedent(inspect.getsource(config_class))
    behind, alone = _comments(source)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    found: list[FlagHelp] = []
    section, previous = "", 0
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id in fields:
            assert node.end_lineno is not None
            section = " ".join(alone[line] for line in range(previous, node.lineno) if line in alone) or section
            lines = range(node.lineno, node.end_lineno + 1)
            comment = " ".join(behind[line] for line in lines if line in behind)
            default = _default(fields[node.target.id])
            found.append(FlagHelp(node.target.id, ast.unparse(node.annotation), section, comment, default))
        previous = node.end_lineno or previous  # type: ignore[attr-defined]
    return found


def help_text(config_class: type[Any], program: str) -> str:
    """The whole help of a command whose flags are this dataclass."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = [f"usage: {program} [--FLAG VALUE]...", "", *textwrap.wrap(inspect.getdoc(config_class) or "", width)]
    section: str | None = None
    for flag in flags_of(config_class):
        if flag.section != section:
            section = flag.section
            lines += ["", f"{section or 'Flags'}:"]
        lines += _drawn(f"--{flag.name} {_value_word(flag.kind)}", flag.text, width)
    lines += ["", "Other:"]
    lines += _drawn("--config_path PATH", "a YAML file with values of these flags (default: none)", width)
    lines += _drawn("--help", "this text", width)
    return "\n".join(lines) + "\n"


def _drawn(flag: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, max(width - _INDENT, 20)) or [""]
    if len(flag) + 4 > _INDENT:
        return [f"  {flag}", *(f"{'':{_INDENT}}{line}" for line in wrapped)]
    first, *others = wrapped
    return [f"  {flag:<{_INDENT - 2}}{first}", *(f"{'':{_INDENT}}{line}" for line in others)]


def _value_word(kind: str) -> str:
    return _KINDS.get(kind.removesuffix(" | None"), "VALUE")


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return None
    return "none" if field.default == "" else str(field.default)


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by their line: behind code, and alone."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            place = alone if token.line[: token.start[1]].isspace() or token.start[1] == 0 else behind
            place[token.start[0]] = token.string.lstrip("# ")
    return behind, alone
