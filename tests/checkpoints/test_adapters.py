"""Merging stored adapters: against saving's own merge, against PEFT's, and what is refused."""

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from prismatic.checkpoints.adapters import merge_adapter, read_adapter
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.files import check_complete
from prismatic.checkpoints.inspection import inspect_checkpoint
from prismatic.checkpoints.manifest import is_complete, read_manifest
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.checkpoints.weight_files import fingerprint, stored_tensors
from prismatic.models.lora import FINGERPRINT_FILE, FOLDER, attach_lora, merged_weights, save_adapter

PUBLISHED_TARGETS = (
    "q", "kv", "qkv", "proj", "fc1", "fc2", "fc3", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
    "down_proj", "lm_head",
)  # fmt: skip
RANK = 4


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in check_complete(directory) for name, tensor in load_file(file).items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert set(first) == set(second)
    different = [n for n in first if first[n].dtype != second[n].dtype or not torch.equal(first[n], second[n])]
    assert not different, different


def trained(base: Path) -> tuple[Checkpoint, object]:
    """A checkpoint whose adapters have an effect, as training leaves it; weights in float32, as training has them."""
    checkpoint = load_checkpoint(base, LoadOptions(dtype=torch.float32))
    config = attach_lora(checkpoint.model, RANK)
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return checkpoint, config


def write_adapter(checkpoint: Checkpoint, config: object, base: Path, directory: Path) -> Path:
    """What a run with `merge_lora_during_training` False leaves."""
    value = fingerprint(check_complete(base))
    checkpoint.model.config.base_fingerprint = value

    def adapter(folder: Path) -> None:
        save_adapter(checkpoint.model, config, folder / FOLDER, str(base), value)

    return save_checkpoint(directory, checkpoint, 5, weights={}, training_state={"step": 5}, extra=adapter)


@pytest.fixture(scope="module")
def adapted(reference_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A checkpoint that holds an adapter of ours on the published layout, and the weights that saving would merge."""
    torch.manual_seed(0)
    checkpoint, config = trained(reference_directory)
    directory = write_adapter(checkpoint, config, reference_directory, tmp_path_factory.mktemp("adapter") / "run")
    state = {name: value.make().to(torch.bfloat16) for name, value in merged_weights(checkpoint.model).items()}
    return directory, state


@pytest.fixture
def copy(adapted: tuple[Path, dict], tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapted[0], tmp_path / "run"))


def test_merging_afterwards_gives_what_saving_merges(adapted, copy, reference_directory: Path):
    before = {file.name for file in copy.iterdir()}
    assert merge_adapter(copy) == copy, "the adapter says which base it belongs to"
    assert_equal(weights(copy), adapted[1])
    added = {file.name for file in copy.iterdir()} - before
    assert added == {path.name for path in reference_directory.glob("model*")}, "split into files as the base is"
    assert json.loads((copy / "config.json").read_text()) == json.loads((adapted[0] / "config.json").read_text())
    assert load_checkpoint(copy).action_head is not None and (copy / "training_state" / "state.pt").is_file()
    merge_adapter(copy)
    assert_equal(weights(copy), adapted[1])


def test_a_folder_of_its_own_is_a_complete_checkpoint(adapted, copy, tmp_path: Path, reference_directory: Path):
    folder = merge_adapter(copy, str(reference_directory), tmp_path / "merged")
    assert_equal(weights(folder), adapted[1])
    checkpoint = load_checkpoint(folder)
    assert checkpoint.action_head is not None and checkpoint.dataset_statistics
    assert not (folder / FOLDER).exists() and not (folder / "training_state").exists()
    assert not list(copy.glob("model*")), "the checkpoint itself stays as it was"
    with pytest.raises(FileExistsError, match="merged exists and is not empty; remove it, or give a new folder"):
        merge_adapter(copy, output_dir=folder)


def published_adapter(base: Path, directory: Path) -> Path:
    """An adapter as OpenVLA-OFT's PEFT 0.11 writes it: on all layers of these last names, used or not."""
    folder = directory / FOLDER
    folder.mkdir(parents=True)
    tensors = {}
    for name, weight in weights(base).items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or weight.ndim < 2 or module.rpartition(".")[2] not in PUBLISHED_TARGETS:
            continue
        shapes = {"A": (RANK, *weight.shape[1:]), "B": (len(weight), RANK, *[1] * (weight.ndim - 2))}
        for which, shape in shapes.items():
            key = f"base_model.model.{module}.lora_{which}.weight"
            values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
            tensors[key] = torch.from_numpy(values.astype(np.float32) / 32)
    head = "language_model.lm_head"
    tensors[f"base_model.model.{head}.base_layer.weight"] = weights(base)[f"{head}.weight"].float()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "init_lora_weights": "gaussian", "inference_mode": True, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "use_dora": False, "use_rslora": False, "base_model_name_or_path": "openvla/openvla-7b",
        "target_modules": list(PUBLISHED_TARGETS), "task_type": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return directory


# PEFT asks transformers for an attribute by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_published_adapter_merges_as_peft_merges_it(reference_directory: Path, tmp_path: Path, caplog):
    run = published_adapter(reference_directory, tmp_path / "run")
    adapter = read_adapter(run)
    assert (
        adapter.scale == 4.0
        and adapter.base_fingerprint is None
        and set(adapter.copies) == {"language_model.lm_head.weight"}
    )
    adapted = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.factors}
    assert adapted == set(PUBLISHED_TARGETS)
    assert "vision_backbone.fused_featurizer.patch_embed.proj.weight" in adapter.factors
    with caplog.at_level(logging.WARNING):
        merge_adapter(run, reference_directory)
    assert "records no fingerprint of its base model" in caplog.text
    ours = weights(run)
    model = load_checkpoint(reference_directory, LoadOptions(dtype=torch.float32)).model
    theirs = PeftModel.from_pretrained(model, str(run / FOLDER)).merge_and_unload().state_dict()
    base = weights(reference_directory)
    assert set(ours) == set(base)
    for name, value in ours.items():
        assert value.dtype == base[name].dtype
        if name not in adapter.factors:
            assert torch.equal(value, base[name])
            continue
        assert not torch.equal(value, base[name])
        # Summation order may differ by a last bit of float32, which now and then decides a rounding to bfloat16.
        torch.testing.assert_close(value.float(), theirs[name], rtol=2**-8, atol=1e-6)
        assert (value == theirs[name].to(value.dtype)).float().mean() > 0.999
    assert json.loads((run / "config.json").read_text()) == json.loads(
        (reference_directory / "config.json").read_text()
    )
    load_checkpoint(run)


