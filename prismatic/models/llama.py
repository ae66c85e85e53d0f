"""Runs a stock Llama over a laid-out sequence with full (never causal) attention and a bias per key."""

import torch
from transformers import LlamaModel


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
    device = embeddings.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embeddings.dtype
    # A 4-D float mask is the only form that transformers adds as it is: 2-D means causal, None with gaps in the
    # positions means packed sequences.
    bias = key_bias.clamp(min=torch.finfo(dtype).min).to(dtype)[:, None, None, :]
    mask = bias.expand(-1, 1, embeddings.shape[1], -1)
    return model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
