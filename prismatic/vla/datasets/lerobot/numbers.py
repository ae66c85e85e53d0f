"""Numbers out of `meta`, which anybody may have written: each is checked, and named with its file where it is none."""

import math
from typing import Any


def whole_number(value: Any, place: str, least: int = 0) -> int:
    """An integer from `least` on; a float without a fraction is one.

    Args:
        value: as it was read.
        place: the file and the key that it has there, as the error says it.
        least: the smallest that is allowed.

    Raises ValueError for anything else, text and null among it.
    """
    number = _finite(value)
    if number is None or number != int(number) or number < least:
        raise ValueError(f"{place} is {value!r}; expected an integer from {least} on. Download the dataset again")
    return int(number)


def positive_number(value: Any, place: str) -> float:
    """A finite number above 0; arguments and errors as of `whole_number`."""
    number = _finite(value)
    if number is None or number <= 0:
        raise ValueError(f"{place} is {value!r}; expected a finite number above 0. Download the dataset again")
    return float(number)


def seconds(value: Any, place: str) -> float:
    """A finite number; arguments and errors as of `whole_number`."""
    number = _finite(value)
    if number is None:
        raise ValueError(f"{place} is {value!r}; expected seconds. Download the dataset again")
    return float(number)


def _finite(value: Any) -> int | float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None
