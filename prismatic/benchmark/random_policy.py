"""Policies with random weights made on the device, at given sizes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from prismatic.checkpoints.components import new_head
from prismatic.checkpoints.directory import Checkpoint
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.libraries import LlamaRotaryEmbedding, PreTrainedTokenizerFast
from prismatic.models.projectors import ProprioProjector
from prismatic.policy import Policy
from prismatic.vla.normalization import fit_statistics
from prismatic.vla.prompt import TokenIds, prompt_ids

PROMPT_TOKENS = 35
"""BOS, prompt and empty piece of a preset's instruction: the length for which FLOPs are quoted."""
TABLES = ("embed_tokens.weight", "pos_embed", "cls_token", "reg_token", "latent")
_STATISTICS = "made_up"
_VOCABULARY = 32064


@dataclass(frozen=True)
class Sizes:
    """Of a policy.

    Attributes:
        text: of the Llama; those of Llama-2 7B where nothing is said.
        vits: of the ViTs, arguments of timm for each; the published ones where nothing is said.
    """

    text: dict[str, Any] = field(default_factory=dict)
    vits: list[dict[str, Any]] | None = None


def _llama(width: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads}  # fmt: skip


SIZES = {
    "7b": Sizes(),
    # Small enough for one core to answer in a second; the proportions, images, tokens and prompt are the 7B policy's.
    "small": Sizes(_llama(512, 1376, 8, 8), [{"embed_dim": 384, "depth": 12, "num_heads": 6}] * 2),
    "tiny": Sizes(_llama(64, 96, 2, 2), [{"embed_dim": 32, "depth": 3, "num_heads": 2}] * 2),
}
"""By preset, all with two images of 256 patches, V = 512."""


@torch.no_grad()
def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random weights under which features stay of order one: norms and scales 1, biases 0, matrices by their inputs."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            deviation = 0.02 if name.endswith(TABLES) else parameter[0].numel() ** -0.5
            parameter.normal_(0, deviation, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def meta_parts(sizes: Sizes) -> tuple[OpenVLAForActionPrediction, Any, ProprioProjector]:
    """Model, L1 head and proprio projector without values."""
    config = OpenVLAConfig(
        text_config={"pad_token_id": 32000, "vocab_size": _VOCABULARY, "rms_norm_eps": 1e-6, **sizes.text},
        timm_model_kwargs=sizes.vits, pruner={"name": "lightvla", "multiplicity": "weighted"},
        num_images_in_input=2, action_head="l1", center_crop=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
        head: Any = new_head(model, "l1")
        projector = ProprioProjector(config.llama.hidden_size, model.robot.proprio_dim)
    return model, head, projector


def random_parts(
    sizes: Sizes, device: torch.device, dtype: torch.dtype
) -> tuple[OpenVLAForActionPrediction, Any, ProprioProjector]:
    """Model, L1 head and proprio projector with random weights, made on the device: no copy of them is elsewhere."""
    parts = meta_parts(sizes)
    modules: tuple[Any, ...] = parts
    generator = torch.Generator(device).manual_seed(0)
    for module in modules:
        fill(module.to(dtype).to_empty(device=device).eval(), generator)
    model = parts[0]
    # Its frequencies are computed, not stored, and rounded to bfloat16 they would turn late positions astray. Computed
    # on the CPU, as when a checkpoint is loaded: a GPU's powers may differ in the last bit.
    llama = model.language_model.model
    llama.rotary_emb = LlamaRotaryEmbedding(llama.config).to(device)
    others = [name for name, _ in model.named_buffers() if not name.startswith("language_model.model.rotary_emb.")]
    if others or llama.rotary_emb.inv_freq.dtype != torch.float32:
        raise RuntimeError(f"buffers {others} hold nothing yet; fill them as the rotary frequencies are")
    model.language_model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
    return parts


def _word_tokenizer(ids: TokenIds) -> PreTrainedTokenizerFast:
    """A token per word, whatever the word: a prompt's length is what a benchmark needs of it."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 300, "<s>": ids.bos}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids.bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", padding_side="right")


def instruction_of(length: int, ids: TokenIds | None = None) -> str:
    """Words whose prompt has so many tokens by the presets' tokenizer, BOS and empty piece included.

    Raises ValueError for a length that is too short for any instruction.
    """
    ids = ids or TokenIds()
    tokenizer = _word_tokenizer(ids)

    def count(words: int) -> int:
        return len(prompt_ids(lambda text: tokenizer(text)["input_ids"], "bowl " * words, ids))

    if (words := length - count(1) + 1) < 1:
        raise ValueError(f"a prompt of {length} tokens has no room for an instruction; the shortest has {count(1)}")
    return " ".join(["bowl"] * words)


def random_checkpoint(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Random parts with a tokenizer of words and made-up statistics; it lies in no folder."""
    model, head, projector = random_parts(sizes, device, dtype)
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=True, input_sizes=[[3, 224, 224]] * 2, interpolations=["bicubic"] * 2,
        means=[[0.5] * 3] * 2, stds=[[0.5] * 3] * 2,
    )  # fmt: skip
    processor = PrismaticProcessor(image_processor, _word_tokenizer(model.config.special_tokens))
    robot, draw = model.robot, np.random.default_rng(0)
    actions, states = (draw.uniform(-1, 1, (100, size)) for size in (robot.action_dim, robot.proprio_dim))
    statistics = {_STATISTICS: fit_statistics(actions, states, robot.action_mask, 1)}
    config_json = {"pruner": model.config.pruner_spec.to_json()}
    return Checkpoint(Path("random-weights"), config_json, model, head, projector, processor, statistics)


def policy_of(checkpoint: Checkpoint) -> Policy:
    """The eager policy of a checkpoint with made-up statistics."""
    return Policy(checkpoint, checkpoint.transform(_STATISTICS, center_crop=True), _STATISTICS, "eager")
