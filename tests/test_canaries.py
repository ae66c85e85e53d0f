"""Behaviour of others that the code builds on, without any of the code: where one fails, its line says what changed."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaModel

THETA = 10000.0
HEADS, HEAD_DIM = 2, 8
GAPPED = torch.tensor([[0, 3, 4, 9, 17, 18], [0, 1, 5, 6, 17, 18]])
BIAS = torch.tensor([[0, math.log(3), 0, 0.5, 0, 0], [0, 0, math.log(2), 0, 0, torch.finfo(torch.float64).min]])
"""(B, S): weights of keys; the last key of the second sample is hidden."""


def randomised(module: nn.Module) -> nn.Module:
    """With parameters large enough that everything shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(B, heads, S, d) turned by its positions (B, S): channels i and i + d/2 by the angle p theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None] * THETA ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def attended(layer: nn.Module, x: torch.Tensor, positions: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What `layer`'s attention should return for x (B, S, D), written out; bias (B, 1 or S, S) is added to logits."""
    attention = layer.self_attn
    heads = [
        projection(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    q, k = (rotated(part, positions) for part in heads[:2])
    logits = q @ k.transpose(-1, -2) / HEAD_DIM**0.5 + bias[:, None]
    return attention.o_proj((logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_4d_float_mask_and_gapped_positions_reach_llamas_attention_as_they_are(implementation: str) -> None:
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM, intermediate_size=24, num_hidden_layers=2, num_attention_heads=HEADS,
        vocab_size=8, rope_parameters={"rope_type": "default", "rope_theta": THETA}, attn_implementation=implementation,
    )  # fmt: skip
    model = randomised(LlamaModel(config).double().eval())
    inputs, outputs = [], []
    for layer in model.layers:
        layer.input_layernorm.register_forward_hook(lambda *call: inputs.append(call[2]))
        layer.self_attn.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    embeddings = torch.randn(2, 6, HEADS * HEAD_DIM, dtype=torch.float64)
    mask = BIAS.double()[:, None, None, :].expand(-1, 1, 6, -1)
    with torch.no_grad():
        model(inputs_embeds=embeddings, attention_mask=mask, position_ids=GAPPED, use_cache=False)
        full = BIAS.double()[:, None, :]
        causal = full + torch.full((6, 6), -torch.inf, dtype=torch.float64).triu(1)
        others = {"causal": (GAPPED, causal), "without gaps": (torch.arange(6).expand(2, -1), full)}
        assert len(outputs) == len(model.layers)
        for layer, x, found in zip(model.layers, inputs, outputs, strict=True):
            torch.testing.assert_close(
                found, attended(layer, x, GAPPED, full), rtol=0, atol=1e-5,  # transformers turns by float32 angles
                msg=lambda text: f"transformers: the 4D float mask or the positions no longer reach attention: {text}",
            )  # fmt: skip
            for name, other in others.items():
                far = (found - attended(layer, x, *other)).abs().max()
                assert far > 1e-2, f"this canary is blind: attention {name} gives the same"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"])
def test_timms_blocks_hide_the_keys_that_a_boolean_attn_mask_leaves_out(name: str, fused: bool) -> None:
    vit = timm.create_model(
        name, pretrained=False, num_classes=0, img_size=28, embed_dim=16, depth=1, num_heads=2
    ).eval()
    block = randomised(vit.blocks[0])
    assert isinstance(block.attn.fused_attn, bool), "timm: `attn.fused_attn` no longer chooses between two attentions"
    block.attn.fused_attn = fused
    x = torch.randn(2, 7, 16)
    keys = torch.tensor([True, True, False, True, True, False, False])
    with torch.no_grad():
        found = block(x, attn_mask=keys.expand(2, 1, 1, -1))[:, keys]
        torch.testing.assert_close(
            found, block(x[:, keys]), rtol=0, atol=1e-5,
            msg=lambda text: f"timm: hidden keys reach a block's {'fused' if fused else 'plain'} attention: {text}",
        )  # fmt: skip
        assert (found - block(x)[:, keys]).abs().max() > 1e-2, "this canary is blind: the mask changes nothing"


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.inner = nn.ModuleDict({"first": nn.Linear(6, 5), "patches": nn.Conv2d(3, 4, 2)})


def test_peft_wraps_the_named_modules_alone_and_names_their_parameters_as_adapter_files_do() -> None:
    model = _Nested()
    config = LoraConfig(
        r=4, lora_alpha=2, target_modules=["inner.first", "inner.patches"], init_lora_weights="gaussian"
    )
    inject_adapter_in_model(config, model, "default")
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert wrapped == {"inner.first", "inner.patches"}, f"PEFT: target_modules took {sorted(wrapped)}"
    parts = ("base_layer.bias", "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    names = [
        "first.bias",
        "first.weight",
        *(f"inner.{layer}.{part}" for layer in ("first", "patches") for part in parts),
    ]
    assert sorted(dict(model.named_parameters())) == names, "PEFT: parameters have other names"
    shapes = {
        name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items()
    }
    assert shapes == {
        "inner.first.lora_A.weight": (4, 6), "inner.first.lora_B.weight": (5, 4),
        "inner.patches.lora_A.weight": (4, 3, 2, 2), "inner.patches.lora_B.weight": (4, 4, 1, 1),
    }, "PEFT: an adapter file has other names or shapes"  # fmt: skip
    layer = model.inner["first"]
    assert layer.scaling["default"] == 0.5, "PEFT: the scale of an adapter is no longer alpha / r"
    assert not layer.lora_B["default"].weight.any(), "PEFT: a new adapter is no longer the identity"
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, 6)
    expected = layer.base_layer(x) + 0.5 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), expected, msg=lambda text: f"PEFT: an adapter adds something else: {text}")


WORKER = r"""
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
def stopped(number, frame):
    (folder / f"signal-{rank}").write_text(signal.Signals(number).name)
    sys.exit(1)
signal.signal(signal.SIGTERM, stopped)
(folder / f"ready-{rank}").touch()
end = time.monotonic() + 120
while not (folder / f"fail-{rank}").exists() and time.monotonic() < end:
    time.sleep(0.02)
sys.exit(3)
"""


def _wait_for(*paths: Path, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.02)
    return all(path.exists() for path in paths)


@pytest.mark.parametrize("why", ["torchrun is told to stop", "one worker failed"])
def test_torchrun_passes_sigterm_on_to_its_workers(tmp_path: Path, why: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE) as torchrun:
        try:
            assert _wait_for(tmp_path / "ready-0", tmp_path / "ready-1"), "torchrun: the workers did not start"
            stopped = [0, 1] if why == "torchrun is told to stop" else [0]
            if 1 in stopped:
                torchrun.send_signal(signal.SIGTERM)
            else:
                (tmp_path / "fail-1").touch()
            files = [tmp_path / f"signal-{rank}" for rank in stopped]
            assert _wait_for(*files), f"torchrun: no signal reached the workers when {why}"
            assert {file.read_text() for file in files} == {"SIGTERM"}
            torchrun.communicate(timeout=60)
            assert torchrun.returncode != 0, f"torchrun: status 0 although {why}"
        finally:
            torchrun.kill()
