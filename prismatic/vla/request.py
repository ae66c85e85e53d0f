"""What a policy is asked: observations, their instructions and seeds."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Observation = Mapping[str, Any]


def read_request(
    observations: Iterable[Observation],
    instructions: Iterable[str | bytes],
    sessions: Sequence[object] | None,
    seeds: Iterable[int] | None,
) -> tuple[list[Observation], list[str | bytes], list[int] | None]:
    """The lists of a call, from whatever can be gone through. Raises ValueError for what does not fit together."""
    if sessions is not None and any(session is not None for session in sessions):
        raise ValueError("sessions were given, but no pruner of this version keeps a memory; leave them out")
    if isinstance(observations, Mapping) or isinstance(instructions, str | bytes):
        raise ValueError("act_batch takes a list of observations and one of instructions; `act` takes one of each")
    given, sentences = _as_list(observations, "observations"), _as_list(instructions, "instructions")
    if len(given) != len(sentences) or not given:
        raise ValueError(f"{len(given)} observations came with {len(sentences)} instructions; give one each")
    if seeds is None:
        return given, sentences, None
    numbers = _as_list(seeds, "seeds")
    if len(numbers) != len(given):
        raise ValueError(f"{len(given)} observations came with {len(numbers)} seeds; give one each")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not -(2**63) <= number < 2**64:
            raise ValueError(f"seed {number!r}: expected a whole number of 64 bits for each observation")
    return given, sentences, [int(number) for number in numbers]


def _as_list(values: Iterable[Any], name: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}, a {type(values).__name__}; act_batch takes a list of them") from None
