"""Work, bytes, floors and calls of operators, against the counter, sums by hand and small calls of known work."""

import pytest
import torch
from torch.nn import functional as F

from prismatic.benchmark.accounting import (
    COMPONENTS,
    Prompted,
    agree,
    count_launches,
    counted_flops,
    eager_flops,
    floor_seconds,
    needed_flops,
    weight_bytes,
)
from prismatic.benchmark.config import Setting
from prismatic.benchmark.device import copy_bandwidth, peak_flops, peak_memory, release_memory
from prismatic.benchmark.figures import asked_of
from prismatic.benchmark.random_policy import PROMPT_TOKENS, instruction_of
from prismatic.benchmark.subject import Job, Subject, made_up_observations, with_pruner
from prismatic.models.flops import count_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(("pruner", "kept"), [("none", None), ("lightvla", 40), ("grid:tokens=40", 40)])
def test_eager(tiny_policy, pruner, kept):
    policy = with_pruner(tiny_policy, pruner, kept or 0)
    look, sentence = made_up_observations(policy, 1, 64), [instruction_of(PROMPT_TOKENS)]
    asked = Prompted(policy.model, policy.action_head, policy.proprio_projector, kept, PROMPT_TOKENS)
    assert counted_flops(lambda: policy.act_batch(look, sentence)) == sum(eager_flops(asked).values())
    assert set(eager_flops(asked)) == set(weight_bytes(asked)) == set(COMPONENTS)


def test_a_pruner_with_a_memory_is_shown_an_episode():
    """What is counted is its second observation. Of the same pictures only the K that the text attends to are new."""
    setting = Setting("eager", "float32", 0)
    subject = Subject(Job(setting, ("static_reuse:tokens=9",), preset="tiny", camera_size=64))
    assert subject.call(0, 0)["kept"] == 512
    asked = asked_of(subject, 0)
    subject.begin(0)
    assert asked.kept is not None and 9 < sum(asked.kept) == subject.call(0, 1)["kept"] < 512
    subject.begin(0)
    assert subject.call(0, 0)["kept"] == 9


def test_the_least_work_leaves_out_rows_that_nobody_reads(tiny_policy):
    model, rows, width = tiny_policy.model, 56, 64
    asked = Prompted(model, tiny_policy.action_head, tiny_policy.proprio_projector, 77, PROMPT_TOKENS)
    length = 1 + 77 + 1 + 34 + 56 + 1
    assert asked.sequence_length == length
    # Queries, output projection and the three of the MLP (96 wide) for the rows that are read; all keys and values.
    last = 2 * (2 * length + 2 * rows) * width * width + 2 * rows * 3 * width * 96 + 4 * rows * length * width
    whole = 2 * length * (4 * width * width + 3 * width * 96) + 4 * length * length * width
    llm = count_flops(model, tiny_policy.action_head, None, 77, PROMPT_TOKENS + 1).llm
    assert eager_flops(asked)["llm"] == llm == 2 * whole
    assert needed_flops(asked)["llm"] == whole + last


def test_bytes_of_weights(tiny_policy):
    asked = Prompted(tiny_policy.model, tiny_policy.action_head, tiny_policy.proprio_projector, None, PROMPT_TOKENS)
    ours, reference = weight_bytes(asked), weight_bytes(asked, reference=True)
    model = tiny_policy.model
    embeddings = model.get_input_embeddings().weight.numel() * 4
    parts = (model, tiny_policy.action_head, tiny_policy.proprio_projector)
    everything = sum(p.numel() * 4 for module in parts for p in module.parameters())
    pool = sum(p.numel() * 4 for vit in model.vision_backbone.vits if vit.attn_pool for p in vit.attn_pool.parameters())
    assert sum(reference.values()) - reference["vision"] // 2 == everything - embeddings - pool - norms(model)
    assert ours["lm_head"] == 0 and reference["lm_head"] == embeddings
    block = sum(p.numel() * 4 for vit in model.vision_backbone.vits for p in vit.blocks[-1].parameters())
    assert reference["vision"] // 2 - ours["vision"] == block


def norms(model: torch.nn.Module) -> int:
    return sum(p.numel() * 4 for vit in model.vision_backbone.vits for p in vit.norm.parameters())


def test_a_floor_is_the_slower_of_computing_and_reading_in_each_component():
    flops = dict.fromkeys(COMPONENTS, 0) | {"vision": 100, "llm": 10}
    read = dict.fromkeys(COMPONENTS, 0) | {"vision": 5, "llm": 50}
    assert floor_seconds(flops, read, peak=10, bandwidth=5) == 100 / 10 + 50 / 5


def test_agreement_is_within_one_percent():
    assert agree(1000, 1010) and agree(1000, 990) and not agree(1000, 1011) and not agree(1000, 0)


def test_calls_of_operators_leave_out_those_that_operators_make():
    a = torch.ones(4, 4)
    assert count_launches(lambda: a @ a, CPU).number == 1
    assert count_launches(lambda: (a @ a).add(1).relu(), CPU).number == 3


def test_the_counter_takes_attention_apart():
    q = torch.ones(1, 2, 8, 4)
    assert counted_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 8 * 8 * 4


def test_ceilings_are_reached_by_what_is_measured():
    peak, ways = peak_flops(CPU, torch.float32, side=64, seconds=0.01)
    assert peak == max(ways.values()) > 0 and copy_bandwidth(CPU, 2**16, 0.01) > 0


def test_the_peak_of_memory_is_told():
    release_memory(CPU)
    before = peak_memory(CPU)
    held = torch.ones(2**24)
    assert held.sum() and (before == 0 or peak_memory(CPU) - before > 0.9 * held.numel() * 4)