def test_another_base_model_is_refused(copy, small_base: Path, reference_directory: Path, tmp_path: Path):
    other = Path(shutil.copytree(reference_directory, tmp_path / "other"))
    file = other / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    changed = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[changed][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    recorded, found = (fingerprint(check_complete(folder)) for folder in (reference_directory, other))
    with pytest.raises(ValueError, match=f"trained on weights {recorded}, but .* holds {found}: pass the base model"):
        merge_adapter(copy, other)
    with pytest.raises(ValueError, match="which .* does not have; it has another base|with shape"):
        merge_adapter(copy, small_base)
    assert not list(copy.glob("model*")) and not list(tmp_path.glob(".run*"))


def test_a_published_adapters_copy_of_the_lm_head_tells_another_base(reference_directory: Path, tmp_path: Path):
    run = published_adapter(reference_directory, tmp_path / "run")
    file = run / FOLDER / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.language_model.lm_head.base_layer.weight"][3, 3] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="holds 'language_model.lm_head.weight' beside its adapters, and it is not"):
        merge_adapter(run, reference_directory)


def test_merging_twice_is_not_possible_by_accident(copy):
    merge_adapter(copy)
    with pytest.raises(ValueError, match="is the folder of the adapter itself"):
        merge_adapter(copy, copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_dora", True, "use_dora = True is not supported"),
        ("bias", "all", "bias = 'all' is not supported"),
        ("modules_to_save", ["lm_head"], "modules_to_save = .* is not supported"),
        ("peft_type", "IA3", "peft_type 'IA3' cannot be merged"),
        ("r", 8, "config.json says rank 8"),
    ],
)
def test_adapters_of_another_kind_are_named(copy, key, value, message):
    file = copy / FOLDER / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        merge_adapter(copy)


