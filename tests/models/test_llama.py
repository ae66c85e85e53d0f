"""The language model over a sequence of which only some rows are read."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from prismatic.models.llama import PLAIN, run_llama, run_llama_reading, share_casts
from prismatic.models.sequence import Sequence, take_rows

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def small_llama(attention: str, key_heads: int = 4) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=8, num_key_value_heads=key_heads, attn_implementation=attention)
    return LlamaModel(config).train()


def a_sequence(dtype: torch.dtype) -> tuple[Sequence, torch.Tensor]:
    """Gapped positions, padding, other places in every row."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(3, 14, 32, generator=generator).to(dtype)
    positions = torch.stack([torch.randperm(40, generator=generator)[:14].sort().values for _ in range(3)])
    bias = torch.randn(3, 14, generator=generator).masked_fill(
        torch.arange(14) > torch.tensor([[13], [10], [12]]), -torch.inf
    )
    places = torch.stack([torch.arange(first, first + 4) for first in (9, 6, 8)])
    return Sequence(embeddings, positions, bias, places[:, 0] + 1, 3), places


def gradients(model: LlamaModel, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (rows * torch.linspace(-1, 1, rows.numel()).to(rows).reshape(rows.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa", PLAIN])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reading_some_rows_gives_what_the_whole_model_gives_there(attention, checkpointing):
    model, (sequence, places) = small_llama(attention, key_heads=2), a_sequence(torch.float32)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    whole = run_llama(model, sequence.embeddings, sequence.position_ids, sequence.key_bias)
    expected = take_rows(whole, places)
    wanted = gradients(model, expected)
    rows = run_llama_reading(model, sequence, places)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
    found = gradients(model, rows)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def casts_of_activations(model: LlamaModel, sequence: Sequence, places: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rows under bfloat16 autocast, and how many bytes the backward pass keeps for them."""
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        rows = run_llama_reading(model, sequence, places)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return rows, sum(size for place, size in saved.items() if place not in own)


def test_a_norm_rounded_once_changes_no_row_and_keeps_less():
    model, (sequence, places) = small_llama("sdpa"), a_sequence(torch.float32)
    rows, before = casts_of_activations(model, sequence, places)
    share_casts(model)
    shared, after = casts_of_activations(model, sequence, places)
    assert torch.equal(shared, rows), "each layer rounded the same values by itself"
    one_copy = sequence.embeddings.numel() * 2
    assert (
        before - after >= 3 * 3 * one_copy - 2 * one_copy
    )  # q, k, v and gate, up: three of five go, fewer in the last
    exact = run_llama_reading(model, sequence, places)
    assert exact.dtype == torch.float32 and not torch.equal(exact, rows), "without autocast nothing is rounded"
