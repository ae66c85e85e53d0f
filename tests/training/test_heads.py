"""Every head trains, is saved, goes on and acts, with one command each."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from prismatic.models.diffusion import DiffusionActionHead
from prismatic.policy import Policy
from prismatic.training.build import build
from prismatic.training.distributed import Ranks
from prismatic.training.heads import diffusion_draws
from prismatic.training.loading import train_batches
from prismatic.training.loop import BadInput, finetune
from prismatic.training.preflight import check_flags

ALONE = Ranks(0, 1, torch.device("cpu"))
KINDS = {
    "l1+film": {"use_film": True},
    "diffusion": {"use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 5},
    "diffusion+film": {
        "use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 5, "use_film": True,
    },
    "discrete": {"use_l1_regression": False},
}  # fmt: skip


def observation() -> dict:
    rng = np.random.default_rng(3)
    pictures = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("full_image", "wrist_image")}
    return {**pictures, "state": np.zeros(8)}


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_trains_and_acts(flags, kind, use_lora):
    config = flags(
        **KINDS[kind],
        use_lora=use_lora,
        lora_rank=2,
        max_steps=2,
        use_val_set=True,
        val_freq=2,
        diffusion_sample_freq=1,
    )
    folder = finetune(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert ("sampled_l1" in lines[0]) == ("diffusion" in kind)
    torch.manual_seed(0)
    policy = Policy.from_pretrained(folder, dtype="float32")
    assert policy.description()["action_head"] == kind.partition("+")[0]
    assert policy.description()["use_film"] == ("film" in kind)
    assert policy.act(observation(), "put the bowl on the plate").shape == (8, 7)


def test_what_inference_would_err_is_told_whatever_the_log_s_frequency(flags):
    config = flags(**KINDS["diffusion"], max_steps=8, log_freq=4, diffusion_sample_freq=3, tensorboard_log_freq=4)
    finetune(config)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    # Computed at 1, 3 and 6; told with the next line.
    assert [line["step"] for line in lines if "sampled_l1" in line] == [1, 4, 8]


def test_a_resumed_diffusion_run_ends_where_an_undisturbed_one_ends(flags):
    same = {**KINDS["diffusion"], "save_freq": 2, "noise_schedule": "constant"}
    whole = finetune(flags(**same, run_id_override="whole", max_steps=4))
    finetune(flags(**same, run_id_override="parts", max_steps=2))
    parts = finetune(flags(**same, run_id_override="parts", max_steps=4, resume=True))
    for name in ("action_head--4_checkpoint.pt", "noisy_action_projector--4_checkpoint.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_a_diffusion_head_keeps_its_number_of_steps(flags, caplog):
    folder = str(finetune(flags(**KINDS["diffusion"], max_steps=1)))
    more = {"vla_path": folder, "use_l1_regression": False, "use_diffusion": True}
    assert build(flags(**more, run_id_override="more"), ALONE).module.action_head.num_train_steps == 5
    with pytest.raises(BadInput, match="num_diffusion_steps_train 7: .* was trained with 5 steps"):
        finetune(flags(**more, run_id_override="other", num_diffusion_steps_train=7))
    check_flags(flags(num_diffusion_steps_train=7))
    assert "--use_diffusion is False: it is not used" in caplog.text
    anew = flags(vla_path=str(finetune(flags(vla_path=folder, run_id_override="l1", max_steps=1))), use_diffusion=True,
                 use_l1_regression=False, run_id_override="anew")  # fmt: skip
    assert build(anew, ALONE).module.action_head.num_train_steps == 50


def test_film_is_not_dropped_silently(flags):
    folder = finetune(flags(max_steps=1, use_film=True))
    with pytest.raises(ValueError, match="has FiLM, which cannot be taken out again; pass --use_film True"):
        build(flags(vla_path=str(folder), run_id_override="without"), ALONE)


def test_draws_belong_to_samples_not_to_batches():
    head = DiffusionActionHead(16, 7, 8)
    together = diffusion_draws(head, 7, torch.tensor([5, 6, 7]))
    alone = diffusion_draws(head, 7, torch.tensor([6]))
    assert torch.equal(together["diffusion_noise"][1], alone["diffusion_noise"][0])
    assert together["diffusion_timesteps"][1] == alone["diffusion_timesteps"][0]
    many = diffusion_draws(head, 7, torch.arange(2000))
    assert abs(many["diffusion_noise"].mean()) < 0.01 and abs(many["diffusion_noise"].std() - 1) < 0.01
    assert set(many["diffusion_timesteps"].tolist()) == set(range(50))


def test_what_was_loaded_and_what_is_new_is_said(flags, caplog, tmp_path):
    caplog.set_level("INFO")
    folder = finetune(flags(max_steps=1, pruner="lightvla"))
    assert "l1 action head: new" in caplog.text and "was never tuned to act" in caplog.text
    caplog.clear()
    build(flags(vla_path=str(folder), run_id_override="second"), ALONE)
    assert f"l1 action head: loaded from {folder}" in caplog.text
    assert f"proprio projector: loaded from {folder}" in caplog.text
    assert "never tuned" not in caplog.text
    # The original base has its robots' statistics in its config, and cannot act either.
    base = shutil.copytree(flags().vla_path, tmp_path / "base")
    (base / "dataset_statistics.json").unlink(missing_ok=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "norm_stats": {"bridge_orig": {"action": {}}}}))
    build(flags(vla_path=str(base), run_id_override="original", pruner="lightvla"), ALONE)
    assert "was never tuned to act" in caplog.text
    caplog.clear()
    build(flags(vla_path=str(folder), run_id_override="third", use_l1_regression=False, use_diffusion=True), ALONE)
    assert "action head is of kind l1 and is left out" in caplog.text
    assert "diffusion action head: new" in caplog.text


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_gradient_checkpointing_changes_no_gradient(flags, use_lora, compact):
    gradients = []
    for checkpointing in (False, True):
        config = flags(
            use_lora=use_lora, lora_rank=2, compact_training=compact, gradient_checkpointing=checkpointing,
            pruner="lightvla", image_aug=False,
        )  # fmt: skip
        run = build(config, ALONE)
        run.module.train()
        calls = []
        layer = run.module.model.language_model.model.layers[0].self_attn
        layer.register_forward_hook(lambda module, args, output, calls=calls: calls.append(1))
        loss, _ = run.module(next(train_batches(run)))
        loss.backward()
        assert len(calls) == 1 + checkpointing  # forward, and again in the backward pass
        gradients.append({name: parameter.grad for name, parameter in run.training.trained.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("parts", "runs"), {"vits": (2, 1), "llm": (1, 2), "True": (2, 2), "False": (1, 1)}.items())
def test_activations_are_computed_twice_where_the_flag_says(flags, parts, runs):
    run = build(flags(gradient_checkpointing=parts, use_lora=True, lora_rank=2), ALONE)
    run.module.train()
    calls: Counter[str] = Counter()
    model = run.module.model
    layers = {
        "vit": model.vision_backbone.vits[0].blocks[0].attn,
        "llm": model.language_model.model.layers[0].self_attn,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    loss, _ = run.module(next(train_batches(run)))
    loss.backward()
    assert (calls["vit"], calls["llm"]) == runs


def test_an_original_checkpoint_is_a_base_like_any_other(flags, original_directory):
    folder = finetune(flags(vla_path=str(original_directory), max_steps=1, batch_size=2, num_images_in_input=1))
    policy = Policy.from_pretrained(folder)
    assert policy.description()["action_head"] == "l1" and policy.description()["pruner"].startswith("lightvla")
    assert policy.act(observation(), "put the bowl on the plate").shape == (8, 7)
