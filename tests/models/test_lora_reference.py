"""Three steps of LoRA training equal the reference's, and so do the weights that are then merged.

The reference adapts every layer, also those that no action depends on. They get no gradient there, so AdamW leaves
them alone, and ours, which leaves them out, must arrive at the same place. `tests/data/lora_reference.npz` holds its
numbers, every second row of large arrays (`STEP`, `KERNEL`).
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_checkpoint import reference_sample, reference_training_targets
from torch.nn.utils.rnn import pad_sequence

from prismatic.checkpoints.directory import Checkpoint
from prismatic.models.lora import ADAPTER, attach_lora, merged_weights
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner
from prismatic.vla.prompt import TokenIds, with_empty_piece

STEP = np.s_[::2]  # rows that the data file keeps
KERNEL = np.s_[..., ::7, ::7]  # pixels of convolution kernels that it keeps
PATCHES = "vision_backbone.featurizer.patch_embed.proj"
LAYERS = ("projector.fc3", "language_model.model.layers.0.self_attn.q_proj", PATCHES)


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "lora_reference.npz") as data:
        return dict(data)


def part_of(array: torch.Tensor, layer: str) -> np.ndarray:
    """The part of an array that the data file keeps."""
    kept = array.detach().float().numpy()[STEP]
    return kept[KERNEL] if layer == PATCHES and kept.ndim == 4 and kept.shape[-1] > 1 else kept


def start_as_the_reference(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            draws = np.random.RandomState(zlib.crc32(f"base_model.model.{name}".encode())).standard_normal(
                parameter.shape
            )
            parameter.data = torch.from_numpy(draws * (1 / 32 if "lora_A" in name else 0.02)).float()


def batch(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    samples = [reference_sample(index) for index in range(4)]
    rows = [torch.tensor(with_empty_piece(sample["input_ids"].tolist(), TokenIds())) for sample in samples]
    ids = pad_sequence(rows, batch_first=True, padding_value=TokenIds().pad)
    pixels = [checkpoint.processor.image_processor(list(sample["images"]))["pixel_values"] for sample in samples]
    actions, states = reference_training_targets(4)
    return {
        "input_ids": ids,
        "attention_mask": ids != TokenIds().pad,
        "pixel_values": torch.stack(pixels).flatten(1, 2),
        "actions": torch.from_numpy(actions),
        "states": torch.from_numpy(states),
    }


@pytest.mark.parametrize("name", ["lightvla", "oft"])
def test_three_steps_and_the_merged_weights(reference_checkpoint: Checkpoint, numbers, name):
    model, head, projector = (
        reference_checkpoint.model.train(),
        reference_checkpoint.action_head,
        reference_checkpoint.proprio_projector,
    )
    assert head is not None and projector is not None
    model.pruner = TokenPruner("weighted").train() if name == "lightvla" else KeepAllTokens()
    attach_lora(model, rank=32)
    start_as_the_reference(model)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*adapters, *head.parameters(), *projector.parameters()], lr=5e-4)
    inputs, losses = batch(reference_checkpoint), []
    for _ in range(3):
        out = model.action_hidden(
            inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"], inputs["states"], projector,
            mask_padding=False,
        )  # fmt: skip
        loss = (head.predict_action(out.rows) - inputs["actions"]).abs().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(losses, numbers[f"{name}/losses"], atol=1e-4)
    for layer in LAYERS:
        adapter = model.get_submodule(layer)
        for which in ("lora_A", "lora_B"):
            trained = getattr(adapter, which)[ADAPTER].weight
            assert_trained_alike(part_of(trained, layer), numbers[f"{name}/{layer}.{which}"], f"{layer}.{which}")
    assert_trained_alike(part_of(head.model.fc2.weight, ""), numbers[f"{name}/action_head.fc2.weight"], "head")
    assert_trained_alike(part_of(projector.fc1.weight, ""), numbers[f"{name}/proprio.fc1.weight"], "proprio")
    thrice_rounded = {layer: merged_as_the_reference(model.get_submodule(layer)) for layer in LAYERS}
    weights = merged_weights(model)
    for layer in LAYERS:
        theirs = numbers[f"{name}/{layer}.merged"]
        ours = part_of(weights[f"{layer}.weight"].make().to(torch.bfloat16), layer)
        np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-4)
        assert (ours == theirs).mean() > 0.94
        assert (part_of(thrice_rounded[layer], layer) == theirs).mean() > 0.99


def merged_as_the_reference(adapter: Any) -> torch.Tensor:
    """The reference loads adapters and weights as bfloat16, so it rounds the factors, their product and the sum."""
    a, b = (getattr(adapter, which)[ADAPTER].weight.detach().bfloat16().float() for which in ("lora_A", "lora_B"))
    weight = adapter.get_base_layer().weight.detach().bfloat16()
    delta = (b.flatten(1) @ a.flatten(1)).reshape(weight.shape) * adapter.scaling[ADAPTER]
    return weight + delta.bfloat16()


def assert_trained_alike(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    """Adam turns the sign of a vanishing gradient into a whole step of 5e-4: a few entries may be three steps off."""
    error = np.abs(ours - theirs)
    assert error.max() < 2 * 3 * 5e-4, what
    assert error.mean() < 2e-6, what
