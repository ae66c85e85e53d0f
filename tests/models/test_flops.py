"""The formulas against torch's own counter over the real forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prismatic.models.flops import count_flops
from prismatic.models.pruners.registry import PrunerSpec


@pytest.mark.parametrize(
    "pruner",
    [
        "lightvla",
        "none",
        "lightvla_star:queries=40",
        "lightvla_star:queries=40,min_tokens=50,site=vision,layer=0",
        "lightvla_star:queries=1,site=vision,layer=1",
        "lightvla_star:queries=40,site=llama,layer=1",
        "lightvla_star:queries=40,site=llama,layer=3",
    ],
)
def test_count_equals_the_flop_counter(reference_checkpoint, pruner):
    model = reference_checkpoint.model.eval()
    model.language_model.set_attn_implementation("eager")
    for vit in model.vision_backbone.vits:
        for block in vit.blocks:
            block.attn.fused_attn = False
    model.set_pruner(PrunerSpec.parse(pruner))
    ids = torch.tensor([[1, *range(300, 333), 29871]])
    head, projector = reference_checkpoint.action_head, reference_checkpoint.proprio_projector
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model.action_hidden(ids, torch.ones_like(ids), torch.randn(1, 12, 224, 224), torch.zeros(1, 8), projector)
        head.predict_action(out.rows)
    kept = out.selection.kept()[0].unflatten(0, (2, -1)).sum(1).tolist() if pruner != "none" else None
    count = count_flops(model, head, projector, kept, prompt_tokens=ids.shape[1])
    # Older transformers turn the positions into angles by a matrix product, which is left out.
    names = ("LlamaModel.rotary_emb", "LlamaRotaryEmbedding")
    rotary = sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name in names)
    assert count.total == counter.get_total_flops() - rotary
    if kept is not None and "vision" not in pruner:
        assert count_flops(model, head, projector, sum(kept), prompt_tokens=ids.shape[1]) == count


def test_the_earlier_tokens_are_dropped_the_less_there_is_to_do(reference_checkpoint):
    model = reference_checkpoint.model
    sites = ("site=vision,layer=0", "site=vision,layer=1", "site=projector", "site=llama,layer=1", "site=llama,layer=3")
    totals = []
    for site in sites:
        model.set_pruner(PrunerSpec.parse(f"lightvla_star:{site},queries=40"))
        count = count_flops(model, None, None, 40)
        totals.append(count.total - count.pruner)
    assert totals == sorted(totals) and len(set(totals)) == len(totals)
    assert totals[-1] < count_flops(model, None, None, None).total
