"""What is saved is what was loaded, tensor by tensor and key by key, and what is written has the published form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_checkpoint import head_weights, model_weights, proprio_weights, write_reference_checkpoint
from safetensors.torch import load_file

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.files import PROCESSOR_FILES, check_complete
from prismatic.checkpoints.manifest import MANIFEST_FILE
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.checkpoints.weight_checks import expected_tensors
from prismatic.checkpoints.weight_files import split_into_shards
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.lazy_tensors import LazyTensor, file_header
from prismatic.models.pruners.registry import PrunerSpec

OUR_KEYS = {
    "timm_model_kwargs": list, "pruner": dict, "action_readout": str, "robot": dict, "token_ids": dict,
    "center_crop": bool, "num_images_in_input": int, "use_proprio": bool, "base_fingerprint": str,
    "action_head": str, "use_film": bool, "num_diffusion_steps_train": int,
}  # fmt: skip
"""What may stand in `config.json` beside the published keys."""
UNUSED_KEYS = {
    "_name_or_path": "openvla/openvla-7b",
    "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},  # names a file: not kept
    "output_projector_states": False,
}
"""Published keys that nothing here reads; they are kept for who does."""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint as stored, `module.` prefixes included."""
    found = {name: value for file in check_complete(folder) for name, value in load_file(file).items()}
    for file in folder.glob("*--*_checkpoint.pt"):
        component = file.name.partition("--")[0]
        state = torch.load(file, map_location="cpu", weights_only=True)
        found |= {f"{component}/{name}": value for name, value in state.items()}
    return found


def jsons(folder: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in folder.glob("*.json") if "index" not in file.name}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    different = [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    assert not different, different


@pytest.mark.parametrize("which", ["reference_directory", "small_base", "small_policy_directory"])
def test_save_load_save_changes_nothing(request: pytest.FixtureRequest, tmp_path: Path, which: str):
    source: Path = request.getfixturevalue(which)
    first = save_checkpoint(tmp_path / "first", load_checkpoint(source), 100)
    second = save_checkpoint(tmp_path / "second", load_checkpoint(first), 100)
    assert_equal(tensors(first), tensors(second))
    assert jsons(first) == jsons(second)
    assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in second.iterdir())
    published = {name.replace("/module.", "/"): value for name, value in tensors(source).items()}
    assert_equal(tensors(first), published)


def test_a_load_in_another_dtype_is_written_as_it_was_loaded(reference_directory: Path, tmp_path: Path):
    checkpoint = load_checkpoint(reference_directory, LoadOptions(dtype=torch.float32))
    folder = save_checkpoint(tmp_path / "wide", checkpoint, 100)
    stored = tensors(folder)
    assert all(value.dtype == torch.float32 for value in stored.values())
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"
    assert_equal({name: value.to(torch.bfloat16) for name, value in stored.items() if "/" not in name}, model_weights())


def test_names_shapes_and_dtypes_are_the_published_ones(reference_directory: Path, tmp_path: Path):
    folder = save_checkpoint(tmp_path / "run--100_chkpt", load_checkpoint(reference_directory), 100)
    expected = {
        **model_weights(),
        **{f"action_head/{name}": value for name, value in head_weights().items()},
        **{f"proprio_projector/{name}": value for name, value in proprio_weights().items()},
    }
    assert_equal(tensors(folder), expected)
    components = {file.name for file in folder.glob("*.pt")}
    assert components == {"action_head--100_checkpoint.pt", "proprio_projector--100_checkpoint.pt"}
    for file in folder.glob("*.safetensors"):
        header = file.read_bytes()[8:80]
        assert b'"format":"pt"' in header, "transformers refuses a file that does not say which framework wrote it"


def test_weight_files_of_7b_have_the_published_sizes():
    config = OpenVLAConfig(
        timm_model_ids=["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        timm_override_act_layers=[None, None], image_sizes=[224, 224], use_fused_vision_backbone=True,
        arch_specifier="no-align+fused-gelu-mlp", pruner={"name": "none"},
        text_config={"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064},
    )  # fmt: skip

    def make() -> torch.Tensor:
        raise AssertionError("nothing is made")

    weights = {name: LazyTensor(shape, torch.bfloat16, make) for name, shape in expected_tensors(config).items()}
    shards = [{name: weights[name] for name in names} for names in split_into_shards(weights).values()]
    sizes = [len(file_header(shard)) + sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert sizes == [4925122448, 4947392496, 4947417456, 262668432]


def test_files_are_the_published_ones_and_tokenizer_files_are_copied(tmp_path: Path):
    source = write_reference_checkpoint(tmp_path / "source")
    for name in ("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "processor_config.json"):
        (source / name).write_bytes(b"{ }\r\n")
    folder = save_checkpoint(tmp_path / "copy", load_checkpoint(source), 100)
    copied = [name for name in PROCESSOR_FILES if (source / name).is_file()]
    assert len(copied) == 8
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in copied)
    ours = {"model.safetensors", MANIFEST_FILE}
    published = {file.name for file in source.iterdir() if not file.name.startswith("model")}
    assert {file.name for file in folder.iterdir()} == published | ours


def test_config_json_is_what_transformers_4_40_reads(tmp_path: Path):
    """That version knows `torch_dtype` as the name of a dtype, not `dtype`, and any unknown key as plain JSON."""
    source = write_reference_checkpoint(tmp_path / "source")
    published = {**json.loads((source / "config.json").read_text()), **UNUSED_KEYS}
    (source / "config.json").write_text(json.dumps(published))
    checkpoint = load_checkpoint(source, LoadOptions(pruner=PrunerSpec("lightvla", {"min_tokens": 4})))
    checkpoint.model.config.base_fingerprint = "sha256:0"
    checkpoint.model.config.center_crop = True
    written = json.loads((save_checkpoint(tmp_path / "run", checkpoint, 1) / "config.json").read_text())
    added = set(written) - set(published)
    assert added <= set(OUR_KEYS) and "dtype" not in written
    assert all(type(written[key]) is OUR_KEYS[key] for key in added)
    unchanged = set(published) - {"norm_stats", "torch_dtype", "auto_map"}
    assert "auto_map" not in written, "the file that it names is not beside it"
    assert {key: written[key] for key in unchanged} == {key: published[key] for key in unchanged}
    assert "dtype" not in written["text_config"] and written["torch_dtype"] == "bfloat16"
    assert written["norm_stats"] == published["norm_stats"] == checkpoint.dataset_statistics
    assert written["robot"]["chunk_length"] == 8 and written["pruner"]["min_tokens"] == 4


def test_a_small_base_writes_the_older_name_of_its_dtype_too(small_base: Path):
    written = json.loads((small_base / "config.json").read_text())
    assert written["torch_dtype"] == "float32" and "dtype" not in written
