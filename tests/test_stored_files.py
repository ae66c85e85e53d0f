"""What is said about a small file that cannot be read."""

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prismatic.stored_files import foreign_code_only, load_component, load_plain, load_tensors, make_readable, read_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 302242674\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a placeholder that git-lfs left; run `git lfs pull`"),
        (b'{"a": 1', "is no JSON .*copy or download it again"),
        (b"", "is no JSON"),
        ('{"a": "é"}'.encode("latin-1"), "is no JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b'{"a": ' + b"[" * 100_000, "is no JSON"),
        (b"null", "holds a NoneType, expected a JSON object"),
    ],
)
def test_what_is_no_json_is_said_with_the_files_name(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"some.json {message}"):
        read_json(file)


def test_a_byte_order_mark_is_read_over(tmp_path: Path):
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"a": "é"}, ensure_ascii=False), encoding="utf-8-sig")
    assert read_json(file) == {"a": "é"}


STATE = {"fc1.weight": torch.arange(2000.0), "fc1.bias": torch.ones(3, dtype=torch.bfloat16)}


def cut(new_format: bool, keep: int) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        torch.save(STATE, file, _use_new_zipfile_serialization=new_format)
        os.truncate(file, keep if keep > 0 else file.stat().st_size + keep)

    return write


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer": (lambda file: file.write_bytes(POINTER), "is a placeholder that git-lfs left"),
    "cut off in the middle": (cut(True, 2000), "is cut off, or torch.save did not write it .2000 bytes."),
    "without its last bytes": (cut(True, -10), "is cut off"),
    "older format, cut off at its start": (cut(False, 40), "is cut off"),
    "older format, cut off": (cut(False, -500), "is cut off"),
    "nothing": (lambda file: file.write_bytes(b""), "is cut off"),
    "a web page": (lambda file: file.write_bytes(b"<!DOCTYPE html><html>"), "torch.save did not write it"),
    "any bytes": (lambda file: file.write_bytes(np.random.default_rng(0).bytes(4000)), "torch.save did not write it"),
    "a plain pickle": (lambda file: file.write_bytes(pickle.dumps({"a": [1]}, protocol=4)), "did not write it"),
    "a whole module": (lambda file: torch.save(torch.nn.Linear(2, 2), file), "holds pickled Python objects"),
    "objects beside tensors": (lambda file: torch.save({"a": Path("b")}, file), r"save the state_dict\(\) alone"),
    "numbers for names": (lambda file: torch.save({0: torch.ones(2)}, file), "holds no state dict"),
    "whole numbers": (
        lambda file: torch.save({"module.fc1.bias": torch.ones(2, dtype=torch.int64)}, file),
        "'fc1.bias' holds int64, where weights are floating-point numbers",
    ),
    "a list": (lambda file: torch.save([torch.ones(2)], file), "holds no state dict"),
    "a state dict inside another": (lambda file: torch.save({"state_dict": STATE}, file), "holds no state dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_pt_file_that_cannot_be_used_is_said_in_one_sentence(tmp_path: Path, name: str):
    write, message = BROKEN[name]
    file = tmp_path / "head.pt"
    write(file)
    with pytest.raises(ValueError, match=f"head.pt:? .*{message}|head.pt {message}") as told:
        load_component(file)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("new_format", [True, False])
def test_whole_files_of_both_formats_are_read(tmp_path: Path, new_format: bool):
    torch.save(STATE, tmp_path / "head.pt", _use_new_zipfile_serialization=new_format)
    found = load_tensors(tmp_path / "head.pt")
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)
    torch.save({"step": 3, "flags": ["a", None]}, tmp_path / "state.pt")
    assert load_plain(tmp_path / "state.pt") == {"step": 3, "flags": ["a", None]}


def test_only_code_of_other_repositories_is_still_referred_to():
    own = {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}
    foreign = {"AutoModel": "openvla/openvla-7b--modeling_prismatic.OpenVLAForActionPrediction"}
    assert foreign_code_only({"a": 1, "auto_map": own}) == {"a": 1}
    assert foreign_code_only({"a": 1, "auto_map": {**own, **foreign}}) == {"a": 1, "auto_map": foreign}
    assert foreign_code_only({"auto_map": {"AutoTokenizer": ["tokenization.Slow", None]}}) == {}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_get_the_mode_of_new_files(tmp_path: Path, umask: int, mode: int):
    file = tmp_path / "private"
    file.write_text("")
    file.chmod(0o600)
    before = os.umask(umask)
    try:
        make_readable(tmp_path, [file])
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["private"]
