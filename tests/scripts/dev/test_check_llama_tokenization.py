"""The check of token ids, with a made-up vocabulary: the real one is not part of the repository."""

import struct
from pathlib import Path

from scripts.dev.check_llama_tokenization import from_sentencepiece, main


def field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def sentencepiece(words: list[str]) -> bytes:
    """A SentencePiece model: special tokens, bytes, then letters and `words`, the first one scoring highest."""
    letters = sorted({letter for word in words for letter in word})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256))]
    pieces += [(word, -float(rank)) for rank, word in enumerate(words)] + [(letter, -1e9) for letter in letters]
    parts = [field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score)) for text, score in pieces]
    return b"".join(parts) + b"\x18\x01"


def test_the_highest_scoring_pair_is_joined_first():
    words = ["ab", "\u2581a", "abc", "bc"]
    encode = from_sentencepiece(sentencepiece(words)).encode
    assert encode("abc").tokens == ["\u2581", "abc"], "ab scores above the space and a"
    assert encode("bc b").tokens == ["\u2581", "bc", "\u2581", "b"]
    assert encode("b\n").tokens == ["\u2581", "b", "<0x0A>"], "what has no piece becomes bytes"


def test_what_is_no_vocabulary_ends_with_status_2(tmp_path: Path, capsys):
    file = tmp_path / "tokenizer.model"
    for content in (b"", b"text, not a model", sentencepiece(["ab"])[:-3]):
        file.write_bytes(content)
        assert main(file) == 2
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(tmp_path / "tokenizer.json") == 2 and main(tmp_path / "nowhere.model") == 2
    assert capsys.readouterr().err.count("error: ") == 5


def test_ids_of_another_vocabulary_are_told_as_different(reference_directory: Path, capsys):
    assert main(reference_directory / "tokenizer.json") == 1
    assert "different" in capsys.readouterr().out
