"""Runs a stock Llama over a laid-out sequence with a bias per key: full attention, or causal to decode tokens."""

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

from prismatic.models.sequence import Sequence
from prismatic.models.token_pruner import TokenSelection

_CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What the argument is called; `past_key_values` until transformers 5.23."""


def run_llama(
    model: LlamaModel, embeddings: torch.Tensor, position_ids: torch.Tensor, key_bias: torch.Tensor
) -> torch.Tensor:
    """Hidden rows after the final norm.

    Args:
        model: the decoder without the LM head.
        embeddings: (B, S, D).
        position_ids: (B, S), gaps allowed.
        key_bias: (B, S) added to every query's logit of that key; -inf hides it.

    Returns:
        (B, S, D).
    """
    mask = attention_mask(key_bias, embeddings)
    return model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def run_llama_pruning(
    model: LlamaModel,
    sequence: Sequence,
    layer: int,
    select: Callable[[torch.Tensor, torch.Tensor], TokenSelection],
) -> tuple[torch.Tensor, Sequence, TokenSelection]:
    """As `run_llama`, but visual rows are dropped before layer `layer` (0, 1, ...).

    Args:
        model: the decoder without the LM head.
        sequence: with all visual tokens.
        layer: the first that runs over the kept tokens only.
        select: hidden rows of the visual tokens (B, V, D) and of the context (B, C, D) -> the tokens that stay.

    Returns:
        Hidden rows (B, S', D) after the final norm, the sequence that they belong to, and the selection.
    """
    hidden = _run_layers(model, model.layers[:layer], sequence)
    _, visual, context = sequence.split(hidden)
    selection = select(visual, context)
    narrowed = sequence.narrow(hidden, selection)
    return model.norm(_run_layers(model, model.layers[layer:], narrowed)), narrowed, selection


def decode_greedily(
    language_model: LlamaForCausalLM, sequence: Sequence, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Go on with the most likely token, `num_tokens` times, under causal attention; nothing ends it earlier.

    Args:
        language_model: the decoder with its LM head.
        sequence: BOS, visual tokens and prompt; a row's tokens follow its own last one, whatever padding it has.
        num_tokens: how many.

    Returns:
        ids (B, num_tokens), their logits (B, num_tokens), and the hidden rows (B, num_tokens, D) that they were read
        from, after the final norm.
    """
    cache = DynamicCache(config=language_model.model.config)

    def run(embeddings: torch.Tensor, mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return language_model.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=True, **{_CACHE: cache}
        ).last_hidden_state

    bias, last = sequence.key_bias, sequence.action_start[:, None] - 1
    mask = attention_mask(bias, sequence.embeddings)
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    hidden = run(sequence.embeddings, mask.masked_fill(later, torch.finfo(mask.dtype).min), sequence.position_ids)
    rows = [hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))]
    best = [language_model.lm_head(rows[-1]).max(-1)]
    position = sequence.position_ids.gather(1, last)
    for _ in range(num_tokens - 1):
        token, position, bias = language_model.model.embed_tokens(best[-1].indices), position + 1, F.pad(bias, (0, 1))
        rows.append(run(token, attention_mask(bias, token), position))
        best.append(language_model.lm_head(rows[-1]).max(-1))
    return torch.cat([b.indices for b in best], 1), torch.cat([b.values for b in best], 1), torch.cat(rows, 1)


def attention_mask(key_bias: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Of queries `embeddings` (B, Q, D) over keys (B, S), (B, 1, Q, S) in the dtype that attention computes in.

    A 4-D float mask is the only form that transformers adds as it is: 2-D means causal, None with gaps in the
    positions means packed sequences.
    """
    device = embeddings.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeddings.dtype
    bias = key_bias.clamp(min=torch.finfo(dtype).min).to(dtype)[:, None, None, :]
    return bias.expand(-1, 1, embeddings.shape[1], -1)


def _run_layers(model: LlamaModel, layers: Iterable[nn.Module], sequence: Sequence) -> torch.Tensor:
    """What `LlamaModel.forward` does with its layers; gradient checkpointing is each layer's own."""
    hidden = sequence.embeddings
    mask = attention_mask(sequence.key_bias, hidden)
    rotary = model.rotary_emb(hidden, position_ids=sequence.position_ids)
    for decoder_layer in layers:
        hidden = decoder_layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden
