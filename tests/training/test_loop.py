import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.saving import load_training_state
from prismatic.policy import Policy
from prismatic.stored_files import load_component
from prismatic.training.build import build
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.loop import BadInput, finetune, train, validate
from prismatic.vla.datasets.collate import collate
from prismatic.vla.datasets.sampler import SampleRequest


def lines(config: FinetuneConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(folder)
    parts = {"": checkpoint.model, "head.": checkpoint.action_head, "proprio.": checkpoint.proprio_projector}
    return {
        prefix + name: value
        for prefix, part in parts.items()
        if part is not None
        for name, value in part.state_dict().items()
    }


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert set(a) == set(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def test_a_run_learns_tells_and_saves(flags):
    config = flags(max_steps=12, use_val_set=True, val_freq=6, ema_decay=0.5, max_grad_norm=1.0)
    folder = finetune(config)
    assert folder == config.checkpoint_dir(12) and folder.is_dir()
    told = [line for line in lines(config) if "loss" in line]
    assert [line["step"] for line in told] == list(range(1, 13))
    assert told[-1]["loss"] < told[0]["loss"]
    first = told[0]
    assert first["noise_scale"] == 1.0 and first["learning_rate"] == 1e-3 and first["grad_norm"] > 0
    assert len(first["tokens_kept_per_image"]) == 2
    assert sum(first["tokens_kept_per_image"]) == pytest.approx(first["tokens_kept"])
    assert [line["step"] for line in lines(config) if "val_loss" in line] == [6, 12]
    assert json.loads((folder / "config.json").read_text())["center_crop"] is True
    assert list(json.loads((folder / "dataset_statistics.json").read_text())) == ["libero_tiny_no_noops"]


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_saved_checkpoint_is_the_trained_policy(flags, small_base: Path, use_lora):
    folder = finetune(flags(use_lora=use_lora, lora_rank=4, max_steps=2))
    policy = Policy.from_pretrained(folder, dtype="float32")
    rng = np.random.default_rng(0)
    observation = {
        "full_image": rng.integers(0, 255, (64, 64, 3), np.uint8),
        "wrist_image": rng.integers(0, 255, (64, 64, 3), np.uint8),
        "state": np.zeros(8),
    }
    actions = policy.act(observation, "turn on the stove")
    assert actions.shape == (8, 7) and np.isfinite(actions).all()
    auto = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert set(auto.state_dict()) == set(load_checkpoint(small_base).model.state_dict())
    state = policy.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in auto.state_dict().items())
    base = load_checkpoint(small_base).model.state_dict()
    assert any(not torch.equal(state[name], base[name]) for name in base), "nothing was learnt"
    assert (folder / "lora_adapter" / "adapter_model.safetensors").is_file() == use_lora


@pytest.mark.parametrize(
    "overrides",
    [
        {"ema_decay": 0.9, "lr_schedule": "cosine"},
        {"use_lora": True, "lora_rank": 4, "grad_accumulation_steps": 2, "batch_size": 2},
        {"save_latest_checkpoint_only": True},
        {"use_lora": True, "lora_rank": 4, "pruner": "lightvla_star:site=llama,layer=1,queries=6"},
    ],
    ids=["full", "lora", "latest", "queries"],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(flags, overrides):
    whole = finetune(flags(run_id_override="whole", **overrides))
    broken = flags(run_id_override="broken", save_freq=2, **overrides)
    # Stop behind step 2: the schedule of 4 steps goes on, so only the loop may end early.
    interrupted = stop_after(broken, 2)
    assert interrupted.is_dir()
    broken.resume = True
    resumed = finetune(broken)
    assert_same_weights(whole, resumed)
    told = {line["step"]: line["loss"] for line in lines(broken)}
    assert told == {line["step"]: line["loss"] for line in lines(flags(run_id_override="whole"))}


def stop_after(config: FinetuneConfig, step: int) -> Path:
    """Run `config`, but as if killed just after the checkpoint of `step`."""
    run = build(config, Ranks(0, 1, torch.device("cpu")))
    config.run_dir.mkdir(parents=True, exist_ok=True)

    class Killed(BaseException):
        pass

    class StoppingRanks(Ranks):
        def barrier(self) -> None:  # the first thing after a save
            if run.training.step == step:
                raise Killed

    run.ranks = StoppingRanks(0, 1, torch.device("cpu"))
    with pytest.raises(Killed):
        train(run)
    return config.checkpoint_dir(step)


def test_accumulated_micro_batches_equal_one_large_batch(flags):
    large = flags(run_id_override="large", batch_size=4, max_steps=2)
    small = flags(run_id_override="small", batch_size=2, grad_accumulation_steps=2, max_steps=2)
    finetune(large)
    finetune(small)
    assert [line["step"] for line in lines(small)] == [1, 2]
    for a, b in zip(lines(large), lines(small), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["tokens_kept"] == b["tokens_kept"]


def test_a_finished_run_is_not_overwritten(flags):
    finetune(flags(max_steps=1))
    with pytest.raises(BadInput, match=r"already has a checkpoint .*--resume True"):
        finetune(flags(max_steps=1))
    with pytest.raises(BadInput, match="is at step 1 already; to go on pass --max_steps"):
        finetune(flags(max_steps=1, resume=True))
    with pytest.raises(BadInput, match="--resume_step 7: .* is at step 1"):
        finetune(flags(max_steps=2, resume=True, resume_step=7))
    with pytest.raises(BadInput, match="--use_lora True: the run that is resumed had False"):
        finetune(flags(max_steps=2, resume=True, use_lora=True))


def test_an_existing_head_is_loaded_and_a_new_one_is_said(flags, small_policy_directory: Path, caplog):
    caplog.set_level("INFO")
    run = build(flags(vla_path=str(small_policy_directory)), Ranks(0, 1, torch.device("cpu")))
    assert "action head: loaded from" in caplog.text and "proprio projector: loaded from" in caplog.text
    stored = load_component(next(small_policy_directory.glob("action_head--*")))
    assert all(torch.equal(value, stored[name]) for name, value in run.module.action_head.state_dict().items())
    caplog.clear()
    build(flags(), Ranks(0, 1, torch.device("cpu")))
    assert "action head: new" in caplog.text and "proprio projector: new" in caplog.text


def test_without_merging_only_the_adapter_is_saved(flags):
    folder = finetune(flags(use_lora=True, lora_rank=4, max_steps=1, merge_lora_during_training=False))
    assert not list(folder.glob("model*.safetensors"))
    assert (folder / "lora_adapter" / "adapter_config.json").is_file()
    assert (folder / "action_head--1_checkpoint.pt").is_file()


def test_queries_are_saved_beside_an_adapter_that_is_not_merged(flags):
    star = "lightvla_star:site=llama,layer=1,queries=6"
    folder = finetune(flags(use_lora=True, lora_rank=4, max_steps=1, merge_lora_during_training=False, pruner=star))
    stored = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    trained = load_training_state(folder)["parameters"]["model.pruner.queries"]
    assert torch.equal(stored["base_model.model.pruner.queries"], trained)


def test_validation_computes_what_inference_computes(flags):
    run = build(flags(use_val_set=True, image_aug=False, batch_size=3), Ranks(0, 1, torch.device("cpu")))
    told = validate(run)
    assert run.val_data is not None and told["frames"] == len(run.val_data)
    policy_form = run.module.eval()
    losses = []
    for index in range(len(run.val_data)):
        sample = run.val_data[SampleRequest(0, index)]
        with torch.no_grad():
            losses.append(policy_form(collate([sample], run.val_data.transform.pad_token_id))[0].item())
    assert told["loss"] == pytest.approx(np.mean(losses), abs=1e-6)


def test_a_published_checkpoint_goes_on_weighted_and_keeps_its_layout(flags, reference_directory: Path):
    config = flags(
        vla_path=str(reference_directory), use_lora=True, lora_rank=4, batch_size=1, max_steps=1, precision="bf16"
    )
    folder = finetune(config)
    written, published = (json.loads((path / "config.json").read_text()) for path in (folder, reference_directory))
    assert "pruner" not in published
    assert written["pruner"] == {"name": "lightvla", "multiplicity": "weighted", "noise": "uniform"}
    before, after = load_checkpoint(reference_directory).model.state_dict(), load_checkpoint(folder).model.state_dict()
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    never_run = [name for name in before if "lm_head" in name]
    assert never_run and all(torch.equal(before[name], after[name]) for name in never_run)
