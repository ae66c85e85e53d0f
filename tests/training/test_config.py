from pathlib import Path

import draccus
import pytest

from prismatic.training.config import FinetuneConfig

PUBLISHED = """
vla_path data_root_dir dataset_name run_root_dir use_l1_regression use_diffusion num_diffusion_steps_train use_film
num_images_in_input use_proprio batch_size learning_rate lr_warmup_steps num_steps_before_decay grad_accumulation_steps
max_steps use_val_set val_freq val_time_limit save_freq save_latest_checkpoint_only resume resume_step image_aug
diffusion_sample_freq use_lora lora_rank lora_dropout merge_lora_during_training log_freq run_id_note run_id_override
shuffle_buffer_size tensorboard_log_dir tensorboard_log_freq wandb_entity wandb_project wandb_log_freq
"""


def parse(*arguments: str) -> FinetuneConfig:
    return draccus.parse(config_class=FinetuneConfig, args=list(arguments))


def test_every_published_flag_is_accepted():
    fields = FinetuneConfig.__dataclass_fields__
    values = {"bool": "True", "int": "3", "int | None": "3", "float": "0.5"}
    arguments = [
        part for name in PUBLISHED.split() for part in (f"--{name}", values.get(_type_name(fields[name].type), "x"))
    ]
    config = parse(*arguments)
    assert config.run_id == "x" and config.resume_step == 3 and config.tensorboard_log_dir == Path("x")


def _type_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def test_pruner_grammar_and_none_arrive_as_text():
    assert (
        parse("--pruner", "lightvla:noise=gumbel,multiplicity=set").pruner == "lightvla:noise=gumbel,multiplicity=set"
    )
    assert parse("--pruner", "none").pruner == "none"
    assert parse().pruner is None


def test_run_id_says_what_distinguishes_the_run():
    config = FinetuneConfig(vla_path="a/openvla-7b", dataset_name="d", batch_size=4, grad_accumulation_steps=2)
    assert config.run_id == "openvla-7b+d+b8+lr-0.0005+lora-r32+dropout-0.0--image_aug"
    assert FinetuneConfig(vla_path="m", dataset_name="d", use_lora=False, image_aug=False, run_id_note="n").run_id == (
        "m+d+b8+lr-0.0005--n"
    )


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = FinetuneConfig(vla_path="~/base", data_root_dir=Path("~/data"), run_root_dir=Path("~/runs"))
    assert (config.vla_path, config.data_root_dir) == ("/home/someone/base", Path("/home/someone/data"))
    assert config.run_dir.parent == Path("/home/someone/runs")


def test_resuming_from_a_checkpoint_folder_keeps_the_run():
    config = FinetuneConfig(vla_path="runs/my--run--200_chkpt", resume="True", run_root_dir=Path("runs"))
    assert config.run_id == "my--run"
    assert config.checkpoint_dir(300) == Path("runs/my--run/checkpoints/my--run--300_chkpt")
    assert FinetuneConfig(vla_path="runs/my--run--200_chkpt").run_id != "my--run", "a second stage is a run of its own"


def test_resume_is_a_word_or_a_step():
    assert parse().resume == "auto" and parse("--resume", "True").resume == "True"
    assert parse("--resume", "2000").step_to_resume == 2000
    assert parse("--resume", "True", "--resume_step", "7").step_to_resume == 7
    with pytest.raises(ValueError, match="--resume 'maybe' is unknown; choose auto, True, False or a step"):
        _ = parse("--resume", "maybe").step_to_resume
