"""Processes that were given different flags, data, packages or code do not begin."""

import socket
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from prismatic.training.distributed import Ranks
from prismatic.training.runs.record import code_digest, versions
from prismatic.training.runs.resuming import check_agreement


@dataclass(frozen=True)
class WithAnother(Ranks):
    """One of two processes; the other says the same but for one fact."""

    fact: str = ""
    value: str = ""

    def gather(self, value: Any) -> list[Any]:
        node, facts = value
        other = node.replace(socket.gethostname(), "node-b")
        return [value, (other, facts | ({self.fact: self.value} if self.fact else {}))]


def two(fact: str = "", value: str = "") -> Ranks:
    return WithAnother(0, 2, torch.device("cpu"), None, fact, value)


def test_processes_that_agree_begin(flags):
    check_agreement(flags(), {"data": "sha256:1"}, two())


@pytest.mark.parametrize(
    ("fact", "value"),
    [("--seed", "8"), ("dataset 'data'", "sha256:2"), ("package torch", "1.0"), ("the code of prismatic", "abc")],
)
def test_another_node_is_named_with_what_differs(flags, monkeypatch, fact, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="give all processes the same flags, data, packages and code") as error:
        check_agreement(flags(), {"data": "sha256:1"}, two(fact, value))
    words = str(error.value)
    assert words.startswith(f"process 0 on node {socket.gethostname()} has {fact} ")
    assert f", process 1 of 2 on node node-b has {value}; " in words


def test_on_one_machine_no_node_is_named(flags, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"^process 0 has --seed 7, process 1 of 2 has 8; "):
        check_agreement(flags(), {}, two("--seed", "8"))


def test_code_is_known_by_its_bytes():
    assert len(code_digest()) == 12 and code_digest() == code_digest()
    assert "torch" in versions()
