"""LightVLA* in checkpoints and on the command line: queries are saved and loaded, and unusable flags refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.models.sites import LlamaLayer, ModelSizes, Projector, VisionBlock
from prismatic.policy import Policy
from prismatic.vla.normalization import fit_statistics


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
    policy = Policy.from_pretrained(folder, dtype="float32", center_crop=True)
    output = policy.act_batch([observation()], ["turn on the stove"])
    assert np.array_equal(output.actions[0], before)
    assert {"vision", "pruner", "llm"} < set(output.timing) and min(output.timing.values()) > 0
    assert output.selection.distinct().item() < output.selection.num_visual
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
    with pytest.raises(
        ValueError, match=r"holds no trained parameters .*fine-tune with --pruner lightvla_star:queries=5"
    ):
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
    with pytest.raises(
        ValueError, match="needs trained parameters, but lightvla_star:site=llama,layer=1,queries=5 was"
    ):
        policy.set_pruner("lightvla_star:site=projector")
    for control in ("random", "random:draw=added", "random:draw=dropped"):
        with pytest.raises(ValueError, match="'random' goes by what LightVLA would keep, which is no control for"):
            policy.set_pruner(control)
    with pytest.raises(ValueError, match="needs trained parameters, but none was loaded"):
        Policy.from_pretrained(folder, pruner="none").set_pruner("lightvla_star")
    with pytest.raises(
        ValueError, match=r"trained with pruner .*queries=5 \(5 queries\), and .*queries=6.* \(6 queries\) is asked for"
    ):
        Policy.from_pretrained(folder, pruner="lightvla_star:queries=6")
    with pytest.raises(ValueError, match="leave the pruner out, or fine-tune with --pruner .*site=projector, or run"):
        Policy.from_pretrained(folder, pruner="lightvla_star:site=projector")


def test_another_number_of_trained_points_is_refused_and_new_in_training(trained, caplog):
    _, folder = trained("grids:tokens=4")
    with pytest.raises(ValueError) as refused:
        Policy.from_pretrained(folder, pruner="grids:tokens=6")
    assert str(refused.value) == (
        f"{folder} was trained with pruner grids:tokens=4 (4 sampled points), and grids:tokens=6 (6 sampled points) is "
        "asked for, whose parameters it does not hold; leave the pruner out, or fine-tune with --pruner "
        "grids:tokens=6, or run the checkpoint with another pruner (lightvla, none)"
    )
    caplog.clear()
    for spec in (PrunerSpec("grids", {"tokens": 6}), PrunerSpec("lightvla_star", {"queries": 5})):
        model = load_checkpoint(folder, LoadOptions(pruner=spec, new_pruner=True)).model
        assert model.config.pruner_spec == spec and len(model.pruner.queries) == spec.option("tokens", 5)
        assert "the parameters of pruner grids:tokens=4" in caplog.text and "left out" in caplog.text
        caplog.clear()


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
        spec = PrunerSpec.parse("lightvla_star:site=vision,layer=0,queries=3")
        load_checkpoint(small_base, LoadOptions(pruner=spec, new_pruner=True))


def test_specs_declare_their_site():
    sizes = ModelSizes(num_images=2, grid=(4, 4), vision_dim=48, vision_blocks=3, llm_dim=16, llm_layers=4)
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
    assert resolve_pruner("lightvla_star", recorded, "inference").options == shared
    moved = resolve_pruner("lightvla_star:site=projector", recorded, "inference")
    assert moved.options == {"site": "projector", "queries": 8, "min_tokens": 3}
    assert resolve_pruner("lightvla", recorded, "inference").options == {"multiplicity": "set"}
    weighted = {"name": "lightvla", "multiplicity": "weighted", "min_tokens": 9}
    assert resolve_pruner("lightvla_star", weighted, "inference").options == {}
