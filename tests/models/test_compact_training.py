"""Training over distinct picks equals training over one row per query, exactly, through the whole model.

In float64 nothing hides behind rounding: loss and every gradient agree to 1e-12.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightvla.demo.small_model import SmallModelConfig, build
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.lora import attach_lora
from prismatic.models.projectors import ProprioProjector
from prismatic.models.token_pruner import TokenPruner, TokenSelection
from prismatic.training.step import TrainableVLA

EXACT = 1e-12
TOKENS = 32  # two images of 16 patches
LENGTHS = (9, 14, 11)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = SmallModelConfig(
        tmp_path_factory.mktemp("compact") / "base", image_size=64, vision_dim=32, vision_depth=2, vision_heads=2,
        llm_dim=32, llm_layers=3, llm_heads=2, llm_mlp=48,
    )  # fmt: skip
    return build(sizes)


class _ExactRMSNorm(nn.Module):
    """transformers' norm rounds to float32 on its way, which this comparison must not."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def exact_module(folder: Path, lora: bool, seed: int) -> TrainableVLA:
    """Model, head and projector in float64, with new random weights for what a base lacks."""
    checkpoint = load_checkpoint(folder, LoadOptions(dtype=torch.float64, attention="sdpa"))
    model, robot = checkpoint.model, checkpoint.model.robot
    torch.manual_seed(seed)
    if lora:
        attach_lora(model, rank=4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(parent, name, _ExactRMSNorm(child))
    head = L1RegressionActionHead(32, robot.action_dim, robot.chunk_length)
    return TrainableVLA(model, head, ProprioProjector(32, robot.proprio_dim)).double().train()


def ragged_batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size, width = len(LENGTHS), max(LENGTHS)
    return {
        "input_ids": torch.randint(10, 200, (size, width), generator=generator),
        "attention_mask": torch.arange(width)[None] < torch.tensor(LENGTHS)[:, None],
        "pixel_values": torch.randn(size, 6, 64, 64, generator=generator, dtype=torch.float64),
        "proprio": torch.randn(size, 8, generator=generator, dtype=torch.float64),
        "actions": torch.randn(size, 8, 7, generator=generator, dtype=torch.float64),
    }


def noise_for(distinct: tuple[int, ...], seed: int) -> torch.Tensor:
    """Noise (B, V, V) that makes each sample's queries pick exactly that many tokens; the softmax is not saturated."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(distinct), TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    for row, number in enumerate(distinct):
        chosen = torch.randperm(TOKENS, generator=generator)[:number]
        picks = chosen[torch.randint(number, (TOKENS,), generator=generator)]
        picks[torch.randperm(TOKENS, generator=generator)[:number]] = chosen
        noise[row, torch.arange(TOKENS), picks] += 12.0
    return noise


def loss_and_gradients(
    module: TrainableVLA, pruner: nn.Module, batch: dict[str, torch.Tensor], noise: torch.Tensor
) -> tuple[list[int], dict[str, torch.Tensor]]:
    module.model.pruner = pruner.train()
    kept: list[int] = []

    def watch(_: nn.Module, __: tuple[torch.Tensor, ...], selection: TokenSelection) -> None:
        kept.extend(selection.distinct().tolist())

    handle = pruner.register_forward_hook(watch)
    module.zero_grad(set_to_none=True)
    loss, _ = module(batch, noise)
    loss.backward()
    handle.remove()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return kept, {"loss": loss.detach(), **gradients}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert set(first) == set(second)
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("distinct", [(1, 1, 1), (1, TOKENS, 9), (2, 5, 30), (TOKENS, TOKENS, TOKENS), (17, 3, 24)])
def test_compact_equals_duplicated(small_checkpoint: Path, distinct: tuple[int, ...], lora: bool) -> None:
    seed = sum(distinct)
    module, batch, noise = exact_module(small_checkpoint, lora, seed), ragged_batch(seed), noise_for(distinct, seed)
    picked, compact = loss_and_gradients(module, TokenPruner("weighted", compact=True), batch, noise)
    _, duplicated = loss_and_gradients(module, TokenPruner("weighted", compact=False), batch, noise)
    assert picked == list(distinct)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert len(compact) > 0.5 * len(trained) and all(value.abs().max() > 0 for value in compact.values())
    assert largest_difference(compact, duplicated) < EXACT


class _CountsOneMore(TokenPruner):
    def forward(self, *args: torch.Tensor) -> TokenSelection:
        selection = super().forward(*args)
        selection.count = selection.count + 1
        return selection


@pytest.mark.parametrize("wrong", [TokenPruner("set"), _CountsOneMore("weighted")])
def test_other_weights_are_told_apart(small_checkpoint: Path, wrong: TokenPruner) -> None:
    """The comparison would notice a missing or a wrong log(count)."""
    module, batch, noise = exact_module(small_checkpoint, False, 0), ragged_batch(0), noise_for((4, 11, 20), 0)
    _, duplicated = loss_and_gradients(module, TokenPruner("weighted", compact=False), batch, noise)
    _, other = loss_and_gradients(module, wrong, batch, noise)
    assert largest_difference(other, duplicated) > 1e-6