def test_a_missing_or_odd_adapter_is_named(copy, small_base: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is not there; give the checkpoint folder"):
        merge_adapter(small_base)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        merge_adapter(tmp_path / "nowhere")
    file = copy / FOLDER / "adapter_model.safetensors"
    tensors = load_file(file)
    lone = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file({**tensors, "base_model.model.x.lora_embedding_A": tensors[lone].clone()}, file)
    with pytest.raises(ValueError, match="'x.lora_embedding_A' is no part of a low-rank adapter"):
        merge_adapter(copy)
    save_file({name: value for name, value in tensors.items() if name != lone}, file)
    with pytest.raises(ValueError, match="lacks its lora_A or lora_B"):
        merge_adapter(copy)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has neither adapter_model.safetensors nor"):
        merge_adapter(copy)


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merge_that_dies_while_moving_leaves_an_adapter_that_can_be_merged(
    adapted, copy, monkeypatch: pytest.MonkeyPatch, merged_before
):
    if merged_before:
        merge_adapter(copy)
    assert is_complete(copy)
    replace, died = os.replace, 0

    class Died(BaseException):
        pass

    for moves in range(8):
        left = iter(range(moves))

        def move(source: Path, target: Path, left=left) -> None:
            if next(left, None) is None:
                raise Died
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", move)
            try:
                merge_adapter(copy)
                break
            except Died:
                died += 1
        assert is_complete(copy), "the manifest never lists what is not there"
        try:
            assert_equal(weights(copy), adapted[1])
        except FileNotFoundError as error:
            assert "holds an adapter without weights" in str(error)
    assert died >= 4, "two weight files, the index and the manifest"
    assert_equal(weights(copy), adapted[1])
    listed = read_manifest(copy)
    assert is_complete(copy) and listed is not None and {file.name for file in check_complete(copy)} < set(listed.files)
    assert not list(copy.glob(".*"))


def test_the_fingerprint_is_of_the_tensors_not_of_the_files(reference_directory: Path, tmp_path: Path):
    tensors = weights(reference_directory)
    whole = tmp_path / "whole.safetensors"
    save_file(dict(reversed(tensors.items())), whole)
    value = fingerprint([whole])
    assert value == fingerprint(check_complete(reference_directory)) and len(value) == len("sha256:") + 64
    name = next(iter(tensors))
    renamed = {("x" + key if key == name else key): tensor for key, tensor in tensors.items()}
    reshaped = {**tensors, name: tensors[name].reshape(-1)}
    widened = {**tensors, name: tensors[name].float()}
    for number, other in enumerate((renamed, reshaped, widened)):
        save_file(other, tmp_path / f"{number}.safetensors")
        assert fingerprint([tmp_path / f"{number}.safetensors"]) != value


def with_header(__metadata__: dict | None = None, **changes) -> bytes:
    """A weight file of two float32 tensors, what the header says of the first changed."""
    first = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    entries = {"a": first, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    header = json.dumps({"__metadata__": __metadata__ or {}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(16)


def test_headers_tell_what_files_hold(reference_directory: Path, tmp_path: Path):
    stored, tensors = stored_tensors(check_complete(reference_directory)), weights(reference_directory)
    assert {n: t.shape for n, t in stored.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
    file = next(reference_directory.glob("*.safetensors"))
    content = file.read_bytes()
    broken = tmp_path / "model.safetensors"
    for part, message in (
        (content[:-1], "is cut off: .* bytes are there"),
        (content[:100], "is cut off inside its header"),
        (b"", "is cut off inside its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "placeholder that git-lfs left"),
        ((4).to_bytes(8, "little") + b"what", "is not a safetensors file"),
        (content + b"x", f"has {len(content) + 1} bytes instead of {len(content)}; copy or download it again"),
        (with_header(dtype="BF17"), "is not a safetensors file .*BF17"),
        (with_header(dtype=["F32"]), "is not a safetensors file"),
        (with_header(shape="ab"), "is not a safetensors file"),
        (with_header(shape=[-1]), "is not a safetensors file"),
        (with_header(shape=[4]), "is not a safetensors file"),
        (with_header(data_offsets=[-4, 8]), "is not a safetensors file"),
        (with_header(data_offsets=[4, 12]), "is not a safetensors file|cut off"),
        (with_header(__metadata__={"format": 3}), "is not a safetensors file"),
    ):
        broken.write_bytes(part)
        with pytest.raises(ValueError, match=message):
            stored_tensors([broken])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", POINTER, "adapter_model.safetensors is a placeholder that git-lfs left"),
        ("adapter_model.safetensors", b"12345678", "adapter_model.safetensors is cut off"),
        (
            "adapter_model.safetensors",
            with_header() + b"x",
            r"adapter_model.safetensors has \d+ bytes instead of",
        ),
        ("adapter_config.json", POINTER, "adapter_config.json is a placeholder that git-lfs left"),
        ("adapter_config.json", b'{"r": 4', "adapter_config.json is no JSON"),
        ("adapter_config.json", b"{}", "adapter_config.json: r = None, expected a positive number"),
        (FINGERPRINT_FILE, b"", "is no JSON"),
    ],
)
def test_a_damaged_adapter_is_named(copy, name: str, content: bytes, message: str):
    (copy / FOLDER / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        merge_adapter(copy)
    assert any(name in problem for problem in inspect_checkpoint(copy).problems)


def test_a_damaged_adapter_of_older_peft_is_named(copy):
    (copy / FOLDER / "adapter_model.safetensors").unlink()
    torch.save(torch.nn.Linear(2, 2), copy / FOLDER / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin holds pickled Python objects"):
        merge_adapter(copy)


def test_a_damaged_base_is_named_before_anything_is_hashed(copy, reference_directory: Path, tmp_path: Path):
    base = Path(shutil.copytree(reference_directory, tmp_path / "base"))
    (base / "preprocessor_config.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match="preprocessor_config.json is a placeholder"):
        merge_adapter(copy, base)
    shutil.copyfile(reference_directory / "preprocessor_config.json", base / "preprocessor_config.json")
    (base / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is a placeholder"):
        merge_adapter(copy, base)


def test_merged_folders_can_be_read_by_others_and_name_no_code(copy, reference_directory: Path, tmp_path: Path):
    base = Path(shutil.copytree(reference_directory, tmp_path / "base"))
    for folder, name in ((copy, "config.json"), (base, "preprocessor_config.json")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "configuration_prismatic.A"}}))
    (copy / "preprocessor_config.json").unlink()
    folder = merge_adapter(copy, base, tmp_path / "merged")
    assert not [file.name for file in folder.glob("*config.json") if "auto_map" in file.read_text()]
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}
    load_checkpoint(folder)
