"""LightVLA*: selection inside the ViTs, behind the projector and inside the LLM, against code that prunes by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.pruners.learnable_queries import LearnableQueries, score_by_queries
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.sites import Projector, Site
from prismatic.models.token_pruner import TokenSelection, gather_tokens, rms_normalize, select_tokens

SITES = ("site=projector", "site=vision,layer=0", "site=vision,layer=1", "site=llama,layer=1", "site=llama,layer=2")
ONE_OF_EACH = (SITES[0], SITES[2], SITES[3])
TOKENS = 32  # two images of 16 patches
LENGTHS = (9, 14, 11, 8)


def load(folder: Path, pruner: str) -> OpenVLAForActionPrediction:
    options = LoadOptions(dtype=torch.float32, pruner=PrunerSpec.parse(pruner), new_pruner=True)
    return load_checkpoint(folder, options).model.eval()


def ragged_batch(model: OpenVLAForActionPrediction, size: int = len(LENGTHS)) -> dict[str, torch.Tensor]:
    lengths = torch.tensor(LENGTHS[:size])
    side = model.config.image_sizes[0]
    return {
        "input_ids": torch.randint(10, 200, (size, max(LENGTHS))),
        "attention_mask": torch.arange(max(LENGTHS))[None] < lengths[:, None],
        "pixel_values": torch.randn(size, 2 * model.vision_backbone.channels_per_image, side, side),
    }


def site_tokens(model: OpenVLAForActionPrediction, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the pruner sees at its site, (B, V, D)."""
    seen = []
    handle = model.pruner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.action_hidden(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_batch_equals_its_samples(bases, fused, site):
    model = load(bases[fused], f"lightvla_star:{site},queries=9")
    batch = ragged_batch(model)
    together = model.action_hidden(**batch)
    assert len(set(together.selection.distinct().tolist())) > 1, "the samples should keep different numbers of tokens"
    for row, length in enumerate(LENGTHS):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        one["input_ids"], one["attention_mask"] = one["input_ids"][:, :length], one["attention_mask"][:, :length]
        alone = model.action_hidden(**one)
        assert torch.equal(alone.selection.kept()[0], together.selection.kept()[row])
        torch.testing.assert_close(alone.rows[0], together.rows[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_query_picks_its_best_token():
    queries, patches = torch.randn(7, 16), torch.randn(3, 20, 16)
    pruner = LearnableQueries(Projector(), 7, 16).eval()
    pruner.queries.copy_(queries)
    selection = pruner(patches)
    for row in range(3):
        products = [rms_normalize(query) @ rms_normalize(patch) for query in queries for patch in patches[row]]
        scores = torch.stack(products).reshape(7, 20) / 16**0.5
        torch.testing.assert_close(score_by_queries(queries, patches)[row], scores)
        kept = sorted(set(scores.argmax(1).tolist()))
        assert selection.index[row][selection.valid[row]].tolist() == kept
        torch.testing.assert_close(selection.tokens[row, : len(kept)], patches[row, kept])
        torch.testing.assert_close(selection.scores[row], scores.max(0).values)
    assert pruner.train()(patches).scores is None
    assert (selection.key_bias()[selection.valid] == 0).all(), "a set: the number of picks does not weigh"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_with_everything_kept_nothing_changes(bases, fused, site, training):
    unpruned = load(bases[fused], "none").train(training)
    batch = ragged_batch(unpruned)
    expected = unpruned.action_hidden(**batch)
    model = load(bases[fused], f"lightvla_star:{site},queries=3,min_tokens={TOKENS}").train(training)
    actual = model.action_hidden(**batch)
    assert actual.selection.kept().all()
    assert torch.equal(actual.position_ids, expected.position_ids)
    torch.testing.assert_close(actual.rows, expected.rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ONE_OF_EACH)
@torch.no_grad()
def test_queries_that_want_one_token_each_keep_all(bases, site):
    model = load(bases[True], f"lightvla_star:{site},queries={TOKENS}")
    batch = ragged_batch(model, 1)
    model.pruner.queries.copy_(site_tokens(model, batch)[0])
    actual = model.action_hidden(**batch)
    assert actual.selection.kept().all()
    expected = load(bases[True], "none").action_hidden(**batch)
    torch.testing.assert_close(actual.rows, expected.rows, atol=1e-5, rtol=1e-5)


def features_by_hand(model: OpenVLAForActionPrediction, images: torch.Tensor, block: int, kept: torch.Tensor):
    """Of one sample: images one by one, patches taken out before the next block, nothing padded or masked."""
    backbone, parts = model.vision_backbone, []
    for image, keep in zip(images, kept.reshape(len(images), -1), strict=True):
        streams = []
        for vit, channels in zip(backbone.vits, image.split(3), strict=True):
            x = vit.norm_pre(vit._pos_embed(vit.patch_embed(channels[None])))
            for number, layer in enumerate(vit.blocks[:-1]):
                x = layer(x)
                if number == block:
                    prefix = torch.ones(vit.num_prefix_tokens, dtype=torch.bool)
                    x = x[:, torch.cat([prefix, keep])]
            streams.append(x[0, vit.num_prefix_tokens :])
        parts.append(torch.cat(streams, dim=-1))
    return torch.cat(parts)


@pytest.mark.parametrize("fused_attention", [False, True])
@pytest.mark.parametrize(("block", "queries"), [(0, 1), (1, 1), (1, 6)])
@torch.no_grad()
def test_vision_blocks_run_over_kept_patches_alone(reference_checkpoint: Checkpoint, block, queries, fused_attention):
    """ViTs with LayerScale and registers, and without prefix tokens; with one query an image keeps nothing."""
    model = reference_checkpoint.model.eval()
    for layer in (layer for vit in model.vision_backbone.vits for layer in vit.blocks):
        layer.attn.fused_attn = fused_attention
    model.set_pruner(PrunerSpec.parse(f"lightvla_star:site=vision,layer={block},queries={queries}"))
    pixels = torch.randn(2, 12, 224, 224)
    selection = model.encode_visual(pixels)
    per_image = selection.kept().unflatten(1, (2, -1)).sum(-1)
    assert (per_image == 0).any() == (queries == 1)
    for row in range(2):
        features = features_by_hand(model, pixels[row].unflatten(0, (2, 6)), block, selection.kept()[row])
        actual = selection.tokens[row][selection.valid[row]]
        torch.testing.assert_close(actual, model.projector(features), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused_attention", [False, True])
def test_an_image_that_keeps_nothing_leaves_the_gradients_finite(reference_checkpoint: Checkpoint, fused_attention):
    model = reference_checkpoint.model.train()
    for layer in (layer for vit in model.vision_backbone.vits for layer in vit.blocks):
        layer.attn.fused_attn = fused_attention
    model.set_pruner(PrunerSpec.parse("lightvla_star:site=vision,layer=0,queries=1"))
    model.encode_visual(torch.randn(1, 12, 224, 224)).tokens.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 20 and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_dropping_rows_inside_the_llm_equals_hiding_them(bases, layer):
    model = load(bases[False], f"lightvla_star:site=llama,layer={layer},queries=6")
    batch = ragged_batch(model)
    pruned = model.action_hidden(**batch)
    llama = model.language_model.model
    hidden_keys = torch.cat([torch.zeros(4, 1, dtype=torch.bool), ~pruned.selection.kept()], dim=1)

    def hide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"].clone()
        mask[..., : 1 + TOKENS].masked_fill_(hidden_keys[:, None, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    for block in llama.layers[layer:]:
        block.register_forward_pre_hook(hide, with_kwargs=True)
    model.set_pruner(PrunerSpec("none"))
    torch.testing.assert_close(pruned.rows, model.action_hidden(**batch).rows, atol=1e-5, rtol=1e-5)
    kept = pruned.selection.index[0][pruned.selection.valid[0]]
    assert pruned.position_ids[0, 1 : 1 + len(kept)].tolist() == (1 + kept).tolist()
    assert pruned.position_ids[0, 1 + pruned.selection.index.shape[1]] == 1 + TOKENS


@pytest.mark.parametrize("site", SITES)
def test_a_gradient_reaches_every_query(bases, site):
    model = load(bases[True], f"lightvla_star:{site},queries=6").train()
    batch = ragged_batch(model)
    rows = model.action_hidden(**batch, score_noise=torch.rand(4, 6, TOKENS)).rows
    rows.square().sum().backward()
    gradient = model.pruner.queries.grad
    assert gradient is not None and torch.isfinite(gradient).all() and (gradient.abs().amax(1) > 0).all()


@pytest.mark.parametrize("site", ["site=llama,layer=1", "site=projector"])
def test_gradient_checkpointing_changes_no_gradient(bases, site):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = load(bases[False], f"lightvla_star:{site},queries=6").train()
        if checkpointing:
            language_model: Any = model.language_model
            getattr(language_model, "activation_checkpointing_enable", language_model.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in model.language_model.model.layers)
        model.action_hidden(**ragged_batch(model)).rows.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1]) and "pruner.queries" in gradients[0]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-5, rtol=1e-4)


class _Oracle(nn.Module):
    """Keeps the one token per sample that it is told."""

    def __init__(self, site: Site, wanted: torch.Tensor) -> None:
        super().__init__()
        self.site, self.wanted = site, wanted

    def forward(self, patches: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> TokenSelection:
        return select_tokens(patches, nn.functional.one_hot(self.wanted, TOKENS).float()[:, None])


class _Cut(LearnableQueries):
    """The picks without their straight-through gradient."""

    def forward(self, patches: torch.Tensor, *args: torch.Tensor | None) -> TokenSelection:
        selection = super().forward(patches, *args)
        selection.tokens = gather_tokens(patches, selection.index, selection.valid)
        return selection


def marked_images(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright patch per sample, in either image, and which of the visual tokens it is."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(TOKENS, (size,), generator=generator)
    pixels = 0.5 * torch.randn(size, 6, 64, 64, generator=generator)
    for row, token in enumerate(wanted.tolist()):
        image, top, left = token // 16, token % 16 // 4 * 16, token % 4 * 16
        pixels[row, 3 * image : 3 * image + 3, top : top + 16, left : left + 16] = 2.0
    return pixels, wanted


def share_found(model: OpenVLAForActionPrediction) -> float:
    """Of new samples, those whose bright patch is kept."""
    pixels, wanted = marked_images(64, seed=1)
    ids = torch.full((64, 9), 20)
    with torch.no_grad():
        kept = model.eval().action_hidden(ids, torch.ones_like(ids), pixels).selection.kept()
    return kept.gather(1, wanted[:, None]).float().mean().item()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("site", ONE_OF_EACH)
def test_queries_learn_to_keep_what_the_task_needs(bases, site, cut):
    """The rows to be reproduced are those of a model that keeps the bright patch alone."""
    model = load(bases[False], f"lightvla_star:{site},queries=2")
    model.requires_grad_(False)
    pixels, wanted = marked_images(32, seed=0)
    ids = torch.full((32, 9), 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    student: nn.Module = (_Cut if cut else LearnableQueries)(model.site, 2, model.pruner.queries.shape[1])
    model.pruner = _Oracle(model.site, wanted)
    with torch.no_grad():
        target = model.action_hidden(**batch).rows
    model.pruner = student
    assert share_found(model) < 0.1
    model.train()
    scale = nn.Parameter(torch.ones(()))  # trained too, so that there is a gradient without the queries' own
    optimizer = torch.optim.Adam([student.queries, scale], lr=5e-3)
    for step in range(60):
        noise = torch.rand(32, 2, TOKENS) * (1 - step / 60)
        loss = (scale * model.action_hidden(**batch, score_noise=noise).rows - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert share_found(model) < 0.1 if cut else share_found(model) > 0.7
