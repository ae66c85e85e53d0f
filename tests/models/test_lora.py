import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import nn

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.lora import attach_lora, lora_targets, merged_weights, save_adapter


def load(directory: Path) -> OpenVLAForActionPrediction:
    return load_checkpoint(directory, LoadOptions(dtype=torch.float32)).model


def rows(model: OpenVLAForActionPrediction) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(300, 400, (2, 9), generator=generator)
    size = model.config.image_sizes[0]
    pixels = torch.randn(2, 2 * model.vision_backbone.channels_per_image, size, size, generator=generator)
    with torch.no_grad():
        return model.action_hidden(ids, torch.ones_like(ids), pixels).rows


def stir(model: OpenVLAForActionPrediction) -> None:
    """Give the adapters an effect, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)


def test_targets_are_the_layers_that_actions_depend_on(small_base: Path):
    names = lora_targets(load(small_base))
    ends = {name.rpartition(".")[2] for name in names}
    assert ends == {
        "qkv", "proj", "fc1", "fc2", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert "vision_backbone.featurizer.patch_embed.proj" in names
    assert not [name for name in names if "blocks.1." in name or "lm_head" in name], "the last block is never run"


def test_adapters_start_as_the_identity_and_are_all_that_trains(small_base: Path):
    model = load(small_base)
    before = rows(model)
    config = attach_lora(model, rank=4)
    assert torch.equal(rows(model), before)
    assert config.lora_alpha == 4 and attach_lora(load(small_base), rank=32).lora_alpha == 16
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


KINDS = {"linear": (nn.Linear(6, 5), (3, 4, 6)), "convolution": (nn.Conv2d(2, 5, 2, 2), (3, 2, 8, 8))}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_layer_is_pefts_with_fewer_copies(kind):
    """rank 32 scales by 0.5, which is exact: the rows are PEFT's own to the bit, in bfloat16, too."""
    layer, shape = KINDS[kind]
    ours = nn.Sequential(copy.deepcopy(layer))
    ours.config, ours.vision_backbone = SimpleNamespace(action_head="discrete"), SimpleNamespace(unused_modules=list)
    attach_lora(ours, rank=32)
    nn.init.normal_(ours[0].lora_B["default"].weight)
    theirs = copy.deepcopy(ours)
    theirs[0].__class__ = type(ours[0]).__mro__[2]
    assert type(theirs[0]).__module__.startswith("peft.") and type(ours[0]) is not type(theirs[0])

    def run(model: nn.Module, x: torch.Tensor, bf16: bool) -> tuple[torch.Tensor, bool]:
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            rows = model(x)
        wide = [tensor.data_ptr() for tensor in kept if tensor.shape[-1] == shape[-1] and tensor.numel() == x.numel()]
        return rows, bool(wide) and set(wide) == {x.data_ptr()}

    x = torch.randn(shape)
    exact, _ = run(ours, x, False)
    torch.testing.assert_close(exact, run(theirs, x, False)[0], rtol=1e-5, atol=1e-6)
    half = x.bfloat16().requires_grad_()
    (rows, shares), (expected, copies) = run(ours, half, True), run(theirs, half, True)
    assert torch.equal(rows, expected) and rows.dtype == torch.bfloat16
    assert shares and not copies, "what the backward pass keeps is the input, and PEFT's a copy of it"


def test_merging_keeps_the_outputs_and_gives_everything_back(small_base: Path):
    published = list(load(small_base).state_dict())
    model = load(small_base)
    attach_lora(model, rank=4)
    stir(model)
    with_adapters = rows(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value.make() for name, value in merged_weights(model).items()}
    after = model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert list(weights) == published, "in the order of a model without adapters"
    plain = load(small_base)
    plain.load_state_dict(weights)
    torch.testing.assert_close(rows(plain), with_adapters, atol=1e-4, rtol=1e-4)


def test_merged_weights_can_be_of_given_copies_while_training_goes_on(small_base: Path):
    model = load(small_base)
    attach_lora(model, rank=4)
    stir(model)
    expected = {name: value.make() for name, value in merged_weights(model).items()}
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    lazy = merged_weights(model, trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert {name: (value.shape, value.dtype) for name, value in lazy.items()} == {
        name: (value.shape, value.dtype) for name, value in expected.items()
    }
    assert all(torch.equal(value.make(), expected[name]) for name, value in lazy.items())


# PEFT asks transformers for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_saved_adapter_is_one_that_peft_loads(small_base: Path, tmp_path: Path):
    model = load(small_base)
    config = attach_lora(model, rank=4)
    stir(model)
    save_adapter(model, config, tmp_path, base=str(small_base))
    reloaded = PeftModel.from_pretrained(load(small_base), str(tmp_path))
    assert torch.equal(rows(reloaded.base_model.model), rows(model))
