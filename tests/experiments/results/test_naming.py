"""Policies by the names that a person would write."""

import pytest

from experiments.robot.libero.results.naming import checkpoint_name, hub_name, policy_name, policy_names
from experiments.robot.libero.results.results import Results

REVISION = "abc1234" + "0" * 33
CACHE = f"/home/me/.cache/huggingface/hub/models--moojink--openvla-7b-oft/snapshots/{REVISION}"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (CACHE, "moojink/openvla-7b-oft@abc1234"),
        (CACHE + "/", "moojink/openvla-7b-oft@abc1234"),
        (f"{CACHE}/spatial", "moojink/openvla-7b-oft@abc1234/spatial"),
        (f"/cache/models--gpt2/snapshots/{REVISION}", "gpt2@abc1234"),
        ("/data/runs/small", "small"),
        ("runs/small--30000_chkpt", "small--30000_chkpt"),
        ("/data/runs/small/latest", "small/latest"),
        ("/data/runs/small/checkpoint-3000", "small/checkpoint-3000"),
        ("/data/runs/small/30000", "small/30000"),
        ("/data/runs/small/checkpoints/latest", "small/latest"),
        ("latest", "latest"),
        ("/data/snapshots/small", "small"),
    ],
)
def test_a_checkpoint_has_a_short_name(path: str, name: str) -> None:
    assert checkpoint_name(path) == name == policy_name({"checkpoint": path})
    assert (hub_name(path) is not None) == ("@" in name)


def test_a_server_is_its_address() -> None:
    assert policy_name({"policy_url": "ws://pc:8000"}) == "ws://pc:8000"


def names_of(*checkpoints: str) -> list[str]:
    return policy_names([Results(policy={"checkpoint": checkpoint}) for checkpoint in checkpoints])


def test_names_that_meet_get_the_part_that_parts_them() -> None:
    assert names_of("/data/a/runs/small", "/data/b/runs/small") == ["a/…/small", "b/…/small"]
    assert names_of("/data/a/small", "/data/b/small", "/data/c/large") == ["a/small", "b/small", "large"]
    assert names_of("small", "/data/b/small") == ["small", "b/small"]


def test_revisions_of_one_model_are_two_policies() -> None:
    other = CACHE.replace("abc1234", "def5678")
    assert names_of(CACHE, other) == ["moojink/openvla-7b-oft@abc1234", "moojink/openvla-7b-oft@def5678"]
    elsewhere = CACHE.replace("/home/me/.cache", "/scratch")
    assert names_of(CACHE, elsewhere) == ["moojink/openvla-7b-oft@abc1234"] * 2, "one model in two caches"
    near = CACHE[:-1] + "1"
    assert names_of(CACHE, near) == [f"moojink/openvla-7b-oft@{REVISION}", f"moojink/openvla-7b-oft@{REVISION[:-1]}1"]
