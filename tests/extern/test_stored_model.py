"""Loading, saving and calling the model as people do with transformers."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_checkpoint import diffusion_weights, film_weights, noisy_action_weights, reference_sample, write_variant
from transformers import AutoModelForImageTextToText, AutoProcessor

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.inspection import inspect_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.projectors import NoisyActionProjector
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.vla.robots import LIBERO

NO_PRUNER = LoadOptions(pruner=PrunerSpec("none"))
PROMPT = "In: What action should the robot take to turn on the stove?\nOut:"


@pytest.fixture(scope="module")
def film_directory(reference_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film") / "checkpoint"
    return write_variant(reference_directory, folder, {"vision_backbone": film_weights()})


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """What the processor makes of one sentence and two pictures."""
    processor, images = AutoProcessor.from_pretrained(folder), reference_sample(0)["images"]
    made = [processor(PROMPT, image) for image in images]
    return {**made[0], "pixel_values": torch.cat([one["pixel_values"] for one in made], dim=1)}


def test_film_comes_along_through_auto_classes(film_directory: Path, reference_directory: Path):
    options = LoadOptions(dtype=torch.float32, pruner=PrunerSpec("none"), attention="sdpa")
    ours = load_checkpoint(film_directory, options).model.eval()
    auto = AutoModelForImageTextToText.from_pretrained(film_directory, dtype=torch.float32, pruner="none").eval()
    assert auto.config.use_film
    with torch.no_grad():
        rows = auto(**inputs(film_directory)).rows
        assert torch.equal(rows, ours(**inputs(film_directory)).rows)
        plain = OpenVLAForActionPrediction.from_pretrained(reference_directory, dtype=torch.float32, pruner="none")
        assert not torch.allclose(rows, plain.eval()(**inputs(film_directory)).rows, atol=1e-2)


def test_a_model_with_film_is_saved_as_published_and_loaded_again(film_directory: Path, tmp_path: Path):
    model = AutoModelForImageTextToText.from_pretrained(film_directory)
    folder = tmp_path / "saved"
    AutoProcessor.from_pretrained(film_directory).save_pretrained(folder)
    model.save_pretrained(folder)
    assert [file.name for file in folder.glob("*.pt")] == ["vision_backbone--latest_checkpoint.pt"]
    with pytest.raises(FileNotFoundError, match="records an L1 head, but has no action_head"):
        load_checkpoint(folder, NO_PRUNER)
    shutil.copy(next(film_directory.glob("action_head--*")), folder)
    for again in (AutoModelForImageTextToText.from_pretrained(folder), load_checkpoint(folder, NO_PRUNER).model):
        found, expected = again.state_dict(), model.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    (folder / "vision_backbone--latest_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match=r"records FiLM, but has no vision_backbone--\*_checkpoint.pt"):
        AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"records FiLM, but has no vision_backbone--\*_checkpoint.pt"):
        load_checkpoint(folder, NO_PRUNER)
    assert any(
        "records use_film, but there is no vision_backbone" in text for text in inspect_checkpoint(folder).problems
    )


def test_saving_over_a_model_with_film_leaves_none_of_it(
    film_directory: Path, reference_directory: Path, tmp_path: Path
):
    for source in (film_directory, reference_directory):
        AutoModelForImageTextToText.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert not AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").config.use_film


def test_saved_weights_have_the_mode_of_the_other_files(reference_directory: Path, tmp_path: Path):
    AutoModelForImageTextToText.from_pretrained(reference_directory).save_pretrained(tmp_path / "saved")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "saved").iterdir()}
    assert len(modes) == 2 and len(set(modes.values())) == 1, modes


def test_saved_folders_name_no_code_that_is_not_there(reference_directory: Path, tmp_path: Path):
    source = Path(shutil.copytree(reference_directory, tmp_path / "source"))
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "configuration_prismatic.A"}}))
    folder = tmp_path / "saved"
    AutoModelForImageTextToText.from_pretrained(source).save_pretrained(folder)
    AutoProcessor.from_pretrained(source).save_pretrained(folder)
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    assert not [file.name for file in folder.glob("*.json") if "auto_map" in file.read_text()]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"action_readout": "Aligned"}, ValueError, "action_readout 'Aligned' is unknown; known: aligned, tail"),
        ({"center_crop": "yes"}, ValueError, "center_crop 'yes' should be True or False"),
        ({"use_film": 1}, ValueError, "use_film 1 should be True or False"),
        ({"num_images_in_input": "2"}, ValueError, "num_images_in_input '2' should be a number"),
        ({"robot": "panda"}, ValueError, "unknown robot 'panda'; known: aloha, bridge, libero"),
        ({"pruner": "magic"}, ValueError, "magic"),
        ({"readout": "tail"}, TypeError, "unknown options .'readout'.; known .*action_readout"),
    ],
)
def test_options_that_mean_nothing_are_refused(small_base: Path, options: dict[str, Any], error: type, message: str):
    for load in (OpenVLAForActionPrediction, AutoModelForImageTextToText):
        with pytest.raises(error, match=message):
            load.from_pretrained(small_base, **options)


def test_options_that_are_obvious_are_accepted(small_base: Path):
    options = {"robot": "libero", "pruner": "lightvla:min_tokens=3", "action_readout": "tail", "revision": "main"}
    model = OpenVLAForActionPrediction.from_pretrained(str(small_base), dtype="bfloat16", token=None, **options)
    assert model.dtype == torch.bfloat16 and model.robot == LIBERO and model.config.action_readout == "tail"
    assert str(model.config.pruner_spec) == "lightvla:min_tokens=3"


def test_another_language_model_is_refused_however_it_is_loaded(small_base: Path, tmp_path: Path):
    folder = Path(shutil.copytree(small_base, tmp_path / "qwen"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen2"
    (folder / "config.json").write_text(json.dumps(config))
    for load in (AutoModelForImageTextToText.from_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match="text_config.model_type 'qwen2' is not supported: only Llama is"):
            load(folder)
    assert any("'qwen2' is not supported" in text for text in inspect_checkpoint(folder).problems)


@pytest.fixture
def checkpoint(reference_directory: Path):
    options = LoadOptions(dtype=torch.float32, pruner=PrunerSpec("lightvla", {"multiplicity": "set"}))
    return load_checkpoint(reference_directory, options)


def test_the_model_called_on_what_the_processor_makes_reads_predict_actions_rows(checkpoint, reference_directory: Path):
    model, made = checkpoint.model.eval(), inputs(reference_directory)
    with torch.no_grad():
        rows = model(**made).rows
        assert torch.equal(rows, model.predict_action(**made, action_head=checkpoint.action_head)[1])
        state = torch.zeros(1, 8)
        with_state = model(**made, proprio=state, proprio_projector=checkpoint.proprio_projector).rows
    _, expected = model.predict_action(
        **made,
        proprio=np.zeros(8),
        proprio_projector=checkpoint.proprio_projector,
        action_head=checkpoint.action_head,
    )
    assert torch.equal(with_state, expected) and not torch.equal(rows, with_state)


def test_predict_action_changes_nothing_of_the_callers(reference_directory: Path, tmp_path: Path):
    components = {"action_head": diffusion_weights(), "noisy_action_projector": noisy_action_weights()}
    folder = write_variant(reference_directory, tmp_path / "diffusion", components)
    checkpoint = load_checkpoint(folder, LoadOptions(dtype=torch.float32, pruner=PrunerSpec("none")))
    head, other = checkpoint.action_head, NoisyActionProjector(128)
    assert isinstance(head, DiffusionActionHead)
    head.num_inference_steps = 2
    made = {**inputs(folder), "proprio": np.linspace(-1, 1, 8, dtype=np.float32)}
    before = {name: value.copy() if isinstance(value, np.ndarray) else value.clone() for name, value in made.items()}
    own = head.noisy_action_projector
    call = {"proprio_projector": checkpoint.proprio_projector, "action_head": head}
    torch.manual_seed(0)
    with_other = checkpoint.model.predict_action(**made, **call, noisy_action_projector=other)[0]
    assert head.noisy_action_projector is own
    torch.manual_seed(0)
    with_own = checkpoint.model.predict_action(**made, **call)[0]
    assert not np.allclose(with_other, with_own), "the given projector was used"
    for name, value in before.items():
        np.testing.assert_array_equal(made[name], value)


def test_what_belongs_together_is_asked_for_together(checkpoint, reference_directory: Path):
    model, made = checkpoint.model.eval(), inputs(reference_directory)
    with pytest.raises(ValueError, match="got proprio without proprio_projector"):
        model.predict_action(**made, proprio=np.zeros(8), action_head=checkpoint.action_head)
    with pytest.raises(ValueError, match="got proprio_projector without proprio"):
        model.predict_action(**made, proprio_projector=checkpoint.proprio_projector, action_head=checkpoint.action_head)
    with pytest.raises(ValueError, match="has an action head of kind 'l1', and predict_action got none"):
        model.predict_action(**made)
    auto = AutoModelForImageTextToText.from_pretrained(reference_directory)
    with pytest.raises(ValueError, match="has an action head of kind 'l1', and predict_action got none"):
        auto.predict_action(**made)


@pytest.mark.parametrize(
    ("proprio", "message"),
    [
        (np.zeros(7), "proprio has shape .7,.; robot 'libero' needs 8 numbers for each of 1 samples"),
        (np.zeros((2, 8)), "proprio has shape .2, 8.; robot 'libero' needs 8"),
        (np.zeros((8, 1)), "proprio has shape .8, 1."),
        (np.full(8, np.nan), "proprio holds NaN or infinity"),
    ],
)
def test_a_state_that_does_not_fit_is_named(checkpoint, reference_directory: Path, proprio: np.ndarray, message: str):
    made, parts = inputs(reference_directory), {"proprio_projector": checkpoint.proprio_projector}
    with pytest.raises(ValueError, match=message):
        checkpoint.model.predict_action(**made, **parts, proprio=proprio, action_head=checkpoint.action_head)


@pytest.mark.parametrize("load", [OpenVLAForActionPrediction, AutoModelForImageTextToText], ids=["class", "auto"])
def test_a_weight_file_that_is_cut_off_is_named_with_its_folder(reference_directory: Path, tmp_path: Path, load):
    copy = shutil.copytree(reference_directory, tmp_path / "copy")
    for size in (100_000, 3):
        os.truncate(copy / "model-00001-of-00002.safetensors", size)
        with pytest.raises(
            ValueError, match=f"{copy}: a weight file is cut off or no safetensors file .* copy or down"
        ):
            load.from_pretrained(copy)


def test_nothing_is_sampled_and_that_is_said(checkpoint, reference_directory: Path, caplog):
    made = {**inputs(reference_directory), "action_head": checkpoint.action_head}
    plain, _ = checkpoint.model.predict_action(**made)
    assert "do_sample" not in caplog.text
    np.testing.assert_array_equal(checkpoint.model.predict_action(**made, do_sample=True)[0], plain)
    assert "do_sample=True: nothing is sampled here" in caplog.text


def test_the_number_of_images_is_saved_with_the_model(checkpoint, tmp_path: Path):
    checkpoint.model.set_num_images_in_input(1)
    checkpoint.model.save_pretrained(tmp_path / "saved")
    assert OpenVLAForActionPrediction.from_pretrained(tmp_path / "saved").num_images_in_input == 1


def test_statistics_that_cannot_scale_the_actions_are_refused(checkpoint, reference_directory: Path):
    model, made = checkpoint.model.eval(), inputs(reference_directory)
    statistics = model.norm_stats["libero_tiny_no_noops"]["action"]
    model.norm_stats = {"wide": {"action": {name: values * 2 for name, values in statistics.items()}}}
    with pytest.raises(ValueError, match="norm_stats: statistics of 'wide', action: min has 14 values, robot 'libero'"):
        model.predict_action(**made, action_head=checkpoint.action_head)
