"""What is chosen for speed when a run begins, and repeated when it goes on."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from prismatic.checkpoints.saving import load_training_state
from prismatic.models.llama import PLAIN, plain_attention
from prismatic.stored_files import read_json
from prismatic.training.build import build
from prismatic.training.distributed import Ranks
from prismatic.training.loop import finetune
from prismatic.training.runs.computing import FUSED, Computing, choose_computing, quicker_attention
from prismatic.training.runs.resuming import find_resumption

ALONE = Ranks(0, 1, torch.device("cpu"))


def attention_of(run) -> tuple[str, set[bool]]:
    model = run.module.model
    fused = {block.attn.fused_attn for vit in model.vision_backbone.vits for block in vit.blocks}
    return model.language_model.config._attn_implementation, fused


def test_a_run_that_goes_on_computes_as_it_began(flags):
    folder = finetune(flags(max_steps=2, precision="auto"))
    chosen = load_training_state(folder)["computing"]
    assert chosen == choose_computing(flags(precision="auto"), folder, torch.device("cpu")).to_json()
    assert read_json(folder.parents[1] / "run.json")["facts"]["computing"] == chosen
    config = flags(max_steps=4, precision="auto", resume="True")
    resumption = find_resumption(config, 1)
    other = Computing("cpu", not chosen["bf16"], *(({FUSED, PLAIN} - {chosen[key]}).pop() for key in list(chosen)[2:]))
    assert resumption is not None
    resumption.state["computing"] = other.to_json()  # a measurement that fell out the other way
    run = build(config, ALONE, resumption)
    assert run.module.bf16 == other.bf16
    assert attention_of(run) == (other.llm_attention, {other.vit_attention == FUSED})
    resumption.state["computing"] = replace(other, device="cuda").to_json()  # a choice of another device says nothing
    run = build(config, ALONE, resumption)
    assert run.module.bf16 == chosen["bf16"] and attention_of(run)[0] == chosen["llm_attention"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_is_one_of_the_two_and_lasts(dtype):
    shape = (2, 2, 40, 16)
    assert quicker_attention(shape, dtype) in (FUSED, PLAIN)
    assert quicker_attention(shape, dtype) is quicker_attention(shape, dtype)


def test_on_a_gpu_nothing_is_measured(flags):
    assert choose_computing(flags(precision="bf16"), None, torch.device("cuda")) == Computing("cuda", True)


@pytest.mark.parametrize("groups", [1, 2])
def test_plain_attention_is_attention(groups):
    """Against torch's own in float64, gradients included; keys are hidden by the mask, and shared among heads."""
    generator = torch.Generator().manual_seed(0)

    def states(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(2, heads, rows, 8, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = states(4, 5), states(4 // groups, 7), states(4 // groups, 7)
    mask = torch.randn(2, 1, 1, 7, generator=generator, dtype=torch.float64)
    mask[0, ..., 5:] = torch.finfo(torch.float64).min
    mask = mask.expand(-1, 1, 5, -1)
    module = torch.nn.Module()
    module.num_key_value_groups = groups
    ours, _ = plain_attention(module, query, key, value, mask, 0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, expected.transpose(1, 2))
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), (query, key, value)),
        torch.autograd.grad((expected.transpose(1, 2) * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
