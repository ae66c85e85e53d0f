"""Training-free pruners against versions that go through tokens one by one."""

import itertools
import math

import pytest
import torch

from prismatic.models.pruners.divprune import farthest_first
from prismatic.models.pruners.grid import spread
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.pruners.text_similarity import rate_by_text
from prismatic.policy import Policy

BEFORE_THE_LLM = ("grid:tokens=9", "text_similarity:tokens=9", "divprune:keep=0.28")
LENGTHS = (9, 14, 11)


@pytest.fixture(scope="module")
def policy(small_policy_directory):
    """Two images of 16 patches."""
    return Policy.from_pretrained(small_policy_directory, dtype="float32")


def ragged_batch(model):
    return {
        "input_ids": torch.randint(10, 200, (3, max(LENGTHS))),
        "attention_mask": torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None],
        "pixel_values": torch.randn(3, 2 * model.vision_backbone.channels_per_image, 64, 64),
    }


@pytest.mark.parametrize("pruner", BEFORE_THE_LLM)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(policy, pruner):
    policy.set_pruner(pruner)
    model = policy.model
    batch = ragged_batch(model)
    together = model.action_hidden(**batch)
    assert together.selection.distinct().tolist() == [9, 9, 9]
    for row, length in enumerate(LENGTHS):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        one["input_ids"], one["attention_mask"] = one["input_ids"][:, :length], one["attention_mask"][:, :length]
        alone = model.action_hidden(**one)
        assert torch.equal(alone.selection.kept()[0], together.selection.kept()[row])
        torch.testing.assert_close(alone.rows[0], together.rows[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pruner", ["grid", "text_similarity", "divprune"])
@torch.no_grad()
def test_all_tokens_are_no_pruning(policy, pruner):
    batch = ragged_batch(policy.model)
    policy.set_pruner("none")
    expected = policy.model.action_hidden(**batch).rows
    policy.set_pruner(f"{pruner}:keep=1")
    torch.testing.assert_close(policy.model.action_hidden(**batch).rows, expected, atol=1e-5, rtol=1e-5)


def test_a_grid_is_spread_evenly():
    assert spread(4, 4, 4) == [5, 7, 13, 15]
    for height, width in ((4, 4), (16, 16)):
        for number in range(height * width + 1):
            places = spread(number, height, width)
            assert len(set(places)) == number and places == sorted(places) and all(p < height * width for p in places)
            for quarter in range(4):
                inside = [p for p in places if p // width * 2 // height * 2 + p % width * 2 // width == quarter]
                assert abs(len(inside) - number / 4) <= 0.06 * number + 2, "no part of the image goes without"


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_the_most_diverse_tokens_are_found_one_by_one():
    patches = torch.randn(2, 12, 8, dtype=torch.float64)
    for row, tokens in enumerate(patches):
        distance = {(i, j): 1 - cosine(tokens[i], tokens[j]) for i, j in itertools.permutations(range(12), 2)}
        chosen = [max(range(12), key=lambda i: min(distance[i, j] for j in range(12) if j != i))]
        while len(chosen) < 5:
            left = set(range(12)) - set(chosen)
            chosen.append(max(left, key=lambda i: min(distance[i, j] for j in chosen)))
        assert farthest_first(patches, 5)[row].tolist() == sorted(chosen)


def test_duplicates_come_last():
    tokens = torch.eye(4).repeat(3, 1)[None]
    assert {place % 4 for place in farthest_first(tokens, 4)[0].tolist()} == {0, 1, 2, 3}


def test_text_rates_tokens():
    patches, context = torch.randn(1, 6, 8, dtype=torch.float64), torch.randn(1, 5, 8, dtype=torch.float64)
    prompt = torch.tensor([[False, True, True, True, False]])
    similarity = [[8**0.5 * cosine(patch, word) for word in context[0, 1:4]] for patch in patches[0]]
    shares = [[math.exp(s) / sum(math.exp(other) for other in row) for s in row] for row in similarity]
    worth = [sum(row[word] for row in shares) / 6 for word in range(3)]
    raters = [word for word in range(3) if worth[word] >= sum(worth) / 3]
    assert 0 < len(raters) < 3
    expected = []
    for v in range(6):
        given = [math.exp(similarity[v][t]) / sum(math.exp(similarity[other][t]) for other in range(6)) for t in raters]
        expected.append(sum(given) / len(raters))
    torch.testing.assert_close(
        rate_by_text(patches, context, prompt)[0], torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        ("grid:tokens=33", "grid:tokens=33: tokens=33 is more than the 32 visual tokens there are; set tokens=32 or"),
        ("divprune:tokens=0", "tokens=0: expected at least 1"),
        ("divprune:keep=1.5", "keep=1.5: expected a number above 0, up to 1"),
        ("text_similarity:keep=0.5,tokens=3", "tokens and keep say the same thing; give one"),
        ("fastvv", "unknown pruner 'fastvv'; known: divprune, .*grid, .*text_similarity"),
    ],
)
def test_what_is_no_pruner_is_refused(small_policy_directory, policy, pruner, message):
    with pytest.raises(ValueError, match=message):
        policy.set_pruner(pruner)
    with pytest.raises(ValueError, match=message):
        Policy.from_pretrained(small_policy_directory, pruner=pruner)


def test_how_many_stay():
    assert [PrunerSpec.parse(f"grid:{option}").tokens(512) for option in ("tokens=78", "keep=0.1")] == [78, 51]
    assert PrunerSpec("grid").tokens(512) == 128 and PrunerSpec("lightvla").tokens(512) is None
    assert PrunerSpec.parse("grid:keep=0.1").over({"tokens": 3}).options == {"keep": 0.1}
    with pytest.raises(
        ValueError, match="pruner 'grid' is for evaluation; train with one of --pruner grids, lightvla, "
    ):
        resolve_pruner("grid", None, "training")
