"""The formulas against torch's own counter over the real forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prismatic.models.flops import count_flops
from prismatic.models.token_pruner import KeepAllTokens


@pytest.mark.parametrize("pruned", [True, False])
def test_count_equals_the_flop_counter(reference_checkpoint, pruned):
    model = reference_checkpoint.model.eval()
    model.language_model.set_attn_implementation("eager")
    for vit in model.vision_backbone.vits:
        for block in vit.blocks:
            block.attn.fused_attn = False
    if not pruned:
        model.pruner = KeepAllTokens()
    ids = torch.tensor([[1, *range(300, 333), 29871]])
    head, projector = reference_checkpoint.action_head, reference_checkpoint.proprio_projector
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model.action_hidden(ids, torch.ones_like(ids), torch.randn(1, 12, 224, 224), torch.zeros(1, 8), projector)
        head.predict_action(out.rows)
    kept = int(out.selection.distinct()[0]) if pruned else None
    count = count_flops(model, head, projector, kept, prompt_tokens=ids.shape[1])
    rotary = sum(v for name, v in counter.get_flop_counts().items() if name.endswith("rotary_emb") for v in v.values())
    assert count.total == counter.get_total_flops() - rotary
