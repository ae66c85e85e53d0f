"""Whether what was read from a file has the types of a dataclass's fields."""

from __future__ import annotations

import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

_HASH = re.compile(r"[0-9a-f]{64}")
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}
_SHOWN = 40  # Characters of a value in a message.


def check_types(kind: type, content: Mapping[str, Any], where: str, optional: bool = False) -> None:
    """Compare values with the annotations of a dataclass; names that it does not have are passed over.

    A field whose name ends in `_sha256` is 64 hexadecimal digits, and every number is finite.

    Args:
        where: the file and the part of it, for the message.
        optional: null passes everywhere, as for flags that were left out.

    Raises:
        ValueError: naming file, field, value and what was expected.
    """
    hints = _hints(kind)
    for name, value in content.items():
        if name not in hints or (optional and value is None):
            continue
        if not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} is {shown(value)}, expected {_words(hints[name])}")
        if name.endswith("_sha256") and value is not None and not _HASH.fullmatch(value):
            raise ValueError(f"{where}: {name} is {shown(value)}, expected 64 hexadecimal digits")


def shown(value: Any) -> str:
    """A value as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_LARGEST = 2**63
"""No count or seed here is larger."""


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    if hint in (int, float):
        numbers = int if hint is int else int | float
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        return is_number and (abs(value) < _LARGEST if isinstance(value, int) else math.isfinite(value))
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, parts))
    if origin is list and parts[0] is not Any:
        return f"a list, each {_words(parts[0])}"
    if origin is dict and parts[1] is not Any:
        return f"an object, each value {_words(parts[1])}"
    return _WORDS.get(origin or hint, getattr(hint, "__name__", str(hint)))
