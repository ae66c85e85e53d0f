"""LightVLA*: selection inside the ViTs, behind the projector and inside the LLM, against code that prunes by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prismatic.checkpoint import Checkpoint, LoadOptions, load_checkpoint, save_checkpoint
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.learnable_queries import LearnableQueries, score_by_queries
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.sites import LlamaLayer, ModelSizes, Projector, Site, VisionBlock
from prismatic.models.token_pruner import TokenSelection, gather_tokens, rms_normalize, select_tokens
from prismatic.policy import Policy
from prismatic.vla.normalization import fit_statistics
from scripts.build_small_model import SmallModelConfig, build

SITES = ("site=projector", "site=vision,layer=0", "site=vision,layer=1", "site=llama,layer=1", "site=llama,layer=2")
ONE_OF_EACH = (SITES[0], SITES[2], SITES[3])
TOKENS = 32  # two images of 16 patches
LENGTHS = (9, 14, 11, 8)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Small checkpoints without queries, with one ViT and with two."""
    return {
        fused: build(
            SmallModelConfig(
                tmp_path_factory.mktemp("star") / "base", image_size=64, vision_dim=32, vision_depth=4, vision_heads=2,
                llm_dim=32, llm_layers=3, llm_heads=2, llm_mlp=48, fused=fused,
            )
        )
        for fused in (False, True)
    }  # fmt: skip


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


@pytest.fixture
def trained(small_base: Path, tmp_path: Path) -> Callable[[str], tuple[Checkpoint, Path]]:
    """Makes a complete policy with queries: in memory and saved."""

    def make(pruner: str) -> tuple[Checkpoint, Path]:
        spec = PrunerSpec.parse(pruner)
        checkpoint = load_checkpoint(small_base, LoadOptions(pruner=spec, new_pruner=True))
        checkpoint.action_head, checkpoint.proprio_projector = L1RegressionActionHead(32, 7, 8), ProprioProjector(32, 8)
        rng = np.random.default_rng(0)
        values = rng.uniform(-1, 1, (50, 7)), rng.uniform(-1, 1, (50, 8))
        statistics = fit_statistics(*values, checkpoint.model.robot.action_mask, 2)
        checkpoint.dataset_statistics = {"libero_test_no_noops": statistics}
        return checkpoint, save_checkpoint(tmp_path / "star--0_chkpt", checkpoint, 0)

    return make


def observation() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("full_image", "wrist_image")}
    return {**images, "state": np.zeros(8)}


@pytest.mark.parametrize("pruner", ["site=projector,queries=5,min_tokens=7", "site=llama,layer=1,queries=5,noise=none"])
def test_a_saved_policy_acts_as_before(trained, pruner):
    checkpoint, folder = trained(f"lightvla_star:{pruner}")
    key = "libero_test_no_noops"
    before = Policy(checkpoint, checkpoint.transform(key, True), key).act(observation(), "turn on the stove")
    policy = Policy.from_pretrained(folder, center_crop=True)
    output = policy.act_batch([observation()], ["turn on the stove"])
    assert np.array_equal(output.actions[0], before)
    assert {"vision", "pruner", "llm"} < set(output.timing) and min(output.timing.values()) > 0
    assert output.selection.distinct().item() < TOKENS
    assert policy.checkpoint.assumptions == []
    recorded = json.loads((folder / "config.json").read_text())["pruner"]
    assert PrunerSpec.from_json(recorded) == checkpoint.model.config.pruner_spec
    policy.set_pruner("none")
    assert policy.act_batch([observation()], ["turn on the stove"]).selection.kept().all()
    policy.set_pruner("lightvla_star")
    assert np.array_equal(policy.act(observation(), "turn on the stove"), before)


def test_queries_are_part_of_the_weights(trained, caplog):
    checkpoint, folder = trained("lightvla_star:queries=5")
    again = load_checkpoint(folder)
    assert torch.equal(again.model.pruner.queries, checkpoint.model.pruner.queries)
    direct = OpenVLAForActionPrediction.from_pretrained(folder)
    assert torch.equal(direct.pruner.queries, checkpoint.model.pruner.queries)
    caplog.clear()
    other = load_checkpoint(folder, LoadOptions(pruner=PrunerSpec("none")))
    assert "pruner.queries" not in other.model.state_dict() and not caplog.records


def test_new_queries_are_said_in_training_and_refused_in_inference(small_base, caplog):
    spec = PrunerSpec.parse("lightvla_star:queries=5")
    with pytest.raises(ValueError, match=r"holds no trained queries .*fine-tune with --pruner lightvla_star:queries=5"):
        load_checkpoint(small_base, LoadOptions(pruner=spec))
    with caplog.at_level("INFO"):
        model = load_checkpoint(small_base, LoadOptions(pruner=spec, new_pruner=True)).model
    assert [r.message for r in caplog.records] == [
        "pruner lightvla_star:queries=5: 5 queries are new, with random weights"
    ]
    assert model.pruner.queries.shape == (5, 32) and 0.01 < model.pruner.queries.std() < 0.03
    assert model.config.pruner_spec == spec


