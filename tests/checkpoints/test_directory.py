"""Round trips, atomic writes, and what a user is told about a broken checkpoint."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import load_training_state, save_checkpoint
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.pruners.registry import PrunerSpec


@pytest.fixture
def broken(reference_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference_directory, tmp_path / "copy"))


def test_round_trip_is_equal_tensor_by_tensor(reference_directory, tmp_path):
    original = load_checkpoint(reference_directory, LoadOptions(pruner=PrunerSpec("lightvla")))
    directory = save_checkpoint(tmp_path / "run--100_chkpt", original, 100, training_state={"step": 100})
    again = load_checkpoint(directory)
    state = original.model.state_dict()
    stored = {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}
    published = {name for file in reference_directory.glob("*.safetensors") for name in load_file(file)}
    assert set(stored) == published, "state-dict names are exactly the published ones"
    assert all(torch.equal(stored[name], state[name]) and stored[name].dtype == state[name].dtype for name in stored)
    for part in ("action_head", "proprio_projector"):
        for name, value in getattr(original, part).state_dict().items():
            assert torch.equal(getattr(again, part).state_dict()[name], value)
    assert again.dataset_statistics == original.dataset_statistics
    assert again.model.config.pruner_spec == original.model.config.pruner_spec
    assert again.assumptions == []
    assert load_training_state(directory) == {"step": 100}
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (directory / name).read_bytes() == (reference_directory / name).read_bytes()


def test_auto_class_and_loader_agree(reference_directory):
    ours = load_checkpoint(reference_directory, LoadOptions(dtype=torch.float32, attention="sdpa")).model.eval()
    auto = AutoModelForImageTextToText.from_pretrained(reference_directory, dtype=torch.float32).eval()
    ids, pixels = torch.tensor([[1, 400, 500, 29871]]), torch.randn(1, 12, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(ids, pixels).rows, auto(ids, pixels).rows)


def test_small_model_is_complete_and_usable(small_base):
    checkpoint = load_checkpoint(small_base)
    assert checkpoint.action_head is None and checkpoint.proprio_projector is None
    assert checkpoint.assumptions == [], "a checkpoint of ours says everything itself"
    ids = checkpoint.processor.tokenizer("In: What action should the robot take to turn on the stove?\nOut:")[
        "input_ids"
    ]
    assert checkpoint.processor.tokenizer.decode(ids[1:]).startswith("In: What action")
    assert len(set(checkpoint.model.config.token_ids.values())) == 5


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "model-00002-of-00002.safetensors"]
)
def test_a_missing_file_is_named(broken, name):
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks .*{name}"):
        load_checkpoint(broken)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_file_is_no_checkpoint(broken):
    with pytest.raises(FileNotFoundError, match="config.json is a file; give the directory that holds it"):
        load_checkpoint(broken / "config.json")


def test_weights_that_do_not_fit_the_config_are_named(broken):
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lack 9 tensors .*first 'language_model.model.layers.4"):
        load_checkpoint(broken)


def test_a_head_of_another_robot_is_named(broken):
    torch.save(L1RegressionActionHead(128, 14, 25).state_dict(), broken / "action_head--100_checkpoint.pt")
    with pytest.raises(ValueError, match=r"model.fc1.weight.*made for another robot"):
        load_checkpoint(broken)


def test_two_heads_are_refused(broken):
    shutil.copyfile(broken / "action_head--100_checkpoint.pt", broken / "action_head--200_checkpoint.pt")
    with pytest.raises(ValueError, match="holds 2 action_head files"):
        load_checkpoint(broken)


def test_what_was_assumed_is_said(reference_directory):
    checkpoint = load_checkpoint(reference_directory)
    assert any("assumed lightvla:multiplicity=set" in text for text in checkpoint.assumptions)
    assert checkpoint.model.pruner.multiplicity == "set"


def test_an_adapter_without_weights_says_how_to_merge_it(small_base, tmp_path):
    checkpoint = load_checkpoint(small_base)
    folder = save_checkpoint(
        tmp_path / "run", checkpoint, 20, weights={}, extra=lambda folder: (folder / "lora_adapter").mkdir()
    )
    assert not list(folder.glob("model*.safetensors*")) and (folder / "lora_adapter").is_dir()
    with pytest.raises(FileNotFoundError, match="holds an adapter without weights"):
        load_checkpoint(folder)


def test_a_film_component_that_does_not_fit_is_refused(broken):
    torch.save({}, broken / "vision_backbone--100_checkpoint.pt")
    with pytest.raises(ValueError, match="vision_backbone--100_checkpoint.pt does not fit the vision backbone"):
        load_checkpoint(broken)


def test_statistics_can_be_set_on_the_model(reference_directory):
    model = load_checkpoint(reference_directory).model
    model.norm_stats = {"other": {}}
    assert model.norm_stats == {"other": {}} and model.config.norm_stats == {"other": {}}


def test_files_of_a_checkpoint_have_the_mode_of_new_files(small_policy_directory: Path, tmp_path: Path):
    """safetensors writes for the owner alone, and colleagues then cannot read the weights."""
    checkpoint = load_checkpoint(small_policy_directory)
    before = os.umask(0o027)
    try:
        folder = save_checkpoint(tmp_path / "run", checkpoint, 1, training_state={"step": 1}, extra=_write_weights)
        modes = {stat.S_IMODE(file.stat().st_mode) for file in folder.rglob("*") if file.is_file()}
        assert modes == {0o640}
    finally:
        os.umask(before)


def _write_weights(folder: Path) -> None:
    (folder / "lora_adapter").mkdir()
    save_file({"a": torch.ones(2)}, folder / "lora_adapter" / "adapter_model.safetensors")


def test_saved_checkpoints_name_no_code_that_is_not_there(broken: Path, tmp_path: Path):
    foreign = "openvla/openvla-7b--processing_prismatic.PrismaticProcessor"
    auto_map = {"AutoConfig": "configuration_prismatic.OpenVLAConfig", "AutoProcessor": foreign}
    names = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
    for name in names:
        content = json.loads((broken / name).read_text())
        (broken / name).write_text(json.dumps({**content, "auto_map": auto_map}))
    folder = save_checkpoint(tmp_path / "run", load_checkpoint(broken), 1)
    for name in names:
        written, original = (json.loads((place / name).read_text()) for place in (folder, broken))
        assert written["auto_map"] == {"AutoProcessor": foreign}
        if name != "config.json":
            assert {**written, "auto_map": auto_map} == original
    assert load_checkpoint(folder).dataset_statistics == load_checkpoint(broken).dataset_statistics
