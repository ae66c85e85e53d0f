"""A policy with random weights made on the device, and its inputs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_checkpoint import reference_image, write_reference_checkpoint

from prismatic.benchmark.fixed_tokens import KeepExactly
from prismatic.benchmark.random_policy import SIZES, Sizes, random_parts
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.inference.compiled import CompiledEngine
from prismatic.inference.engine import Parts as EngineParts
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner
from prismatic.policy import Policy


@dataclass(frozen=True)
class Preset:
    """Sizes of the policy, and how much of it is measured.

    Attributes:
        text: sizes of the Llama; those of Llama-2 7B where nothing is said.
        vits: sizes of the ViTs; the published ones where nothing is said.
        kept: visual tokens that LightVLA is made to keep.
        prompt: BOS, prompt and empty piece.
        batches: observations at once.
        train_batches: samples in a training step.
        steps: measured training steps.
        repeats: measured calls.
        observations: told alone and at once by the tiny policy.
        samples: recorded ones that every pruner and head computes on the CPU and on the device.
        matmul: side of the matrices for the card's ceiling.
        copied: bytes that are copied for the card's ceiling.
    """

    text: dict[str, Any] = field(default_factory=dict)
    vits: list[dict[str, Any]] | None = None
    kept: int = 78
    prompt: int = 35
    batches: tuple[int, ...] = (8, 16)
    train_batches: tuple[int, ...] = (1, 8)
    steps: int = 3
    repeats: int = 20
    observations: int = 7
    samples: int = 4
    matmul: int = 8192
    copied: int = 2**31


PRESETS = {
    "7b": Preset(),
    "tiny": Preset(
        text=SIZES["tiny"].text, vits=SIZES["tiny"].vits,
        batches=(2, 3), train_batches=(1, 2), steps=1, repeats=3, observations=3, samples=2, matmul=256, copied=2**20,
    ),
}  # fmt: skip


@dataclass
class Parts:
    """Model, L1 head and proprio projector in bfloat16, as a policy has them on a GPU."""

    model: OpenVLAForActionPrediction
    head: Any
    projector: ProprioProjector
    prompt: int

    @classmethod
    def build(cls, preset: Preset, device: torch.device) -> "Parts":
        """Made on the device: no copy of the weights is anywhere else."""
        sizes = Sizes(preset.text, preset.vits)
        model, head, projector = random_parts(sizes, device, torch.bfloat16)
        model.language_model.set_attn_implementation("sdpa")
        return cls(model, head, projector, preset.prompt)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def batch(self, size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Made-up inputs of `size` samples, as they are collated."""
        generator = torch.Generator().manual_seed(seed)
        sizes = self.model.config.image_sizes or [224]
        channels = self.model.num_images_in_input * self.model.vision_backbone.channels_per_image
        ids = torch.randint(300, 30000, (size, self.prompt), generator=generator)
        ids[:, 0] = 1
        values = {
            "input_ids": ids,
            "attention_mask": torch.ones(size, self.prompt, dtype=torch.bool),
            "pixel_values": torch.randn(size, channels, sizes[0], sizes[0], generator=generator),
            "proprio": torch.rand(size, self.model.robot.proprio_dim, generator=generator) * 2 - 1,
        }
        return {name: value.to(self.device) for name, value in values.items()}

    def encode(self, batch: dict[str, torch.Tensor]) -> Any:
        """Everything before the LLM."""
        return self.model.encode(**batch, proprio_projector=self.projector)  # type: ignore[arg-type]

    def answer(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Normalised actions, and what they were read from."""
        return self.head.predict(self.model, self.encode(batch))

    def engine(self, padded: bool | None = None) -> CompiledEngine:
        """The compiled engine over these parts."""
        return CompiledEngine(EngineParts(self.model, self.head, self.projector), padded)

    def policies(self, kept: int) -> dict[str, Callable[[], None]]:
        """By name of what is compared: what makes the model prune so."""
        model = self.model

        def force() -> None:
            model.pruner = KeepExactly(kept, model.num_visual_tokens, self.device)

        def unpruned() -> None:
            model.pruner = KeepAllTokens()

        return {"none": unpruned, f"lightvla K={kept}": force, "lightvla": self.prune}

    def prune(self) -> None:
        """LightVLA, which keeps what random weights make it keep."""
        self.model.pruner = TokenPruner("weighted")


@dataclass
class Card:
    """What the sections share.

    Attributes:
        device: where to run.
        preset: sizes.
        folder: for files; removed in the end.
        matmul_flops: reached by a large bfloat16 matrix product, per second; None: not measured.
        copy_bytes: read and written by a large copy on the device, per second; None: not measured.
    """

    device: torch.device
    preset: Preset
    folder: Path
    matmul_flops: float | None = None
    copy_bytes: float | None = None
    _parts: Parts | None = None

    def parts(self) -> Parts:
        """The policy with random weights; the same one until `drop`."""
        if self._parts is None:
            with torch.inference_mode(False):  # else no gradient could pass later
                self._parts = Parts.build(self.preset, self.device)
        return self._parts

    def drop(self) -> None:
        """Forget the policy, so that its memory is free once nobody holds it."""
        self._parts = None

    def reference(self) -> Path:
        """The tiny checkpoint on which numbers were recorded from the research code."""
        folder = self.folder / "reference"
        return folder if folder.is_dir() else write_reference_checkpoint(folder)

    def policy(self) -> Policy:
        """`parts` as a `Policy`, with the tokenizer and the statistics of the tiny checkpoint."""
        parts = self.parts()
        small = load_checkpoint(self.reference(), LoadOptions(pruner=PrunerSpec("none")))
        small.model, small.action_head, small.proprio_projector = parts.model, parts.head, parts.projector
        small.config_json = parts.model.config.to_dict()
        key = next(iter(small.dataset_statistics))
        return Policy(small, small.transform(key, center_crop=True), key)


def observations(policy: Policy, number: int) -> tuple[list[dict[str, np.ndarray]], list[str]]:
    """Made-up observations and instructions of different lengths for a policy."""
    rng, robot = np.random.default_rng(0), policy.robot
    statistics = policy.norm_stats[policy.unnorm_key]["proprio"]
    words = ("put", "the", "black", "bowl", "on", "the", "wooden", "plate", "now")
    looks = [
        {
            **{camera: reference_image(10 * index + place, 256) for place, camera in enumerate(robot.cameras)},
            robot.state_key: rng.uniform(statistics["q01"], statistics["q99"]),
        }
        for index in range(number)
    ]
    return looks, [" ".join(words[: 4 + index % 6]) for index in range(number)]