def test_a_policy_has_only_the_queries_it_loaded(trained):
    _, folder = trained("lightvla_star:site=llama,layer=1,queries=5")
    policy = Policy.from_pretrained(folder)
    with pytest.raises(ValueError, match="needs trained queries, but lightvla_star:site=llama,layer=1,queries=5 was"):
        policy.set_pruner("lightvla_star:site=projector")
    with pytest.raises(ValueError, match="'random' keeps as many tokens as LightVLA would"):
        policy.set_pruner("random")
    with pytest.raises(ValueError, match="needs trained queries, but none was loaded"):
        Policy.from_pretrained(folder, pruner="none").set_pruner("lightvla_star")
    with pytest.raises(ValueError, match=r"'pruner.queries' has shape \(5, 32\), config.json implies \(6, 32\)"):
        Policy.from_pretrained(folder, pruner="lightvla_star:queries=6")


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        ("site=head", "site=head is not one of projector, vision, llama"),
        ("site=vision", "give the layer too, site=vision,layer=2"),
        ("layer=2", "layer=2: give the site too"),
        ("site=projector,layer=2", "layer=2: give the site too"),
        ("queries=0", "queries=0: expected at least 1"),
        ("queries=many", "queries=many: expected a whole number"),
        ("multiplicity=set", "no option 'multiplicity'"),
        ("noise=pink", "noise=pink is not one of"),
    ],
)
def test_bad_flags_say_what_is_known(pruner, message):
    with pytest.raises(ValueError, match=message):
        PrunerSpec.parse(f"lightvla_star:{pruner}")


@pytest.mark.parametrize(
    ("pruner", "message"),
    [
        ("queries=33", "33 queries cannot pick more than the 32 visual tokens there are; set queries=32 or fewer"),
        ("site=vision,layer=2,queries=3", "run blocks 0 to 2, and one must be left .*; choose layer 0 to 1"),
        ("site=llama,layer=3,queries=3", "has layers 0 to 2; choose layer 1 to 2"),
        ("site=llama,layer=0,queries=3", "choose layer 1 to 2, or site=projector"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_loading(bases, tmp_path, pruner, message):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in bases[True].iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"never read")
    spec = PrunerSpec.parse(f"lightvla_star:{pruner}")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder, LoadOptions(pruner=spec, new_pruner=True))


def test_a_model_without_depth_has_no_site_inside(small_base):
    with pytest.raises(ValueError, match="run blocks 0 to 0, .*; choose site=projector"):
        load(small_base, "lightvla_star:site=vision,layer=0,queries=3")


def test_specs_declare_their_site():
    sizes = ModelSizes(num_visual=32, vision_dim=48, vision_blocks=3, llm_dim=16, llm_layers=4)
    for options, site, width in (
        ("queries=4", Projector(), 16),
        ("site=vision,layer=1,queries=4", VisionBlock(1), 48),
        ("site=llama,layer=3,queries=4", LlamaLayer(3), 16),
    ):
        spec = PrunerSpec.parse(f"lightvla_star:{options}")
        assert PrunerSpec.parse(str(spec)) == spec == PrunerSpec.from_json(spec.to_json())
        pruner = spec.build(sizes)
        assert (spec.site, pruner.site, pruner.queries.shape) == (site, site, (4, width))
    with pytest.raises(ValueError, match="build it with the model's sizes"):
        PrunerSpec.parse("lightvla_star").build()
    assert [PrunerSpec(name).build().site for name in ("lightvla", "none", "random")] == [Projector()] * 3


def test_options_left_out_follow_the_same_pruner_only():
    recorded = {"name": "lightvla_star", "site": "llama", "layer": 2, "queries": 8, "min_tokens": 3, "noise": "gumbel"}
    shared = {"site": "llama", "layer": 2, "queries": 8, "min_tokens": 3}
    assert PrunerSpec.parse("lightvla_star").following(recorded).options == shared
    moved = PrunerSpec.parse("lightvla_star:site=projector").following(recorded)
    assert moved.options == {"site": "projector", "queries": 8, "min_tokens": 3}
    assert PrunerSpec.parse("lightvla").following(recorded).options == {"multiplicity": "set"}
    weighted = {"name": "lightvla", "multiplicity": "weighted", "min_tokens": 9}
    assert PrunerSpec.parse("lightvla_star").following(weighted).options == {}
