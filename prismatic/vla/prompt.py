"""The only instruction template, and the token ids that surround it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenIds:
    """Token ids that the action sequence needs; the defaults are Llama-2's as published checkpoints use them.

    Attributes:
        bos: starts the sequence.
        empty: the empty piece that the tokenizer puts between `Out:` and the first action token.
        action_end: one past the highest action token; bin 1 of the action tokenizer is `action_end - 1`.
        stop: ends the sequence.
        pad: fills short rows of a batch.
    """

    bos: int = 1
    empty: int = 29871
    action_end: int = 32000
    stop: int = 2
    pad: int = 32000

    def to_json(self) -> dict[str, int]:
        """Plain dictionary for `config.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any] | None) -> "TokenIds":
        """Inverse of `to_json`; None gives Llama-2's ids."""
        return cls(**(data or {}))


_EXPECTED = "expected a sentence that says what the robot should do, e.g. 'put the bowl on the plate'"


def as_instruction(instruction: Any) -> str:
    """The sentence as text: text as it is; bytes, as tensorflow-datasets stores sentences, decoded as UTF-8.

    Blanks at its ends, and zero bytes, with which some writers pad text, are no part of it, as in training data.

    NumPy's `str_`, `bytes_` and arrays without axes count as what they hold. Raises ValueError for anything else, for
    what is no UTF-8 (bytes, and text with a lone half of a surrogate pair) and for an empty sentence.
    """
    value = instruction.item() if isinstance(instruction, np.ndarray) and instruction.ndim == 0 else instruction
    if isinstance(value, bytes | bytearray):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the instruction {bytes(value)!r} is not UTF-8 ({error}); {_EXPECTED}") from None
    if not isinstance(value, str):
        raise ValueError(f"the instruction is {value!r}, a {type(value).__name__}; {_EXPECTED}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the instruction {value!r} is no Unicode text ({error}); {_EXPECTED}") from None
    value = value.strip("\0").strip()
    if not value:
        raise ValueError(f"the instruction is empty; {_EXPECTED}")
    return str(value)


def format_prompt(instruction: str | bytes) -> str:
    """The instruction in the words that every OpenVLA-style policy was trained with.

    Raises ValueError as `as_instruction` does.
    """
    return f"In: What action should the robot take to {as_instruction(instruction).lower()}?\nOut:"


def prompt_ids(tokenize: Callable[[str], Sequence[int]], instruction: str | bytes, ids: TokenIds) -> list[int]:
    """BOS, the prompt and the empty piece: all that stands before the action tokens.

    Args:
        tokenize: text -> token ids, with or without BOS.
        instruction: what the robot should do.
        ids: the tokenizer's special ids.
    """
    prompt = list(tokenize(format_prompt(instruction)))
    if not prompt or prompt[0] != ids.bos:
        prompt.insert(0, ids.bos)
    return with_empty_piece(prompt, ids)


def with_empty_piece(input_ids: Sequence[int], ids: TokenIds) -> list[int]:
    """`input_ids` ending in the empty piece, appended where it is missing."""
    return list(input_ids) if input_ids[-1] == ids.empty else [*input_ids, ids.empty]
