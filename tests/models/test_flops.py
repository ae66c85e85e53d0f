"""The formulas against torch's own counter over the real forward pass."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.batch import Call, Session
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.flops import count_flops, vision_flops
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.policy import Policy


def counted(model: Any, head: Any, projector: Any) -> tuple[int, list[int], int]:
    """What torch counts of one sample's prediction, the kept tokens of each image, and the prompt's length."""
    model.eval().language_model.set_attn_implementation("eager")
    for vit in model.vision_backbone.vits:
        for block in vit.blocks:
            getattr(block, "block", block).attn.fused_attn = False
    ids = torch.tensor([[1, *range(300, 333), 29871]])
    pixels = torch.randn(1, 12, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoded = model.encode(ids, torch.ones_like(ids), pixels, torch.zeros(1, 8), projector)
        _, hidden = head.predict(model, encoded, seeds=[0])
    rotary = rotary_flops(counter)
    kept = hidden.selection.kept()[0].unflatten(0, (2, -1)).sum(1).tolist()
    return counter.get_total_flops() - rotary, kept, ids.shape[1]


def rotary_flops(counter: FlopCounterMode) -> int:
    """Older transformers turn the positions into angles by a matrix product, which `count_flops` leaves out."""
    names = (
        "LlamaModel.rotary_emb",
        "LlamaRotaryEmbedding",
    )  # by its place, or alone where layers are called one by one
    return sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name in names)


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
        "grid:tokens=40",
        "random:tokens=40",
        "text_similarity:keep=0.1",
        "divprune:tokens=40",
        "fastv:tokens=40,layer=2",
        "grids:tokens=16",
    ],
)
def test_count_equals_the_flop_counter(reference_checkpoint, pruner):
    model, head, projector = (
        reference_checkpoint.model,
        reference_checkpoint.action_head,
        reference_checkpoint.proprio_projector,
    )
    model.set_pruner(PrunerSpec.parse(pruner))
    total, kept, prompt = counted(model, head, projector)
    of = None if pruner == "none" else kept
    count = count_flops(model, head, projector, of, prompt)
    assert count.total == total
    if "vision" not in pruner:
        assert count_flops(model, head, projector, sum(kept), prompt) == count


def test_a_query_that_reuses_keys(reference_checkpoint):
    model, head = reference_checkpoint.model.eval(), reference_checkpoint.action_head
    model.language_model.set_attn_implementation("eager")
    for block in (block for vit in model.vision_backbone.vits for block in vit.blocks):
        block.attn.fused_attn = False
    model.set_pruner(PrunerSpec.parse("static_reuse:tokens=40,similarity=0.999"))
    ids, session, pixels = torch.tensor([[1, *range(300, 333), 29871]]), Session(), torch.randn(1, 12, 224, 224)
    for step in range(2):
        moved = pixels.clone()
        moved[:, :6] += step  # the first image; patches of the second look as before
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoded = model.encode(ids, torch.ones_like(ids), moved, call=Call(sessions=[session]))
            hidden = head.predict(model, encoded)[1]
        kept = int(hidden.selection.distinct())
        total = counter.get_total_flops() - rotary_flops(counter)
        assert count_flops(model, head, None, kept, ids.shape[1]).total == total
    assert 40 <= kept < hidden.selection.num_visual


@pytest.mark.parametrize("pruner", ["none", "lightvla_star:queries=40", "lightvla_star:queries=40,site=vision,layer=0"])
@pytest.mark.parametrize("kind", ["l1", "discrete", "diffusion"])
@pytest.mark.parametrize("film", [False, True])
def test_every_head_with_and_without_film(reference_checkpoint, kind, film, pruner):
    model, projector = reference_checkpoint.model, reference_checkpoint.proprio_projector
    width = model.language_model.config.hidden_size
    head: Any = model.discrete_head() if kind == "discrete" else L1RegressionActionHead(width, 7, 8)
    if kind == "diffusion":
        head = DiffusionActionHead(width, 7, 8)
        head.num_inference_steps = 3
    if film:
        model.enable_film()
    model.set_pruner(PrunerSpec.parse(pruner))
    total, kept, prompt = counted(model, head, projector)
    assert count_flops(model, head, projector, None if pruner == "none" else kept, prompt).total == total


def test_film_counts_once_per_image_not_per_patch(reference_checkpoint):
    """Two maps of the language vector in every block that runs, two operations per multiply-add."""
    model = reference_checkpoint.model
    plain = vision_flops(model.vision_backbone, 2)
    model.enable_film()
    width = model.language_model.config.hidden_size
    maps = sum(2 * width * vit.embed_dim * (len(vit.blocks) - 1) for vit in model.vision_backbone.vits)
    assert vision_flops(model.vision_backbone, 2) - plain == 2 * 2 * maps


def test_decoding_token_by_token(original_directory):
    policy = Policy.from_pretrained(original_directory)
    model, ids = policy.model, torch.tensor([[1, *range(300, 333), 29871]])
    for vit in model.vision_backbone.vits:
        for block in vit.blocks:
            block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoded = model.encode(ids, torch.ones_like(ids), torch.randn(1, 6, 224, 224))
        policy.action_head.predict(model, encoded)
    count = count_flops(model, policy.action_head, None, None, prompt_tokens=ids.shape[1])
    rotary = rotary_flops(counter)
    assert count.total == counter.get_total_flops() - rotary


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
