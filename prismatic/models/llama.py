"""Runs a stock Llama over a laid-out sequence with a bias per key: full attention, or causal to decode tokens."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from prismatic.libraries import (
    ALL_ATTENTION_FUNCTIONS,
    DynamicCache,
    LlamaForCausalLM,
    LlamaModel,
    eager_attention_forward,
    repeat_kv,
    rotate_half,
)
from prismatic.models.sequence import Sequence, take_rows
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
    select: Callable[..., TokenSelection],
    places: Callable[[Sequence], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Sequence, TokenSelection]:
    """As `run_llama`, but visual rows are dropped before layer `layer` (0, 1, ...).

    Args:
        model: the decoder without the LM head.
        sequence: with all visual tokens.
        layer: the first that runs over the kept tokens only.
        select: hidden rows of the visual tokens (B, V, D) and of the context (B, C, D) -> the tokens that stay. It is
            also given `attention`, which computes what the layer before gave each visual token
            (`attention_received`).
        places: (B, R) of the rows that are read in the sequence that is left; None: all are.

    Returns:
        Hidden rows (B, S' or R, D) after the final norm, the sequence that they belong to, and the selection.
    """
    before = dataclasses.replace(sequence, embeddings=_run_layers(model, model.layers[: layer - 1], sequence))
    hidden = _run_layers(model, model.layers[layer - 1 : layer], before)
    _, visual, context = sequence.split(hidden)
    selection = select(visual, context, attention=partial(attention_received, model, layer - 1, before))
    narrowed = sequence.narrow(hidden, selection)
    if places is not None:
        return _run_reading(model, layer, narrowed, places(narrowed)), narrowed, selection
    return model.norm(_run_layers(model, model.layers[layer:], narrowed)), narrowed, selection


def called_in_parts(num_layers: int, pruned_before: int | None) -> set[int]:
    """Layers (0, 1, ...) whose parts are called beside the layer, or in its place, in training.

    The last, of which few rows are read; and, where tokens are dropped before layer `pruned_before`, the one that says
    what each received.
    """
    return {num_layers - 1, *([] if pruned_before is None else [pruned_before - 1])}


def run_llama_reading(model: LlamaModel, sequence: Sequence, places: torch.Tensor) -> torch.Tensor:
    """As `run_llama`, but only the rows at places (B, R) leave the last layer: (B, R, D).

    The other rows are its keys and values alone: no query, MLP or norm is computed that nobody reads.
    """
    return _run_reading(model, 0, sequence, places)


@dataclass
class VisualMemory:
    """What a sample's visual tokens left in a pass of the language model, for the next query of its session.

    Attributes:
        tokens: (V, D) that went in, each when it was last computed.
        keys, values: per layer (H, V, d) of then, keys turned by their positions.
        attention: (V,) what the context gave each in the last query.
    """

    tokens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    attention: torch.Tensor


def run_llama_reusing(
    model: LlamaModel,
    sequence: Sequence,
    selection: TokenSelection,
    memories: list[VisualMemory | None],
    attention_layer: int | None = None,
) -> tuple[torch.Tensor, Sequence, list[VisualMemory]]:
    """As `run_llama`, but only selected visual rows are computed; the others' keys and values are remembered ones.

    Args:
        model: the decoder without the LM head.
        sequence: with all visual tokens.
        selection: those computed anew; all of them for a sample without a memory.
        memories: one per sample, of the query before.
        attention_layer: whose attention to the visual tokens is remembered; None: the middle one.

    Returns:
        Hidden rows (B, S', D) after the final norm, the sequence of computed rows that they belong to, and what is to
        be remembered of each sample.
    """
    _, tokens, _ = sequence.split(sequence.embeddings)
    computed = sequence.narrow(sequence.embeddings, selection)
    context = slice(1 + computed.num_visual, None)
    hidden, keys = computed.embeddings, _ReusedKeys(selection, memories)
    mask = attention_mask(sequence.key_bias, hidden)
    rotary = model.rotary_emb(hidden, position_ids=computed.position_ids)
    block: Any
    for number, block in enumerate(model.layers):
        before = hidden
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary, **{_CACHE: keys})
        if number == (len(model.layers) // 2 if attention_layer is None else attention_layer):
            rows = block.self_attn.q_proj(block.input_layernorm(before[:, context]))
            queries = _heads(block.self_attn, rows, (rotary[0][:, context], rotary[1][:, context]))
            received = _mean_attention(block.self_attn, queries, keys.last, sequence)
    old = [None if memory is None else memory.tokens for memory in memories]
    tokens = keys.complete(old, selection.tokens.to(tokens.dtype))
    left = zip(tokens, zip(*keys.keys, strict=True), zip(*keys.values, strict=True), received, strict=True)
    return model.norm(hidden), computed, [VisualMemory(t, list(k), list(v), a) for t, k, v, a in left]


class _ReusedKeys:
    """Stands where a layer expects a cache: gives its attention the keys and values of all visual tokens.

    Attributes:
        last: (B, H, S, d) all keys of the layer that ran last.
        keys, values: of the layers that ran, (B, H, V, d) of the visual tokens.
    """

    def __init__(self, selection: TokenSelection, memories: list[VisualMemory | None]) -> None:
        self._selection, self._memories = selection, memories
        # Padding is written behind the last token, and cut off.
        self._place = selection.index.masked_fill(~selection.valid, selection.num_visual)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of BOS, of the selected visual tokens and of the context -> rows of the whole sequence."""
        last, kept = 1 + self._selection.index.shape[1], []
        for rows, remembered in ((keys, "keys"), (values, "values")):
            old = [None if memory is None else getattr(memory, remembered)[layer] for memory in self._memories]
            visual = self.complete(old, rows[:, :, 1:last])
            getattr(self, remembered).append(visual)
            kept.append(torch.cat([rows[:, :, :1], visual, rows[:, :, last:]], dim=2))
        self.last = kept[0]
        return kept[0], kept[1]

    def complete(self, old: list[torch.Tensor | None], rows: torch.Tensor) -> torch.Tensor:
        """Rows of all tokens (B, ..., V, d), from remembered ones (..., V, d) and computed ones (B, ..., K, d)."""
        shape = (*rows.shape[1:-2], self._selection.num_visual, rows.shape[-1])
        base = torch.stack([rows.new_zeros(shape) if before is None else before for before in old])
        place = self._place.reshape(len(rows), *[1] * (rows.ndim - 3), -1, 1).expand_as(rows)
        return F.pad(base, (0, 0, 0, 1)).scatter_(-2, place, rows)[..., :-1, :]


def attention_received(model: LlamaModel, layer: int, sequence: Sequence) -> torch.Tensor:
    """How much the context attends to each visual token in a layer, from that layer's own projections.

    Args:
        model: the decoder without the LM head.
        layer: its number.
        sequence: whose embeddings are the hidden rows that go into the layer.

    Returns:
        (B, V) float32: softmax weights, averaged over heads and over the rows of the context that are no padding.
    """
    block: Any = model.layers[layer]
    hidden = block.input_layernorm(sequence.embeddings)
    rotary = model.rotary_emb(hidden, position_ids=sequence.position_ids)
    keys = _heads(block.self_attn, block.self_attn.k_proj(hidden), rotary)
    context = slice(1 + sequence.num_visual, None)
    in_context = (rotary[0][:, context], rotary[1][:, context])
    queries = _heads(block.self_attn, block.self_attn.q_proj(hidden[:, context]), in_context)
    return _mean_attention(block.self_attn, queries, keys, sequence)


def _heads(attention: Any, rows: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Projected rows (B, R, H * d) -> turned by their positions, (B, H, R, d)."""
    cos, sin = (part[:, None] for part in rotary)
    x = rows.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    return x * cos + rotate_half(x) * sin


def _mean_attention(attention: Any, queries: torch.Tensor, keys: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Of the context's queries (B, H, C, d) to the visual ones of all keys (B, H', S, d): (B, V)."""
    bias, first = sequence.key_bias, 1 + sequence.num_visual
    keys = repeat_kv(keys, attention.num_key_value_groups).float()  # in bfloat16 weights would tie
    logits = queries.float() @ keys.transpose(2, 3) * attention.scaling
    weights = (logits + bias[:, None, None]).softmax(-1)[..., 1:first].mean(1)
    counts = (bias[:, first:] > float("-inf")).to(weights.dtype)
    return (weights * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)


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
    dtype = compute_dtype(embeddings)
    bias = key_bias.clamp(min=torch.finfo(dtype).min).to(dtype)[:, None, None, :]
    return bias.expand(-1, 1, embeddings.shape[1], -1)


def compute_dtype(values: torch.Tensor) -> torch.dtype:
    """What products of `values` are computed in: under autocast its dtype."""
    device = values.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # which knows no meta device
    return torch.get_autocast_dtype(device) if autocast else values.dtype


def plain_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' eager attention without its copies: scaled before the product, softmax in the values' own dtype.

    (torch's softmax of bfloat16 computes in float32 inside.) In bfloat16 on CPUs the quickest one: half of all casts of
    a training step were those of the scores.

    Args:
        module: its `num_key_value_groups`.
        query: (B, heads, Q, d).
        key: (B, key heads, S, d).
        value: as `key`.
        attention_mask: (B, 1, Q, S), float.
        scaling: of the scores.

    Returns:
        (B, Q, heads, d), and no weights.
    """
    if (groups := module.num_key_value_groups) != 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = (query * scaling) @ key.transpose(2, 3)
    scores += attention_mask  # a product needs its outcome no more
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


PLAIN = "plain"
"""The name under which transformers knows `plain_attention`."""
ALL_ATTENTION_FUNCTIONS.register(PLAIN, plain_attention)


def share_casts(model: LlamaModel) -> None:
    """Have autocast round what a norm returns once, instead of once for each of the two or three layers that take it.

    Nothing changes without autocast, nor where norms return bfloat16 already.
    """

    def rounded(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.to(compute_dtype(output))

    layers: Any = model.layers
    for layer in layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(rounded)


def _rotary(model: LlamaModel, sequence: Sequence) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = model.rotary_emb(sequence.embeddings, position_ids=sequence.position_ids)
    dtype = compute_dtype(sequence.embeddings)  # as a model that holds bfloat16 has them
    return cos.to(dtype), sin.to(dtype)


def _run_layers(model: LlamaModel, layers: Iterable[nn.Module], sequence: Sequence) -> torch.Tensor:
    """What `LlamaModel.forward` does with its layers; gradient checkpointing is each layer's own."""
    hidden = sequence.embeddings
    mask = attention_mask(sequence.key_bias, hidden)
    rotary = _rotary(model, sequence)
    for decoder_layer in layers:
        hidden = decoder_layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden


def _run_reading(model: LlamaModel, first: int, sequence: Sequence, places: torch.Tensor) -> torch.Tensor:
    hidden = _run_layers(model, model.layers[first:-1], sequence)
    layer: Any = model.layers[-1]
    mask = attention_mask(sequence.key_bias, hidden)[:, :, : places.shape[1]]
    last = partial(_last_layer, layer, places=places, mask=mask, rotary=_rotary(model, sequence))
    repeats = layer.gradient_checkpointing and layer.training
    return model.norm(checkpoint(last, hidden, use_reentrant=False) if repeats else last(hidden))


def _last_layer(
    layer: Any,
    hidden: torch.Tensor,
    places: torch.Tensor,
    mask: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """What `LlamaDecoderLayer.forward` does, for the queries at places (B, R) alone."""
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)

    in_places = (take_rows(rotary[0], places), take_rows(rotary[1], places))
    queries = _heads(attention, attention.q_proj(take_rows(normed, places)), in_places)
    keys = _heads(attention, attention.k_proj(normed), rotary)
    values = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    read, _ = attend(attention, queries, keys, values, mask, scaling=attention.scaling)
    rows = take_rows(hidden, places) + attention.o_proj(read.flatten(2))
    return rows + layer.mlp(layer.post_attention_layernorm(rows))
