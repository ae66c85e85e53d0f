"""Compare composed token ids with those of the real Llama-2 tokenizer, for prompts and whole training sequences.

    python scripts/dev/check_llama_tokenization.py PATH/TO/tokenizer.model
    python scripts/dev/check_llama_tokenization.py PATH/TO/openvla-7b/tokenizer.json

Takes the SentencePiece model of Llama 2 (its vocabulary is not part of this repository) or the `tokenizer.json` of a
published checkpoint. The recorded ids lie in `tests/data/llama_tokenization.json`. SentencePiece need not be installed,
without which transformers 5 cannot read its models: the vocabulary is read here. Ends with 0 when all ids are equal, 1
when some differ, 2 when the file cannot be read.
"""

import argparse
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers

from prismatic.command_status import UNUSABLE, UNWANTED, print_error
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.prompt import TokenIds, prompt_ids

CASES = Path(__file__).parents[2] / "tests" / "data" / "llama_tokenization.json"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
_PIECES, _TEXT, _SCORE = 1, 1, 2  # fields of SentencePiece's ModelProto and of its pieces
_SPACE = "\u2581"


def read_tokenizer(file: Path) -> Callable[[str], list[int]]:
    """Text -> ids without BOS. Raises ValueError or OSError for a file that is neither kind of tokenizer."""
    if file.suffix == ".json":
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{file} is no tokenizer.json: {error}") from error
    else:
        tokenizer = from_sentencepiece(file.read_bytes())
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def from_sentencepiece(model: bytes) -> Tokenizer:
    """Llama 2's byte-pair tokenizer from its SentencePiece model.

    SentencePiece joins the two neighbours whose joined piece scores highest, so a piece's score ranks every pair of
    pieces that makes it. Raises ValueError for a file that is no such model.
    """
    try:
        pieces = list(_pieces(model))
    except (IndexError, struct.error, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"not a SentencePiece model ({type(error).__name__})") from error
    if len(pieces) < 259 or pieces[0][0] != "<unk>":
        raise ValueError(f"not Llama's SentencePiece model: {len(pieces)} pieces")
    vocabulary = {text: number for number, (text, _) in enumerate(pieces)}
    pairs = []
    for text, score in pieces[259:]:  # behind the special tokens and the 256 bytes
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    return tokenizer


def _pieces(model: bytes) -> Iterator[tuple[str, float]]:
    for number, value in _fields(model):
        if number == _PIECES:
            piece = dict(_fields(value))
            yield piece[_TEXT].decode(), struct.unpack("<f", piece[_SCORE])[0]


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every field of a message that is not a varint."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}[kind]
        if at + length > len(data):
            raise IndexError
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def compare(case: dict[str, Any], tokenize: Callable[[str], list[int]]) -> dict[str, bool]:
    """Whether the composed ids of one recorded case equal the recorded ones."""
    ids = TokenIds()
    prompt = prompt_ids(tokenize, case["instruction"], ids)
    actions = ActionTokenizer(ids.action_end).encode(np.array(case["actions"])).reshape(-1).tolist()
    return {
        "prompt": [ids.bos, *tokenize(case["prompt"])] == case["prompt_ids"],
        "actions": actions == case["action_bins_ids"],
        "training sequence": [*prompt, *actions, ids.stop] == case["train_ids"],
    }


def main(file: Path) -> int:
    """Prints a line per case; returns the exit status."""
    console = Console()
    try:
        tokenize = read_tokenizer(file)
    except (ValueError, OSError) as error:
        print_error(error)
        return UNUSABLE
    cases = json.loads(CASES.read_text())
    found = [compare(case, tokenize) for case in cases]
    table = Table()
    table.add_column("instruction")
    for name in found[0]:
        table.add_column(name)
    for case, equal in zip(cases, found, strict=True):
        cells = ["[green]equal[/]" if value else "[bold red]different[/]" for value in equal.values()]
        table.add_row(escape(case["instruction"][:60]), *cells)
    console.print(table)
    return 0 if all(all(equal.values()) for equal in found) else UNWANTED


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare composed token ids with those of the real Llama-2 tokenizer.")
    parser.add_argument("tokenizer_model", type=Path, help="tokenizer.model of Llama 2, or a tokenizer.json")
    sys.exit(main(parser.parse_args().tokenizer_model))
