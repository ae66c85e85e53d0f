"""What a policy is asked: observations, their instructions and seeds, and what it must do without."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Observation = Mapping[str, Any]


@dataclass(frozen=True)
class Blanking:
    """Which kept visual tokens lose their content before the language model reads them. Their positions stay.

    Attributes:
        tokens: (V,) bool; those that are also kept lose their content.
        others_seed: where given, as many other kept tokens lose theirs instead, drawn by this seed: a control.
    """

    tokens: np.ndarray
    others_seed: int | None = None


def read_request(
    observations: Iterable[Observation],
    instructions: Iterable[str | bytes],
    sessions: Sequence[object] | None,
    seeds: Iterable[int] | None,
) -> tuple[list[Observation], list[str | bytes], list[int] | None]:
    """The lists of a call, from whatever can be gone through. Raises ValueError for what does not fit together."""
    if isinstance(observations, Mapping) or isinstance(instructions, str | bytes):
        raise ValueError("act_batch takes a list of observations and one of instructions; `act` takes one of each")
    given, sentences = _as_list(observations, "observations"), _as_list(instructions, "instructions")
    if len(given) != len(sentences) or not given:
        raise ValueError(f"{len(given)} observations came with {len(sentences)} instructions; give one each")
    _check_sessions(sessions, len(given))
    if seeds is None:
        return given, sentences, None
    numbers = _as_list(seeds, "seeds")
    if len(numbers) != len(given):
        raise ValueError(f"{len(given)} observations came with {len(numbers)} seeds; give one each")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not -(2**63) <= number < 2**64:
            raise ValueError(f"seed {number!r}: expected a whole number of 64 bits for each observation")
    return given, sentences, [int(number) for number in numbers]


def _check_sessions(sessions: Sequence[object] | None, number: int) -> None:
    if sessions is not None and not (isinstance(sessions, Sequence) and all(map(_is_session, sessions))):
        raise ValueError(f"sessions {sessions!r}: expected a list with a session of policy.new_session() or None each")
    if sessions is not None and len(sessions) != number:
        raise ValueError(f"{number} observations came with {len(sessions)} sessions; give one each, None for none")
    theirs = [id(session) for session in sessions or () if session is not None]
    if len(set(theirs)) < len(theirs):
        raise ValueError(
            "one session stands twice in a batch, but its queries follow each other; give each episode its own"
        )


def _as_list(values: Iterable[Any], name: str) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ValueError(f"{name} is {values!r}, a {type(values).__name__}; act_batch takes a list of them") from None


def _is_session(value: object) -> bool:
    return value is None or hasattr(value, "begin_query")
