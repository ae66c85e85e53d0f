"""Selection against brute force, and the straight-through gradient against the paper's duplicated form."""

import numpy as np
import pytest
import torch

from prismatic.models.batch import Call
from prismatic.models.pruners.random import number_dropped
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner, group_picks, rms_normalize, score_tokens


def brute_force_scores(patches, context):
    dim = patches.shape[-1]
    keys, words = rms_normalize(patches), rms_normalize(context)
    rows = []
    for key in keys:
        weights = torch.stack([key @ word / dim**0.5 for word in words]).softmax(0)
        query = rms_normalize((weights[:, None] * words).sum(0))
        rows.append(torch.stack([query @ other / dim**0.5 for other in keys]))
    return torch.stack(rows)


def test_scores_equal_brute_force():
    patches, context = torch.randn(2, 12, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    scores = score_tokens(patches, context, mask)
    torch.testing.assert_close(scores[0], brute_force_scores(patches[0], context[0]))
    torch.testing.assert_close(scores[1], brute_force_scores(patches[1], context[1, :3]))


@pytest.mark.parametrize("minimum", [0, 11])
def test_a_selection_tells_the_best_score_of_any_query(minimum):
    patches, context = torch.randn(2, 12, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    pruner = TokenPruner("weighted", min_tokens=minimum)
    scores = pruner.eval()(patches, context, mask).scores
    assert scores.dtype == torch.float32 and scores.shape == (2, 12)
    for row, words in enumerate((context[0], context[1, :3])):
        table = brute_force_scores(patches[row], words)
        expected = torch.stack([max(table[query, token] for query in range(12)) for token in range(12)])
        torch.testing.assert_close(scores[row], expected)
    assert pruner.eval()(patches.bfloat16(), context.bfloat16(), mask).scores.dtype == torch.float32
    for compact in (True, False):
        assert TokenPruner("weighted", compact, min_tokens=minimum).train()(patches, context, mask).scores is None


def test_without_scores_that_say_what_was_kept_there_are_none():
    patches, context = torch.randn(1, 12, 16), torch.randn(1, 5, 16)
    for name in ("none", "random"):
        assert PrunerSpec.parse(name).build().eval()(patches, context).scores is None


def test_group_picks_equals_python_sets():
    picks = torch.randint(0, 9, (5, 7))
    index, valid, count = group_picks(picks, 9)
    for row in range(5):
        distinct = sorted(set(picks[row].tolist()))
        assert index[row][valid[row]].tolist() == distinct
        assert count[row][valid[row]].tolist() == [picks[row].tolist().count(token) for token in distinct]
        assert not count[row][~valid[row]].any()
    assert valid.any(0).all(), "padded to the largest number of picks, not beyond"


def test_selection_keeps_the_union_in_patch_order():
    patches, context = torch.randn(3, 20, 8), torch.randn(3, 4, 8)
    pruner = TokenPruner("weighted").eval()
    selection = pruner(patches, context)
    picks = score_tokens(patches, context).argmax(-1)
    for row in range(3):
        kept = sorted(set(picks[row].tolist()))
        assert selection.kept()[row].nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(selection.tokens[row, : len(kept)], patches[row, kept])
        bias = selection.key_bias()[row]
        expected = torch.tensor([float(picks[row].tolist().count(token)) for token in kept]).log()
        torch.testing.assert_close(bias[: len(kept)], expected)
        assert torch.isneginf(bias[len(kept) :]).all()


def test_set_weighs_every_token_once():
    selection = TokenPruner("set").eval()(torch.randn(2, 20, 8), torch.randn(2, 4, 8))
    assert (selection.key_bias()[selection.valid] == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_compact_training_equals_duplicated_rows(seed):
    """One attention read over compact tokens with log(count) bias equals that over duplicates; gradients too."""
    torch.manual_seed(seed)
    patches = torch.randn(2, 24, 8, dtype=torch.float64)
    context = torch.randn(2, 5, 8, dtype=torch.float64)
    query = torch.randn(2, 3, 8, dtype=torch.float64)
    noise = torch.rand(2, 24, 24, dtype=torch.float64)
    results = []
    for compact in (False, True):
        inputs = [patches.clone().requires_grad_(), context.clone().requires_grad_()]
        selection = TokenPruner("weighted", compact).train()(*inputs, None, noise)
        logits = query @ selection.tokens.transpose(1, 2) + selection.key_bias().double()[:, None]
        read = logits.softmax(-1) @ selection.tokens
        gradients = torch.autograd.grad(read.square().sum(), inputs)
        results.append((read.detach(), *gradients))
    for duplicated, compacted in zip(*results, strict=True):
        torch.testing.assert_close(compacted, duplicated, atol=1e-12, rtol=1e-12)
        assert duplicated.abs().max() > 0


def test_gradient_reaches_the_scores_only_through_the_straight_through_path():
    patches = torch.randn(1, 10, 8)
    context = torch.randn(1, 3, 8, requires_grad=True)
    selection = TokenPruner("set").train()(patches, context)
    torch.testing.assert_close(
        selection.tokens.detach(), patches.gather(1, selection.index[..., None].expand(-1, -1, 8))
    )
    selection.tokens.square().sum().backward()
    assert context.grad is not None and context.grad.abs().max() > 0


def test_keep_all_keeps_all():
    patches = torch.randn(2, 6, 4)
    selection = KeepAllTokens()(patches, torch.randn(2, 3, 4))
    assert selection.kept().all() and torch.equal(selection.tokens, patches) and (selection.key_bias() == 0).all()


def test_random_control_keeps_as_many_but_other_tokens():
    patches, context = torch.randn(4, 40, 8), torch.randn(4, 4, 8)
    chosen = TokenPruner("weighted").eval()(patches, context)
    random = PrunerSpec.parse("random:seed=3").build().eval()(patches, context)
    assert torch.equal(random.distinct(), chosen.distinct())
    assert not torch.equal(random.kept(), chosen.kept())
    for row in range(4):
        index = random.index[row][random.valid[row]]
        torch.testing.assert_close(random.tokens[row][random.valid[row]], patches[row, index])


@pytest.mark.parametrize("multiplicity", ["weighted", "set"])
@pytest.mark.parametrize("draw", ["added", "dropped"])
def test_what_lightvla_keeps_with_others_or_without_some(draw, multiplicity):
    patches, context = torch.randn(4, 60, 8), torch.randn(4, 4, 8)
    chosen = TokenPruner(multiplicity).eval()(patches, context)
    pruner = PrunerSpec.parse(f"random:draw={draw},seed=3,multiplicity={multiplicity}").build().eval()
    seeds = [(query, 0) for query in (5, 6, 7, 5)]
    found = pruner(patches, context, seeds=seeds)
    assert found.scores is None and found.multiplicity == multiplicity and found.valid.any(0).all()
    for row in range(4):
        own = dict(zip(chosen.index[row].tolist(), chosen.count[row].tolist(), strict=True))
        own = {token: count for token, count in own.items() if count}
        index, valid = found.index[row], found.valid[row]
        kept = dict(zip(index[valid].tolist(), found.count[row][valid].tolist(), strict=True))
        assert list(kept) == sorted(kept) and not found.count[row][~valid].any()
        torch.testing.assert_close(found.tokens[row][valid], patches[row, index[valid]])
        if draw == "added":
            expected = own | dict.fromkeys(set(kept) - set(own), 1.0)
            assert kept == expected and len(kept) == min(2 * len(own), 60)
        else:
            assert kept.items() <= own.items() and len(own) - len(kept) == max(1, int(len(own) / 10 + 0.5))
    again, alone = pruner(patches, context, seeds=seeds), pruner(patches[1:2], context[1:2], seeds=seeds[1:2])
    assert torch.equal(again.kept(), found.kept()) and torch.equal(alone.kept()[0], found.kept()[1])
    others = pruner(patches, context, seeds=[(query + 1, 0) for query, _ in seeds])
    assert not torch.equal(others.kept(), found.kept()), "each query draws anew"
    seed = PrunerSpec.parse(f"random:draw={draw},seed=4,multiplicity={multiplicity}").build().eval()
    assert not torch.equal(seed(patches, context, seeds=seeds).kept(), found.kept())


def test_a_tenth_is_dropped_and_one_stays():
    assert [number_dropped(kept) for kept in (1, 2, 9, 14, 16, 60)] == [0, 1, 1, 1, 2, 6]
    context = torch.randn(1, 4, 8)
    one = PrunerSpec.parse("random:draw=dropped").build().eval()(torch.ones(1, 9, 8), context, seeds=[(1, 0)])
    assert one.distinct().tolist() == [1], "all queries agree, and the one token stays"
    few = torch.eye(3, 8)[None] * 3
    chosen = TokenPruner("weighted", min_tokens=2).eval()(few, context).distinct().item()
    more = PrunerSpec.parse("random:draw=added,min_tokens=2").build().eval()(few, context, seeds=[(1, 0)])
    assert chosen >= 2 and more.distinct().tolist() == [3], "there are no more others"
    with pytest.raises(ValueError, match="draw=added: it changes what LightVLA keeps, which tokens=5 does not look at"):
        PrunerSpec.parse("random:draw=added,tokens=5")


def test_a_given_number_is_drawn_at_random():
    patches, context = torch.randn(3, 20, 8), torch.randn(3, 4, 8)
    pruner = PrunerSpec.parse("random:tokens=5,seed=3").build().eval()
    drawn = pruner(patches, context, seeds=[(1, 0), (2, 0), (1, 0)])
    assert drawn.distinct().tolist() == [5, 5, 5] and drawn.count.eq(1).all()
    for row in range(3):
        assert torch.equal(drawn.tokens[row], patches[row, drawn.index[row]])
        assert drawn.index[row].tolist() == sorted(set(drawn.index[row].tolist()))
    assert torch.equal(drawn.index[0], drawn.index[2]) and not torch.equal(drawn.index[0], drawn.index[1])
    alone = pruner(patches[1:2], context[1:2], seeds=[(2, 0)])
    assert torch.equal(alone.index[0], drawn.index[1]), "a draw does not depend on its batch"


def random_draw(seed: int, query: int, passes: int = 1) -> list[tuple[int, ...]]:
    """The tokens that `random` keeps in the passes of one policy query."""
    generator = torch.Generator().manual_seed(1)
    patches, context = (torch.randn(1, n, 8, generator=generator) for n in (60, 4))
    pruner = PrunerSpec.parse(f"random:seed={seed}").build().eval()
    seeds = [Call(seeds=[query], number=number).pruner_seeds for number in range(passes)]
    return [tuple(pruner(patches, context, seeds=own).index[0].tolist()) for own in seeds]


def test_random_draws_follow_from_seed_query_and_pass_alone():
    draws = [draw for seed in range(6) for query in range(6) for draw in random_draw(seed, query, 3)]
    assert len(set(draws)) == 6 * 6 * 3, "else two of them share a draw, as sums and xors of seeds did"
    assert random_draw(2, 5, 3) == random_draw(2, 5, 3) and random_draw(0, -1) != random_draw(0, 1)
    assert random_draw(0, np.int64(7)) == random_draw(0, 7)
    wide = [(5, 7), (5 + 2**32, 7), (5, 7 + 2**32), (5, 1 + (7 << 32)), (5 + (7 << 32), 1), (5 + (1 << 32), 7 << 32)]
    assert len({draw for numbers in wide for draw in random_draw(*numbers, 2)}) == 12, "numbers of two words, too"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lightvla:min_tokens=--5", "min_tokens=--5: expected a whole number, 0 or more"),
        ("lightvla:min_tokens=-5", "min_tokens=-5: expected a whole number, 0 or more"),
        ("lightvla:min_tokens=", "min_tokens=: expected a whole number"),
        ("lightvla:min_tokens=5.0", "min_tokens=5.0: expected a whole number"),
        ("lightvla:min_tokens=\u00b2", "expected a whole number"),
        ("random:seed=true", "seed=True: expected a whole number"),
        ("lightvla_star:queries=1e3", "queries=1e3: expected a whole number"),
        ("lightvla:min_tokens=5,min_tokens=6", "'min_tokens' stands twice"),
        ("lightvlaa", "unknown pruner 'lightvlaa'; known: divprune, "),
        ("lightvla:queries=3", "no option 'queries'"),
        ("lightvla:noise=pink", "noise=pink is not one of"),
        ("lightvla:noise", "has no value"),
    ],
)
def test_bad_flags_say_what_is_known(text, message):
    with pytest.raises(ValueError, match=message):
        PrunerSpec.parse(text)


@pytest.mark.parametrize(
    "recorded", [{"min_tokens": 5}, "none", {"name": ["lightvla"]}, {"name": "lightvla", "min_tokens": 5.0}]
)
def test_a_record_that_is_no_pruner_is_refused(recorded):
    with pytest.raises(ValueError, match="is no pruner|unknown pruner|expected a whole number"):
        PrunerSpec.from_json(recorded)


def test_inference_follows_what_training_recorded():
    recorded = {"name": "lightvla", "multiplicity": "weighted", "noise": "uniform", "min_tokens": 7}
    assert resolve_pruner("lightvla", recorded, "inference").options == {"multiplicity": "weighted", "min_tokens": 7}
    assert resolve_pruner("lightvla:multiplicity=set,min_tokens=2", recorded, "inference").options["min_tokens"] == 2
    assert resolve_pruner("random:seed=1", recorded, "inference").build().min_tokens == 7
    assert resolve_pruner("none", recorded, "inference").options == {}
    assert resolve_pruner("lightvla", None, "inference").options == {"multiplicity": "set"}


@pytest.mark.parametrize(
    ("flag", "recorded", "trained", "run"),
    [
        (None, None, "lightvla:multiplicity=weighted,noise=uniform", "lightvla:multiplicity=set"),
        (None, {"name": "none"}, "none", "none"),
        ("none", {"name": "lightvla", "multiplicity": "set"}, "none", "none"),
        ("lightvla:min_tokens=4", None, "lightvla:multiplicity=weighted,noise=uniform,min_tokens=4",
         "lightvla:multiplicity=set,min_tokens=4"),
        ("lightvla", {"name": "lightvla", "multiplicity": "set", "noise": "gumbel"},
         "lightvla:multiplicity=set,noise=gumbel", "lightvla:multiplicity=set"),
        ("lightvla", {"name": "none"}, "lightvla:multiplicity=weighted,noise=uniform", "lightvla:multiplicity=set"),
        ("random:seed=3", {"name": "lightvla", "multiplicity": "weighted", "min_tokens": 5}, None,
         "random:multiplicity=weighted,min_tokens=5,seed=3"),
    ],
)  # fmt: skip
def test_flag_record_and_purpose_say_which_pruner_runs(flag, recorded, trained, run):
    assert str(resolve_pruner(flag, recorded, "inference")) == run
    if trained is None:
        with pytest.raises(ValueError, match="is for evaluation; train with one of"):
            resolve_pruner(flag, recorded, "training")
    else:
        assert str(resolve_pruner(flag, recorded, "training")) == trained


def test_flag_grammar_round_trip():
    spec = PrunerSpec.parse("lightvla:multiplicity=set,noise=gumbel,min_tokens=4")
    assert PrunerSpec.parse(str(spec)) == spec == PrunerSpec.from_json(spec.to_json())
    assert spec.noise == "gumbel"


@pytest.mark.parametrize("minimum", [1, 6, 24, 40])
def test_the_floor_is_kept_by_the_best_tokens_nobody_picked(minimum):
    patches, context = torch.randn(5, 24, 8), torch.randn(5, 4, 8)
    free = TokenPruner("weighted").eval()(patches, context)
    floored = TokenPruner("weighted", min_tokens=minimum).eval()(patches, context)
    assert torch.equal(floored.distinct(), free.distinct().clamp(min=min(minimum, 24)))
    scores = score_tokens(patches, context)
    for row in range(5):
        picked = set(free.index[row][free.valid[row]].tolist())
        ranked = [token for token in scores[row].amax(0).argsort(descending=True).tolist() if token not in picked]
        expected = picked | set(ranked[: max(minimum - len(picked), 0)])
        assert set(floored.kept()[row].nonzero()[:, 0].tolist()) == expected
        valid = floored.valid[row]
        counts = dict(zip(floored.index[row][valid].tolist(), floored.count[row][valid].tolist(), strict=True))
        assert all(counts[token] == 1 for token in expected - picked)


def test_further_tokens_teach_the_scores_alike_in_both_training_forms():
    torch.manual_seed(0)
    patches, context = torch.randn(3, 24, 8, dtype=torch.float64), torch.randn(3, 5, 8, dtype=torch.float64)
    query = torch.randn(3, 3, 8, dtype=torch.float64)
    results = []
    for compact in (False, True):
        inputs = [patches.clone().requires_grad_(), context.clone().requires_grad_()]
        selection = TokenPruner("weighted", compact, min_tokens=15).train()(*inputs)
        logits = query @ selection.tokens.transpose(1, 2) + selection.key_bias().double()[:, None]
        gradients = torch.autograd.grad((logits.softmax(-1) @ selection.tokens).square().sum(), inputs)
        results.append((selection.kept().double(), *gradients))
    for duplicated, compacted in zip(*results, strict=True):
        torch.testing.assert_close(compacted, duplicated, atol=1e-12, rtol=1e-12)
    assert results[0][0].sum(1).min() >= 15
