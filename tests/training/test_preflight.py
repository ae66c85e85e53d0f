import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.inspection import inspect_checkpoint
from prismatic.training.loop import BadInput, finetune
from prismatic.training.preflight import preflight


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"use_diffusion": True}, "use_l1_regression and --use_diffusion exclude each other"),
        (
            {"use_film": True, "use_lora": True, "merge_lora_during_training": False},
            "the FiLM component holds whole weights",
        ),
        ({"num_diffusion_steps_train": 0}, "--num_diffusion_steps_train 0: expected at least 1"),
        ({"batch_size": 0}, "--batch_size 0: expected at least 1"),
        ({"picture_frames": 60}, "--picture_frames 60: expected at most 50"),
        ({"grad_accumulation_steps": 0}, "--grad_accumulation_steps 0"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0: expected at least 0 and less than 1"),
        ({"learning_rate": float("nan")}, "--learning_rate nan"),
        ({"noise_end_fraction": 1.5}, "--noise_end_fraction 1.5"),
        ({"lr_schedule": "linear"}, "'linear' is unknown; choose one of step, cosine"),
        ({"precision": "fp16"}, "'fp16' is unknown; choose auto, bf16 or fp32"),
        ({"device": "tpu"}, "'tpu' is unknown; choose auto, cpu or cuda"),
        ({"pruner": "lightvla:nois=uniform"}, "no option 'nois'"),
        ({"pruner": "random"}, "is for evaluation"),
        ({"resume_step": 3, "resume": "False"}, "--resume_step 3 with --resume False"),
        ({"resume": "3"}, r"--resume 3: the run in .* has no checkpoint of that step \(none\)"),
        ({"run_id_override": ".."}, "the run's name '..' is no name of one folder"),
        (
            {"run_id_override": None, "run_id_note": "a/b"},
            "image_aug--a/b' is no name of one folder; choose another",
        ),
        ({"run_id_override": "x" * 201}, "has 201 bytes and may have 200"),
        ({"resume": "soon"}, "choose auto, True, False or a step"),
        ({"keep_best": True}, "--keep_best True needs a validation loss"),
        ({"gradient_checkpointing": "vit"}, "choose one of False, vits, llm, True"),
        ({"save_in_background": "no"}, "choose auto, True or False"),
        ({"keep_last": -1}, "--keep_last -1: expected 0 or more"),
        ({"dataset_name": "bridge"}, "unknown dataset 'bridge'.*libero_goal_no_noops"),
        ({"dataset_name": "libero_missing"}, "libero_missing.*libero_tiny_no_noops"),
        ({"num_images_in_input": 3}, "cannot serve 3 images"),
        (
            {"lora_dropout": 0.1, "use_lora": True, "pruner": "lightvla:multiplicity=set"},
            "--lora_dropout 0.1 trains one row",
        ),
        ({"compact_training": False, "pruner": "lightvla:multiplicity=set"}, "set --compact_training True or"),
        ({"noise_schedule": "cosine"}, "choose one of linear, constant"),
        ({"pruner": "lightvla_star:site=llama"}, "site=llama: give the layer too"),
        ({"pruner": "lightvla_star:site=llama,layer=2,queries=4"}, "has layers 0 to 1; choose layer 1 to 1"),
        ({"pruner": "lightvla_star:site=vision,layer=0,queries=4"}, "run blocks 0 to 0, .*; choose site=projector"),
        ({"pruner": "lightvla_star"}, "128 queries cannot pick more than the 32 visual tokens"),
        ({"pruner": "lightvla_star:queries=20", "num_images_in_input": 1}, "more than the 16 visual tokens"),
        ({"pruner": "lightvla_star:queries=4", "compact_training": False}, "lightvla_star keeps a set; set --compact_"),
        ({"pruner": "lightvla:min_tokens=-1"}, "expected a whole number, 0 or more"),
    ],
)
def test_bad_input_is_named_with_its_remedy(flags, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        preflight(flags(**overrides))


def test_good_flags_pass_and_make_the_run_folder(flags):
    config = flags()
    preflight(config)
    assert config.run_dir.is_dir() and not list(config.run_dir.iterdir())


def test_a_missing_checkpoint_is_named(flags, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        preflight(flags(vla_path=str(tmp_path / "nowhere")))


def test_half_a_checkpoint_names_the_missing_file(flags, small_base: Path, tmp_path: Path):
    half = tmp_path / "half"
    shutil.copytree(small_base, half)
    (half / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the weight file model.safetensors"):
        preflight(flags(vla_path=str(half)))


def test_a_folder_that_cannot_be_written_is_named(flags, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into .*--run_root_dir"):
        preflight(flags(run_root_dir=tmp_path / "file"))


def test_nothing_to_resume_is_said(flags):
    with pytest.raises(FileNotFoundError, match="--resume True: run 'run' has no checkpoint in"):
        preflight(flags(resume=True))


def test_finetune_turns_bad_input_into_one_kind_of_error(flags):
    with pytest.raises(BadInput, match="--batch_size 0"):
        finetune(flags(batch_size=0))


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add_biases(folder: Path) -> None:
    file = folder / "model.safetensors"
    layer = "language_model.model.layers.0.self_attn"
    biases = {f"{layer}.{name}_proj.bias": torch.ones(32) for name in "qkv"}
    save_file({**load_file(file), **biases}, file, metadata={"format": "pt"})


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another language model": (
        lambda folder: change_config(folder, text_config={"model_type": "qwen2"}),
        "config.json: text_config.model_type 'qwen2' is not supported: only Llama is",
    ),
    "tensors that nothing reads": (
        add_biases,
        "hold 3 tensors that config.json does not imply, first 'language_model.model.layers.0.self_attn.k_proj.bias'",
    ),
    "a pointer": (
        lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "tokenizer.json is a placeholder that git-lfs left",
    ),
    "weights that are cut off": (
        lambda folder: os.truncate(folder / "model.safetensors", 50_000),
        "model.safetensors is cut off: 50000 of",
    ),
    "a head that is cut off": (
        lambda folder: (folder / "action_head--0_checkpoint.pt").write_bytes(b"PK\x03\x04"),
        "action_head--0_checkpoint.pt is cut off",
    ),
    "a crop": (
        lambda folder: (folder / "preprocessor_config.json").write_text('{"tvf_crop_params": [{"output_size": 200}]}'),
        "tvf_crop_params .* is not supported",
    ),
    "a recorded head that is not there": (
        lambda folder: change_config(folder, action_head="l1"),
        "records an L1 head, but has no action_head",
    ),
    "an unknown dtype": (lambda folder: change_config(folder, torch_dtype="int4"), "torch_dtype 'int4' is unknown"),
    "sizes that do not go together": (
        lambda folder: change_config(folder, timm_model_kwargs=[{"embed_dim": 30, "num_heads": 4}]),
        "config.json describes no model that can be built",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_checkpoint_that_cannot_be_trained_is_refused_before_it_is_loaded(flags, small_base, tmp_path, name):
    change, message = UNFIT[name]
    folder = Path(shutil.copytree(small_base, tmp_path / "base"))
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        preflight(flags(vla_path=str(folder)))
    found = inspect_checkpoint(folder)
    assert found.problems, "inspecting it tells as much"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_checkpoint(folder)


def test_flags_about_wandb_alone_log_nothing_and_say_so(flags, caplog):
    preflight(flags(wandb_project="mine"))
    (line,) = caplog.messages
    assert line == "--wandb_project without --use_wandb True: nothing is logged to Weights & Biases"
