"""Build a small untrained checkpoint: the code path of a 7B policy at a size that trains on two CPU cores.

    lightvla build-small-model --output_dir runs/small-base

Writes the published layout: one or two tiny ViTs at reduced resolution, a tiny Llama, a tokenizer trained here, and
initialisation suited to training from scratch. `lightvla finetune --vla_path runs/small-base` takes it on.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightvla.demo.settings import SmallModelConfig
from prismatic.checkpoints.directory import Checkpoint
from prismatic.checkpoints.files import PROCESSOR_FILES, read_small_files
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.command_status import UNUSABLE, print_error
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.vla.prompt import TokenIds, format_prompt
from prismatic.vla.robots import get_robot

logger = logging.getLogger(__name__)

ACTION_BINS = 256
# Enough English for table-top instructions; other words fall back to pieces and bytes.
SENTENCES = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "pick up the black bowl next to the cookie box and place it on the plate",
    "pick up the black bowl from the table center in the top drawer of the wooden cabinet",
    "pick up the alphabet soup and place it in the basket",
    "pick up the cream cheese, the salad dressing, the bbq sauce, the ketchup, the tomato sauce, the butter, the milk",
    "pick up the chocolate pudding, the orange juice, the red mug, the white mug, the yellow and white mug",
    "open the middle drawer of the cabinet", "close the bottom drawer of the cabinet",
    "put the bowl on the stove", "put the wine bottle on top of the cabinet", "put the wine bottle on the rack",
    "push the plate to the front of the stove", "put the bowl on the plate", "put the bowl on top of the cabinet",
    "turn on the stove", "turn off the stove and put the moka pot on it", "put both moka pots on the stove",
    "put the book in the back compartment of the caddy", "put it in the microwave and close it to the left or right",
)  # fmt: skip


def build_tokenizer(vocab_size: int = 640) -> tuple[PreTrainedTokenizerFast, TokenIds]:
    """A byte-level BPE over instructions, with special and action tokens behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>", "<empty>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([format_prompt(sentence) for sentence in SENTENCES], trainer)
    tokenizer.add_special_tokens([f"<action_{i}>" for i in range(ACTION_BINS)])
    vocabulary = tokenizer.get_vocab()
    bos = vocabulary["<s>"]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    ids = {name: vocabulary[token] for name, token in zip(("bos", "stop", "pad", "empty"), specials, strict=True)}
    action_end = vocabulary[f"<action_{ACTION_BINS - 1}>"] + 1
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    return wrapped, TokenIds(action_end=action_end, **ids)


def build_config(config: SmallModelConfig, ids: TokenIds) -> dict[str, Any]:
    """`config.json` of the small model."""
    vits = 2 if config.fused else 1
    vit = {"embed_dim": config.vision_dim, "depth": config.vision_depth, "num_heads": config.vision_heads}
    robot = {**get_robot(config.robot).to_json(), "canonical_quaternion": config.canonical_quaternion}
    text = {
        "model_type": "llama", "vocab_size": -(-ids.action_end // 64) * 64, "hidden_size": config.llm_dim,
        "intermediate_size": config.llm_mlp, "num_hidden_layers": config.llm_layers,
        "num_attention_heads": config.llm_heads, "num_key_value_heads": config.llm_heads, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048, "initializer_range": 0.1, "pad_token_id": ids.pad, "bos_token_id": ids.bos,
        "eos_token_id": ids.stop,
    }  # fmt: skip
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla", "torch_dtype": "float32",
        "timm_model_ids": ["vit_tiny_patch16_224"] * vits, "timm_override_act_layers": [None] * vits,
        "timm_model_kwargs": [vit] * vits, "image_sizes": [config.image_size] * vits,
        "use_fused_vision_backbone": config.fused, "vision_backbone_id": "small-vit", "llm_backbone_id": "small-llama",
        "arch_specifier": "no-align+fused-gelu-mlp" if config.fused else "no-align+gelu-mlp",
        "n_action_bins": ACTION_BINS, "pad_token_id": ids.pad, "norm_stats": {}, "text_config": text,
        "pruner": config.pruner, "action_readout": "aligned", "robot": robot, "token_ids": ids.to_json(),
        "num_images_in_input": config.num_images_in_input,
    }  # fmt: skip


def grid_positions(side: int, dim: int) -> torch.Tensor:
    """Sines and cosines of the columns, then of the rows, of a square grid: (side^2, dim), each feature with mean 0."""
    rows_first = build_sincos2d_pos_embed([side, side], dim, interleave_sin_cos=True)
    features = rows_first.roll(dim // 2, dims=1)
    return features - features.mean(0)


@torch.no_grad()
def initialise_vit(vit: Any) -> None:
    """For training from scratch: variance-preserving weights, and positions as strong as what the patches show.

    With timm's small random positions a patch hardly knows where it is, and the policy learns to do without looking.
    """
    vit.init_weights("jax")
    first = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
    vit.pos_embed[0, first:] = grid_positions(vit.patch_embed.grid_size[0], vit.embed_dim)


def build(config: SmallModelConfig) -> Path:
    """Write the checkpoint; returns its directory."""
    torch.manual_seed(config.seed)
    tokenizer, ids = build_tokenizer()
    vits = 2 if config.fused else 1
    config_json = build_config(config, ids)
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=config.fused, input_sizes=[[3, config.image_size, config.image_size]] * vits,
        interpolations=["bicubic"] * vits, means=[[0.5] * 3] * vits, stds=[[0.5] * 3] * vits,
    )  # fmt: skip
    model = OpenVLAForActionPrediction(OpenVLAConfig(**{k: v for k, v in config_json.items() if k != "model_type"}))
    for vit in model.vision_backbone.vits:
        initialise_vit(vit)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        generation = {"bos_token_id": ids.bos, "eos_token_id": ids.stop, "pad_token_id": ids.pad}
        (Path(folder) / "generation_config.json").write_text(json.dumps(generation))
        processor = PrismaticProcessor(image_processor, tokenizer)
        checkpoint = Checkpoint(
            Path(folder), config_json, model, None, None, processor, {},
            processor_files=read_small_files(Path(folder), PROCESSOR_FILES),
        )  # fmt: skip
        save_checkpoint(config.output_dir, checkpoint, step=0)
    parameters = sum(p.numel() for p in model.parameters())
    (config.output_dir / "small_model.json").write_text(json.dumps({"parameters": parameters, "seed": config.seed}))
    logger.info(
        "wrote %s: %.2f M parameters, %d visual tokens", config.output_dir, parameters / 1e6, model.num_visual_tokens
    )
    return config.output_dir


def command(config: SmallModelConfig) -> int:
    """What the command line runs; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        build(config)
    except (OSError, ValueError) as error:
        print_error(error)
        return UNUSABLE
    return 0
