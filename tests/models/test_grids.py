"""The fixed-K differentiable sampler: against torch's own bilinear sampling, and what it learns."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.models.pruners.grids import GridSampler
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.sites import ModelSizes
from prismatic.models.token_pruner import rms_normalize

TOKENS, LENGTHS = 32, (9, 14, 11)
SIZES = ModelSizes(num_images=2, grid=(4, 4), vision_dim=48, vision_blocks=3, llm_dim=16, llm_layers=4)


def sampler(number, seed=0):
    """One that has been moved away from its anchors."""
    torch.manual_seed(seed)
    pruner = GridSampler(number, SIZES).double()
    nn.init.normal_(pruner.queries)
    nn.init.normal_(pruner.from_context)
    return pruner


@pytest.mark.parametrize("number", [1, 5, 16])
def test_points_are_placed_and_sampled_as_torch_samples(number):
    pruner = sampler(number)
    patches, context = torch.randn(3, TOKENS, 16).double(), torch.randn(3, 6, 16).double()
    mask = torch.arange(6)[None] < torch.tensor([6, 4, 2])[:, None]
    selection = pruner(patches, context, mask)
    assert selection.tokens.shape == (3, number, 16) and selection.num_visual == TOKENS
    images = [image for image, share in enumerate(((number + 1) // 2, number // 2)) for _ in range(share)]
    for row in range(3):
        pooled = rms_normalize(context[row, mask[row]]).mean(0)
        for k, image in enumerate(images):
            own = patches[row, 16 * image : 16 * image + 16]
            query = pruner.queries[k] + pruner.from_context @ pooled
            anchor = divmod(pruner.anchors[k] % 16, 4)
            logits = [
                query @ (pruner.from_patches @ rms_normalize(patch)) / 16**0.5
                - pruner.closeness[k] * ((place // 4 - anchor[0]) ** 2 + (place % 4 - anchor[1]) ** 2)
                for place, patch in enumerate(own)
            ]
            shares = torch.stack(logits).softmax(0)
            down = sum(share * (place // 4) for place, share in enumerate(shares))
            across = sum(share * (place % 4) for place, share in enumerate(shares))
            where = (torch.stack([across, down]) * 2 + 1) / 4 - 1  # grid_sample's: -1 and 1 are the image's borders
            plane = own.T.reshape(1, 16, 4, 4)
            expected = F.grid_sample(plane, where.reshape(1, 1, 1, 2), align_corners=False, padding_mode="border")
            torch.testing.assert_close(selection.tokens[row, k], expected.flatten())
            nearest = 16 * image + 4 * round(down.item()) + round(across.item())
            assert selection.index[row, k] == nearest and selection.kept()[row, nearest]
    assert 0 < selection.distinct().max() <= number


def test_new_points_lie_near_their_anchors():
    pruner = GridSampler(8, SIZES)
    points = pruner.place(torch.randn(2, TOKENS, 16), torch.randn(2, 3, 16), None)
    anchors = torch.tensor([divmod(place % 16, 4) for place in pruner.anchors])
    assert ((points - anchors).abs() < 1).all()


def ragged_batch(model, size=3):
    return {
        "input_ids": torch.randint(10, 200, (size, max(LENGTHS))),
        "attention_mask": torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None],
        "pixel_values": torch.randn(size, 2 * model.vision_backbone.channels_per_image, 64, 64),
    }


def load(folder, pruner):
    options = LoadOptions(dtype=torch.float32, pruner=PrunerSpec.parse(pruner), new_pruner=True)
    return load_checkpoint(folder, options).model.eval()


@torch.no_grad()
def test_a_batch_equals_its_samples(bases):
    model = load(bases[False], "grids:tokens=5")
    batch = ragged_batch(model)
    together = model.action_hidden(**batch)
    for row, length in enumerate(LENGTHS):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        one["input_ids"], one["attention_mask"] = one["input_ids"][:, :length], one["attention_mask"][:, :length]
        alone = model.action_hidden(**one)
        assert torch.equal(alone.selection.index[0], together.selection.index[row])
        torch.testing.assert_close(alone.rows[0], together.rows[row], atol=1e-5, rtol=1e-5)


def test_its_options(small_base):
    assert resolve_pruner("grids", {"name": "lightvla", "multiplicity": "set"}, "training").to_json() == {
        "name": "grids",
        "tokens": 16,
    }
    recorded = {"name": "grids", "tokens": 4}
    assert resolve_pruner("grids", recorded, "inference").options == {"tokens": 4}
    four, sixteen = PrunerSpec("grids", {"tokens": 4}), PrunerSpec("grids")
    assert (
        four.has_parameters and not four.shares_parameters(sixteen) and not four.shares_parameters(PrunerSpec("grid"))
    )
    with pytest.raises(ValueError, match="grids:tokens=99: tokens=99 is more than the 32 visual tokens there are"):
        load(small_base, "grids:tokens=99")


def marked(size, seed):
    """Tokens of noise, one of which, anywhere in either image, is marked and holds the number that is asked for."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(size, TOKENS, 16, generator=generator)
    wanted = torch.randint(TOKENS, (size,), generator=generator)
    value = torch.rand(size, generator=generator) * 2 - 1
    patches[torch.arange(size), wanted, 0] = 4.0
    patches[:, :, 1] = torch.rand(size, TOKENS, generator=generator) * 2 - 1
    patches[torch.arange(size), wanted, 1] = value
    return patches, wanted, value


@pytest.mark.parametrize("is_trained", [True, False], ids=["learns", "control"])
def test_points_learn_to_look_where_the_task_needs_it(is_trained):
    """A reader of the K sampled tokens must tell the number on the marked one; the control's points stay put."""
    torch.manual_seed(0)
    pruner = GridSampler(4, SIZES).requires_grad_(is_trained)
    reader = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 2))
    parameters = [*pruner.parameters(), *reader.parameters()] if is_trained else reader.parameters()
    optimizer = torch.optim.Adam(parameters, lr=1e-2)

    def error(patches, value):
        told, weight = reader(pruner(patches, torch.ones(len(patches), 1, 16)).tokens).unbind(-1)
        return ((told * weight.softmax(1)).sum(1) - value).square().mean()

    for step in range(400):
        patches, _, value = marked(128, step)
        optimizer.zero_grad()
        error(patches, value).backward()
        optimizer.step()
    patches, wanted, value = marked(512, 10**6)
    with torch.no_grad():
        share = (pruner(patches, torch.ones(512, 1, 16)).index == wanted[:, None]).any(1).float().mean().item()
        left = error(patches, value).item() / value.var().item()
    if is_trained:
        assert share > 0.9 and left < 0.3, (share, left)
    else:
        assert share < 0.2 and left > 0.7, (share, left)
