"""Buckets, prompts, kernels and counting, each alone."""

import time

import pytest
import torch
from torch import nn

from prismatic.inference.buckets import Buckets, round_up
from prismatic.inference.engine import check_engine
from prismatic.inference.kernels import OneDNN, Widened, fastest
from prismatic.inference.layers import attend_fused, attend_plainly
from prismatic.inference.prompts import PromptCache
from prismatic.models.sequence import tail_ids
from prismatic.models.token_pruner import count_picks, group_counts, group_picks, pick_tokens
from prismatic.vla.prompt import TokenIds


def test_buckets_hold_what_comes_and_are_multiples_of_16():
    for visual in (512, 98, 16):
        for batch in (1, 5):
            buckets = Buckets.of(visual, batch)
            assert buckets.sizes[-1] == visual and list(buckets.sizes) == sorted(set(buckets.sizes))
            assert all(size % 16 == 0 for size in buckets.sizes[:-1])
            for number in range(1, visual + 1):
                assert number <= buckets.fit(number) <= visual
    assert Buckets.of(512, 1).fit(78) == 80
    assert (1 + 80 + Buckets.of(512, 1).context_width(92)) % 16 == 0
    assert [Buckets.of(512, 2).batch(size) for size in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert Buckets().fit(78) == 78 and Buckets().context_width(92) == 92 and Buckets().batch(3) == 3
    assert round_up(16) == 16 and round_up(17) == 32


def test_an_unknown_engine_is_told_the_known_ones():
    with pytest.raises(ValueError, match="engine 'fast' is unknown; known: auto, eager, compiled"):
        check_engine("fast")


@pytest.mark.parametrize("floor", [0, 3, 12, 40])
def test_counting_finds_what_grouping_finds(floor):
    generator = torch.Generator().manual_seed(floor)
    scores = torch.randn(4, 20, 30, generator=generator)
    scores[:2] += 3 * torch.randn(30, generator=generator)  # queries agree: few distinct picks
    picks, _, made = pick_tokens(scores, floor)
    wanted = group_picks(picks, 30, made)
    counts = count_picks(scores, floor)
    for found, expected in zip(group_counts(counts, wanted[0].shape[1]), wanted, strict=True):
        assert torch.equal(found, expected)
    wider = group_counts(counts, 30)
    assert torch.equal(wider[1].sum(1), wanted[1].sum(1)) and not wider[0][~wider[1]].any()


def test_prompts_are_the_tail_and_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("prismatic.inference.prompts._KEPT", 3)
    embed, ids = nn.Embedding(100, 4), TokenIds(stop=2, pad=0)
    cache = PromptCache(embed, 5, ids)
    row = torch.tensor([1, 7, 8, 9])
    with torch.no_grad():
        prompt = cache(row)
        wanted, _, length = tail_ids(row[None], torch.ones(1, 4), 5, ids)
    assert prompt.length == int(length) == 3
    assert torch.equal(prompt.embeddings[:3], embed(row[1:])) and torch.equal(prompt.embeddings[8], embed.weight[2])
    assert not prompt.embeddings[3:8].any() and len(prompt.embeddings) == wanted.shape[1]
    assert cache(row) is prompt
    for number in range(10, 13):
        cache(torch.tensor([1, number]))
    assert cache(row) is not prompt and len(cache._prompts) == 3


def test_another_kernel_must_be_clearly_faster():
    def waits(seconds: float):
        return lambda: time.sleep(seconds)

    assert fastest({"torch": waits(0.004), "other": waits(0.0035)}, rounds=2) == "torch"
    assert fastest({"torch": waits(0.02), "other": waits(0.001)}, rounds=2) == "other"


@pytest.mark.parametrize("bias", [False, True])
def test_other_products_are_torchs(bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 40, bias=bias), torch.randn(2, 5, 24)
    with torch.inference_mode():
        torch.testing.assert_close(OneDNN()(linear, x), linear(x), atol=1e-5, rtol=1e-5)
        rough = nn.Linear(24, 40, bias=bias, dtype=torch.bfloat16)
        wanted = nn.functional.linear(
            x.bfloat16().float(), rough.weight.float(), None if not bias else rough.bias.float()
        )
        for keep in (False, True):
            found = Widened(keep)(rough, x.bfloat16())
            assert found.dtype == torch.bfloat16 and torch.equal(found, wanted.bfloat16())


def test_both_attentions_are_softmax_over_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    bias = torch.randn(2, 1, 1, 9)
    wanted = torch.stack([
        torch.stack([
            (q[b, h] @ k[b, h // 2].T / 8**0.5 + bias[b, 0]).softmax(-1) @ v[b, h // 2] for h in range(4)
        ])
        for b in range(2)
    ])  # fmt: skip
    for attend in (attend_fused, attend_plainly):
        torch.testing.assert_close(attend(q, k, v, bias), wanted, atol=1e-5, rtol=1e-5)
