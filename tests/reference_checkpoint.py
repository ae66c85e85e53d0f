"""A tiny checkpoint in the published layout whose every tensor is a pure function of its name, and inputs for it.

Numbers recorded from the reference on exactly these weights and inputs lie in `tests/data/reference.npz`. The rule:
tensor = base + std * RandomState(crc32(name)).standard_normal(shape), in bfloat16.
"""

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LLM_DIM, LLM_MLP, LLM_LAYERS, VOCABULARY = 128, 352, 4, 32064
VITS = {  # name: (dim, depth, mlp, is DINOv2)
    "vision_backbone.featurizer": (64, 4, 256, True),
    "vision_backbone.fused_featurizer": (96, 4, 358, False),
}
PROMPT_LENGTHS = (17, 21, 24, 28, 33, 40)
EMPTY = 29871


class _Weights:
    """Collects named tensors drawn by the rule."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def draw(self, name: str, shape: tuple[int, ...], std: float, base: float = 0.0) -> None:
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(int(np.prod(shape)))
        tensor = base + std * torch.from_numpy(values.astype(np.float32))
        self.tensors[name] = tensor.reshape(shape).to(torch.bfloat16)

    def draw_as(self, name: str, seed_name: str, shape: tuple[int, ...], std: float) -> None:
        """`draw`, for a tensor whose numbers follow from another name than its own."""
        self.draw(seed_name, shape, std)
        self.tensors[name] = self.tensors.pop(seed_name)

    def linear(self, name: str, out: int, inp: int, gain: float = 1.0, bias: bool = True) -> None:
        self.draw(f"{name}.weight", (out, inp), gain / inp**0.5)
        if bias:
            self.draw(f"{name}.bias", (out,), 0.1)

    def resnet(self, name: str) -> None:
        """The network of a head."""
        self.norm(f"{name}.layer_norm1", 7 * LLM_DIM)
        self.linear(f"{name}.fc1", LLM_DIM, 7 * LLM_DIM)
        for index in range(2):
            self.norm(f"{name}.mlp_resnet_blocks.{index}.ffn.0", LLM_DIM)
            self.linear(f"{name}.mlp_resnet_blocks.{index}.ffn.1", LLM_DIM, LLM_DIM)
        self.norm(f"{name}.layer_norm2", LLM_DIM)
        self.linear(f"{name}.fc2", 7, LLM_DIM)

    def norm(self, name: str, dim: int, bias: bool = True) -> None:
        self.draw(f"{name}.weight", (dim,), 0.1, base=1.0)
        if bias:
            self.draw(f"{name}.bias", (dim,), 0.1)


def _vit(weights: _Weights, prefix: str, dim: int, depth: int, mlp: int, dino: bool) -> None:
    if dino:
        weights.draw(f"{prefix}.cls_token", (1, 1, dim), 0.5)
        weights.draw(f"{prefix}.reg_token", (1, 4, dim), 0.5)
    weights.draw(f"{prefix}.pos_embed", (1, 256, dim), 0.6)
    weights.draw(f"{prefix}.patch_embed.proj.weight", (dim, 3, 14, 14), 0.08)
    weights.draw(f"{prefix}.patch_embed.proj.bias", (dim,), 0.1)
    for index in range(depth):
        block = f"{prefix}.blocks.{index}"
        weights.norm(f"{block}.norm1", dim)
        weights.norm(f"{block}.norm2", dim)
        weights.linear(f"{block}.attn.qkv", 3 * dim, dim)
        weights.linear(f"{block}.attn.proj", dim, dim)
        weights.linear(f"{block}.mlp.fc1", mlp, dim)
        weights.linear(f"{block}.mlp.fc2", dim, mlp)
        if dino:
            weights.draw(f"{block}.ls1.scale_factor", (dim,), 0.2, base=0.5)
            weights.draw(f"{block}.ls2.scale_factor", (dim,), 0.2, base=0.5)
    weights.norm(f"{prefix}.norm", dim)
    if not dino:
        pool = f"{prefix}.attn_pool"
        weights.draw(f"{pool}.latent", (1, 1, dim), 0.02)
        for name, out, inp in (
            ("q", dim, dim),
            ("kv", 2 * dim, dim),
            ("proj", dim, dim),
            ("mlp.fc1", mlp, dim),
            ("mlp.fc2", dim, mlp),
        ):
            weights.linear(f"{pool}.{name}", out, inp)
        weights.norm(f"{pool}.norm", dim)


def model_weights() -> dict[str, torch.Tensor]:
    """All tensors of the model, under the published names."""
    weights = _Weights()
    for prefix, (dim, depth, mlp, dino) in VITS.items():
        _vit(weights, prefix, dim, depth, mlp, dino)
    features = sum(vit[0] for vit in VITS.values())
    weights.linear("projector.fc1", 4 * features, features, gain=0.7)
    weights.linear("projector.fc2", LLM_DIM, 4 * features, gain=1.5)
    weights.linear("projector.fc3", LLM_DIM, LLM_DIM)
    llama = "language_model.model"
    weights.draw(f"{llama}.embed_tokens.weight", (VOCABULARY, LLM_DIM), 0.5)
    for index in range(LLM_LAYERS):
        layer = f"{llama}.layers.{index}"
        for name, gain in (("q", 1.5), ("k", 1.5), ("v", 1.0), ("o", 1.0)):
            weights.linear(f"{layer}.self_attn.{name}_proj", LLM_DIM, LLM_DIM, gain, bias=False)
        for name in ("gate", "up"):
            weights.linear(f"{layer}.mlp.{name}_proj", LLM_MLP, LLM_DIM, bias=False)
        weights.linear(f"{layer}.mlp.down_proj", LLM_DIM, LLM_MLP, bias=False)
        weights.norm(f"{layer}.input_layernorm", LLM_DIM, bias=False)
        weights.norm(f"{layer}.post_attention_layernorm", LLM_DIM, bias=False)
    weights.norm(f"{llama}.norm", LLM_DIM, bias=False)
    weights.draw("language_model.lm_head.weight", (VOCABULARY, LLM_DIM), 1.0 / LLM_DIM**0.5)
    return weights.tensors


def head_weights() -> dict[str, torch.Tensor]:
    """The L1 head."""
    weights = _Weights()
    weights.resnet("model")
    return weights.tensors


def diffusion_weights() -> dict[str, torch.Tensor]:
    """The diffusion head."""
    weights = _Weights()
    weights.resnet("noise_predictor.mlp_resnet")
    return weights.tensors


def noisy_action_weights() -> dict[str, torch.Tensor]:
    """The noisy-action projector, stored as float32."""
    weights = _Weights()
    weights.linear("fc1", LLM_DIM, 1)
    weights.linear("fc2", LLM_DIM, LLM_DIM)
    return {name: tensor.float() for name, tensor in weights.tensors.items()}


def film_weights(rank: int = 32) -> dict[str, torch.Tensor]:
    """The vision backbone with FiLM as published: adapters beside their base layers, everything else under its name."""
    vits, film = _Weights(), _Weights()
    for prefix, (dim, depth, mlp, dino) in VITS.items():
        _vit(vits, prefix, dim, depth, mlp, dino)
        for index in range(depth):
            for name in ("scale", "shift"):
                module = f"{prefix}.blocks.{index}.{name}"
                film.draw_as(f"{module}.weight", f"film.{module}.weight", (dim, LLM_DIM), 0.15)
                film.draw_as(f"{module}.bias", f"film.{module}.bias", (dim,), 0.05)
    state: dict[str, torch.Tensor] = {}
    for name, value in vits.tensors.items():
        name = re.sub(r"\.blocks\.(\d+)\.", r".blocks.\1.block.", name)
        module, leaf = name.rsplit(".", 1)
        if not re.search(r"\.(qkv|q|kv|proj|fc1|fc2)$", module):
            state[name] = value
            continue
        state[f"{module}.base_layer.{leaf}"] = value
        if leaf == "weight":
            down, up = f"{module}.lora_A", f"{module}.lora_B"
            film.draw_as(f"{down}.default.weight", f"film.{down}", (rank, *value.shape[1:]), 1.0 / rank)
            film.draw_as(f"{up}.default.weight", f"film.{up}", (len(value), rank, *[1] * (value.ndim - 2)), 0.05)
    return {**state, **{name: tensor.float() for name, tensor in film.tensors.items()}}


def proprio_weights() -> dict[str, torch.Tensor]:
    """The proprio projector, stored as float32."""
    weights = _Weights()
    weights.linear("fc1", LLM_DIM, 8)
    weights.linear("fc2", LLM_DIM, LLM_DIM)
    return {name: tensor.float() for name, tensor in weights.tensors.items()}


def _statistics() -> dict[str, Any]:
    action = {
        "q01": [-0.75, -0.66, -0.9375, -0.107, -0.207, -0.184, 0.0],
        "q99": [0.9375, 0.857, 0.931, 0.108, 0.177, 0.146, 1.0],
        "min": [-0.9375, -0.9, -0.93, -0.2, -0.36, -0.36, 0.0],
        "max": [0.9375, 0.92, 0.93, 0.2, 0.36, 0.375, 1.0],
        "mask": [True] * 6 + [False],
    }
    proprio = {
        "q01": [-0.46, -0.31, 0.46, 2.25, -3.1, -1.5, 0.0015, -0.04],
        "q99": [0.15, 0.38, 1.32, 3.55, 3.2, 0.9, 0.0399, -0.0016],
        "min": [-0.48, -0.33, 0.45, 1.6, -3.6, -1.8, -0.001, -0.042],
        "max": [0.2, 0.4, 1.37, 3.6, 3.5, 1.4, 0.042, 0.001],
    }
    for part in (action, proprio):
        part["mean"], part["std"] = [0.0] * len(part["q01"]), [1.0] * len(part["q01"])
    return {
        "libero_tiny_no_noops": {"action": action, "proprio": proprio, "num_transitions": 1234, "num_trajectories": 12}
    }


def _config() -> dict[str, Any]:
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "model_type": "openvla",
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "n_action_bins": 256,
        "norm_stats": _statistics(),
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "timm_override_act_layers": [None, None],
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_model_kwargs": [{"embed_dim": dim, "depth": depth, "num_heads": 4} for dim, depth, _, _ in VITS.values()],
        "text_config": {
            "model_type": "llama",
            "hidden_size": LLM_DIM,
            "intermediate_size": LLM_MLP,
            "num_hidden_layers": LLM_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "pad_token_id": 32000,
            "torch_dtype": "bfloat16",
            "vocab_size": VOCABULARY,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def _write_tokenizer(folder: Path) -> None:
    """One token per character under Llama-2's special ids (not the Llama vocabulary)."""
    from tokenizers import Tokenizer, models, normalizers, processors

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    named = {EMPTY: "\u2581", **{EMPTY + 1 + i: chr(33 + i) for i in range(94)}}
    vocabulary.update({named.get(i, f"\u2581unused{i}"): i for i in range(259, 32000)})
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<PAD>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<PAD>",
                "unk_token": "<unk>",
                "tokenizer_class": "LlamaTokenizer",
            }
        )
    )


