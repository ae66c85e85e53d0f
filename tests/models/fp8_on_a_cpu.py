"""The conversion to fp8 on a CPU, which multiplies fp8 slowly but by the same scales: prints the activations' errors.

Run by test_quantization.py in a process of its own, with torchao. torchao asks for a GPU, so it is told there is one.
"""

import json
import sys

import torch
import torchao.quantization.quant_api as quant_api
from torch import nn

from prismatic.models.quantization import convert_to_fp8

torch.manual_seed(0)
quant_api._check_hardware_support = lambda *_: None
layers = nn.Sequential(nn.Linear(64, 96, bias=False), nn.SiLU(), nn.Linear(96, 64, bias=False)).to(torch.bfloat16)
rows = torch.randn(1, 6, 64, dtype=torch.bfloat16)
rows[0, 2] = 0  # as the places of actions are before the first layer
rows[0, 4] *= 1e-3
with torch.inference_mode():
    exact = layers(rows).float()
    convert_to_fp8(layers)
    found = layers(rows).float()
error = (found - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-12)
json.dump({"weights": type(layers[0].weight).__name__, "errors": error[0].tolist()}, sys.stdout)
