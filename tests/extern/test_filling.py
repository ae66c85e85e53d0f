"""A model filled from its files is the one that transformers loads."""

from pathlib import Path

import pytest
import torch
from reference_checkpoint import diffusion_weights, film_weights, noisy_action_weights, write_variant

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.stored_files import component_file, load_component

NO_PRUNER = PrunerSpec("none")


def assert_same_model(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Parameters and all buffers, those that no file holds too: dtypes, bits, and what is to be trained."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and value.requires_grad == theirs[name].requires_grad, name
            assert torch.equal(value, theirs[name]), name
    assert not any(module.training for module in found.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("film", [False, True])
def test_as_transformers_loads_it(reference_directory: Path, tmp_path: Path, film: bool, dtype: torch.dtype):
    folder = reference_directory
    if film:
        folder = write_variant(reference_directory, tmp_path / "film", {"vision_backbone": film_weights()})
    found = load_checkpoint(folder, LoadOptions(dtype=dtype, pruner=NO_PRUNER))
    expected = OpenVLAForActionPrediction.from_pretrained(folder, dtype=dtype, pruner="none")
    assert_same_model(found.model, expected)
    assert found.model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert found.model.config.dtype == expected.config.dtype == dtype


def test_heads_are_what_their_files_hold_and_nothing_is_drawn_for_them(reference_directory: Path, tmp_path: Path):
    parts = {"action_head": diffusion_weights(), "noisy_action_projector": noisy_action_weights()}
    folder = write_variant(reference_directory, tmp_path / "diffusion", parts)
    before = torch.get_rng_state()
    found = load_checkpoint(folder, LoadOptions(pruner=NO_PRUNER, num_diffusion_steps_train=20))
    assert torch.equal(torch.get_rng_state(), before)
    for part, prefix, module in (
        ("action_head", "noise_predictor.", found.action_head.noise_predictor),
        ("noisy_action_projector", "", found.action_head.noisy_action_projector),
        ("proprio_projector", "", found.proprio_projector),
    ):
        stored = load_component(component_file(folder, part))
        assert {prefix + name for name in module.state_dict()} == stored.keys()
        assert all(torch.equal(value, stored[prefix + name]) for name, value in module.state_dict().items())
    kept = found.action_head.scheduler.alphas_cumprod
    assert kept.device.type == "cpu" and len(kept) == 20 and (kept.diff() < 0).all()


def test_writing_to_a_loaded_weight_leaves_the_file_alone(reference_directory: Path):
    options = LoadOptions(pruner=NO_PRUNER)
    first = load_checkpoint(reference_directory, options)
    parameters = [first.model.projector.fc1.weight, first.proprio_projector.fc1.weight]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1)
    again = load_checkpoint(reference_directory, options)
    assert torch.equal(again.model.projector.fc1.weight, before[0])
    assert torch.equal(again.proprio_projector.fc1.weight, before[1])