def write_reference_checkpoint(folder: Path, step: int = 100) -> Path:
    """Write the whole checkpoint, weights in two shards with an index; returns its directory."""
    folder.mkdir(parents=True)
    tensors = model_weights()
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": sum(t.numel() * 2 for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    imagenet, half = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3)
    preprocessor = {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, 224, 224]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": [imagenet[0], half[0]],
        "stds": [imagenet[1], half[1]],
        "processor_class": "PrismaticProcessor",
        "use_fused_vision_backbone": True,
    }
    files = {
        "config.json": _config(),
        "preprocessor_config.json": preprocessor,
        "dataset_statistics.json": _statistics(),
    }
    files["generation_config.json"] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32000}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    _write_tokenizer(folder)
    components = {"action_head": head_weights(), "proprio_projector": proprio_weights()}
    for component, state in components.items():
        torch.save(
            {f"module.{name}": value for name, value in state.items()}, folder / f"{component}--{step}_checkpoint.pt"
        )
    return folder


def write_variant(base: Path, folder: Path, components: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A copy of the checkpoint `base` with other component files."""
    shutil.copytree(base, folder)
    for component, state in components.items():
        for old in folder.glob(f"{component}--*"):
            old.unlink()
        torch.save(state, folder / f"{component}--100_checkpoint.pt")
    return folder


def write_original_checkpoint(base: Path, folder: Path, fine_tuned: bool = False) -> Path:
    """The checkpoint `base` as the original OpenVLA leaves one: no `.pt` file, statistics in `config.json`.

    Rows of the LM head that are no action token are zero, so that action tokens are the most likely ones, as they are
    after training. `fine_tuned` keeps `dataset_statistics.json`, which OpenVLA's fine-tuning writes.
    """
    shutil.copytree(base, folder)
    for file in folder.glob("*.pt"):
        file.unlink()
    if not fine_tuned:
        (folder / "dataset_statistics.json").unlink()
    name = "language_model.lm_head.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][:31744] = tensors[name][32000:] = 0
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def reference_gauss(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The normal noise that the reference's diffusion numbers were recorded with."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def reference_image(seed: int, size: int = 224) -> np.ndarray:
    """A picture of waves with 24 textured rectangles, uint8 (size, size, 3)."""
    rng = np.random.RandomState(seed)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float64) / size
    waves = []
    for _ in range(3):
        fx, fy = rng.uniform(0.5, 3), rng.uniform(0.5, 3)
        waves.append(127 + 90 * np.sin(2 * np.pi * (fx * columns + fy * rows) + rng.uniform(0, 6)))
    image = np.stack(waves, axis=-1)
    for _ in range(24):
        height, width = rng.randint(size // 16, size // 3, 2)
        top, left = rng.randint(0, size - height), rng.randint(0, size - width)
        part = np.s_[top : top + height, left : left + width]
        color = rng.uniform(0, 255, 3)
        frequency = rng.uniform(5, 60)
        image[part] = color + 25 * np.sin(frequency * columns[part][..., None] + rng.uniform(0, 6, 3))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def reference_sample(index: int) -> dict[str, np.ndarray]:
    """Sample 0..5: input_ids (with the empty piece on even ones), images (2, 224, 224, 3) and the raw state."""
    rng = np.random.RandomState(1000 + index)
    ids = [1, *rng.randint(300, 29000, size=PROMPT_LENGTHS[index]).tolist()] + ([EMPTY] if index % 2 == 0 else [])
    low = [-0.5, -0.35, 0.4, 2.0, -3.0, -1.6, 0.0, -0.042]
    high = [0.2, 0.4, 1.4, 3.7, 3.0, 1.0, 0.042, 0.0]
    state = np.array([rng.uniform(a, b) for a, b in zip(low, high, strict=True)])
    images = np.stack([reference_image(10 * index), reference_image(10 * index + 1)])
    return {"input_ids": np.array(ids), "images": images, "state": state}


def reference_training_targets(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Normalised actions (count, 8, 7) and states (count, 8) of the training batch over samples 0..count-1."""
    rng = np.random.RandomState(77)
    actions, states = [], []
    for _ in range(count):
        actions.append(rng.uniform(-1, 1, (8, 7)).astype(np.float32))
        states.append(rng.uniform(-1, 1, 8).astype(np.float32))
    return np.stack(actions), np.stack(states)


def reference_noise(count: int, tokens: int = 512) -> np.ndarray:
    """The uniform noise that the reference's training numbers were recorded with."""
    return np.random.RandomState(5).random_sample((count, tokens, tokens)).astype(np.float32)
