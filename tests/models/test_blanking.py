"""Kept tokens without content: what changes, and what does not."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.models.pruners.blanking import blank_tokens
from prismatic.models.token_pruner import keep_all, select_tokens
from prismatic.policy import Policy
from prismatic.vla.request import Blanking

V, D = 8, 4


@pytest.fixture(scope="module")
def policy(small_policy_directory: Path) -> Policy:
    return Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager")


def observation(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pictures = {key: rng.integers(256, size=(64, 64, 3), dtype=np.uint8) for key in ("full_image", "wrist_image")}
    return {**pictures, "state": rng.uniform(-1, 1, 8)}


def test_only_the_content_of_named_and_kept_tokens_changes() -> None:
    patches = torch.randn(2, V, D)
    scores = torch.randn(2, V, V)
    kept = select_tokens(patches, scores)
    named = np.arange(V) % 2 == 0
    found = blank_tokens(kept, patches, [Blanking(named), None], num_images=2)
    for name in ("index", "valid", "count", "scores"):
        assert torch.equal(getattr(found, name), getattr(kept, name)), name
    assert torch.equal(found.tokens[1], kept.tokens[1])
    blanked = found.without_content()
    assert blanked is not None and not blanked[1].any()
    np.testing.assert_array_equal(blanked[0].numpy(), named & kept.kept()[0].numpy())
    for place, token in enumerate(kept.index[0].tolist()):
        if not kept.valid[0, place]:
            continue
        picture = patches[0, : V // 2] if token < V // 2 else patches[0, V // 2 :]
        expected = picture.mean(0) if named[token] else patches[0, token]
        torch.testing.assert_close(found.tokens[0, place], expected)


def test_as_many_others_are_drawn_by_their_seed() -> None:
    patches = torch.randn(1, V, D)
    named = np.arange(V) < 3
    drawn = []
    for seed in (1, 1, *range(2, 12)):
        found = blank_tokens(keep_all(patches), patches, [Blanking(named, seed)], 1).without_content()
        assert found is not None
        chosen = found[0].numpy()
        assert chosen.sum() == 3 and not (chosen & named).any()
        drawn.append(tuple(chosen))
    assert drawn[0] == drawn[1] and len(set(drawn)) > 3
    most = blank_tokens(keep_all(patches), patches, [Blanking(np.arange(V) < 6, 0)], 1).without_content()
    assert most is not None and most.sum() == 2  # no more others are there


@pytest.mark.parametrize("pruner", ["lightvla", "none"])
@pytest.mark.parametrize("engine", ["eager", "compiled"])
def test_a_policy_acts_without_the_content_and_chooses_as_before(
    small_policy_directory: Path, pruner: str, engine: str
) -> None:
    policy = Policy.from_pretrained(small_policy_directory, dtype="float32", engine=engine, pruner=pruner)
    seen, words = [observation(0), observation(1)], ["put it there", "open it"]
    plain = policy.act_batch(seen, words)
    everything = Blanking(np.ones(policy.model.num_visual_tokens, bool))
    nothing = Blanking(np.zeros(policy.model.num_visual_tokens, bool))
    found = policy.act_batch(seen, words, blankings=[everything, nothing])
    assert torch.equal(found.selection.kept(), plain.selection.kept())
    assert plain.selection.blanked is None
    without = found.selection.without_content()
    assert without is not None
    assert torch.equal(without[0], plain.selection.kept()[0]) and not without[1].any()
    assert np.abs(found.actions[0] - plain.actions[0]).max() > 1e-4
    np.testing.assert_allclose(found.actions[1], plain.actions[1], atol=1e-5)


def test_what_does_not_fit_is_refused(policy: Policy) -> None:
    with pytest.raises(ValueError, match="1 observations came with 2"):
        policy.act_batch([observation()], ["go"], blankings=[Blanking(np.ones(3, bool)), None])
    with pytest.raises(ValueError, match=r"shape \(3,\) and type bool; expected \(32,\)"):
        policy.act_batch([observation()], ["go"], blankings=[Blanking(np.ones(3, bool))])


def test_tokens_that_are_dropped_inside_the_model_are_not_blanked(small_policy_directory: Path) -> None:
    policy = Policy.from_pretrained(small_policy_directory, dtype="float32", pruner="fastv:tokens=4,layer=1")
    with pytest.raises(ValueError, match="drops tokens inside the model"):
        policy.act_batch([observation()], ["go"], blankings=[Blanking(np.ones(32, bool))])


@pytest.mark.parametrize(
    ("blankings", "said"),
    [
        (lambda tokens: np.ones(tokens, bool), "it was given ndarray"),
        (lambda tokens: [np.ones(tokens, bool)], "takes a list with one Blanking"),
        (lambda tokens: [True], "takes a list with one Blanking"),
        (lambda tokens: [], "1 observations came with 0"),
        (lambda tokens: [None, None], "1 observations came with 2"),
        (lambda tokens: [Blanking(np.full(tokens, 0.3))], "type float64; expected"),
        (lambda tokens: [Blanking(np.arange(tokens))], "type int64; expected"),
        (lambda tokens: [Blanking(np.array(["False"] * tokens))], "a bool for each visual token"),
        (lambda tokens: [Blanking(np.ones(tokens, bool), -1)], "others_seed=-1: expected a whole number from 0 on"),
        (lambda tokens: [Blanking(np.ones(tokens, bool), 1.5)], "others_seed=1.5: expected a whole number"),
    ],
)
def test_other_kinds_are_refused_in_a_sentence(policy: Policy, blankings: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        policy.act_batch([observation()], ["go"], blankings=blankings(policy.model.num_visual_tokens))
