"""What is told of a step: named numbers, and lists of them."""

from collections.abc import Mapping, Sequence
from typing import Any

Values = dict[str, Any]


class Named(list[float]):
    """Numbers in an order that is known, with what each is of; in JSON a list like any other."""

    def __init__(self, names: Sequence[str], values: Sequence[float]) -> None:
        super().__init__(values)
        self.names = names


def flat(values: Mapping[str, Any]) -> dict[str, float]:
    """Lists become `name/0`, `name/1`, ... (`Named` ones `name/x`, ...), for sinks that know only numbers."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            labels = value.names if isinstance(value, Named) else range(len(value))
            numbers.update({f"{name}/{label}": item for label, item in zip(labels, value, strict=True)})
        else:
            numbers[name] = value
    return numbers
