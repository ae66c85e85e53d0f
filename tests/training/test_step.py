import pytest
import torch

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.training.build import Run, build
from prismatic.training.distributed import Ranks
from prismatic.training.heads import diffusion_draws
from prismatic.training.loading import train_batches
from prismatic.training.loop import finetune
from prismatic.training.step import learning_rate, make_optimizer

STAR = "lightvla_star:site=llama,layer=1,queries=6"
ALONE = Ranks(0, 1, torch.device("cpu"))


def first_batch(run: Run) -> dict:
    batch = next(train_batches(run))
    return batch | diffusion_draws(run.module.action_head, run.config.seed, batch["positions"])


HEADS = {
    "l1": {},
    "diffusion": {"use_l1_regression": False, "use_diffusion": True},
    "discrete": {"use_l1_regression": False},
    "film": {"use_film": True},
}


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("pruner", ["lightvla", "none", STAR])
@pytest.mark.parametrize("head", HEADS)
def test_every_trained_parameter_gets_a_gradient(flags, use_lora, pruner, head):
    run = build(flags(use_lora=use_lora, lora_rank=2, pruner=pruner, **HEADS[head]), ALONE)
    run.module.train()
    loss, _ = run.module(first_batch(run))
    loss.backward()
    without = [name for name, parameter in run.training.trained.items() if parameter.grad is None]
    assert not without
    frozen = {name for name, parameter in run.module.named_parameters() if parameter.requires_grad} ^ set(
        run.training.trained
    )
    assert not frozen


@pytest.mark.parametrize("use_lora", [False, True])
def test_queries_are_trained_in_float32_beside_adapters_too(flags, use_lora):
    config = flags(use_lora=use_lora, lora_rank=2, lora_dropout=0.1, pruner=STAR, precision="bf16", max_steps=3)
    run = build(config, ALONE)
    queries = run.training.trained["model.pruner.queries"]
    assert queries.dtype == torch.float32 and queries is run.module.model.pruner.queries
    before = queries.detach().clone()
    after = load_checkpoint(finetune(config)).model.pruner.queries
    assert (after != before).any(1).all(), "the saved queries are the trained ones"


def test_full_fine_tuning_leaves_out_only_what_is_never_run(flags):
    run = build(flags(), ALONE)
    frozen = {name for name, parameter in run.module.named_parameters() if not parameter.requires_grad}
    unused = ("blocks.1.", ".norm.", "lm_head.")
    assert frozen and all(any(part in name for part in unused) for name in frozen), frozen
    assert not any(name.startswith("model.language_model.model.") for name in frozen)


def test_loss_is_the_mean_absolute_error_of_normalised_actions(flags):
    run = build(flags(image_aug=False), ALONE)
    run.module.eval()
    batch = first_batch(run)
    with torch.no_grad():
        loss, metrics = run.module(batch)
        hidden = run.module.model.action_hidden(
            batch["input_ids"],
            batch["attention_mask"],
            batch["pixel_values"],
            batch["proprio"],
            run.module.proprio_projector,
        )
        error = (run.module.action_head.predict_action(hidden.rows) - batch["actions"]).abs()
    assert loss.item() == pytest.approx(error.sum().item() / (4 * 8 * 7), rel=1e-6)
    assert metrics.current_l1.item() == pytest.approx(error[:, 0].mean().item(), rel=1e-6)
    assert metrics.next_l1.item() == pytest.approx(error[:, 1:].mean().item(), rel=1e-6)
    assert torch.equal(metrics.kept.sum(1), hidden.selection.distinct())


def test_noise_changes_the_picks_in_training_only(flags):
    run = build(flags(), ALONE)
    batch = first_batch(run)
    tokens = run.training.checkpoint.model.num_visual_tokens
    noise = 10 * torch.rand(4, tokens, tokens)
    with torch.no_grad():
        run.module.train()
        quiet, loud = run.module(batch)[1], run.module(batch, noise)[1]
        assert not torch.equal(quiet.kept, loud.kept)
        run.module.eval()
        assert torch.equal(run.module(batch)[1].kept, run.module(batch, noise)[1].kept)


def test_matrices_decay_and_vectors_do_not(flags):
    run = build(flags(weight_decay=0.1), ALONE)
    matrices, vectors = make_optimizer(run.training.trained, run.config).param_groups
    assert matrices["weight_decay"] == 0.1 and all(p.ndim > 1 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0 and all(p.ndim <= 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(run.training.trained)


def test_learning_rate_joins_warmup_and_decay(flags):
    config = flags(learning_rate=1.0, lr_warmup_steps=2, num_steps_before_decay=3)
    assert [learning_rate(config, step, config.max_steps) for step in range(5)] == pytest.approx(
        [0.55, 1.0, 1.0, 0.1, 0.1]
    )
