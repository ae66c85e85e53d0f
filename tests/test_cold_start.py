"""What a process imports until its first action."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FIRST_ACTION = """
import json, sys
import numpy as np
from prismatic.policy import Policy
policy = Policy.from_pretrained(sys.argv[1])
observation = {camera: np.zeros((64, 64, 3), np.uint8) for camera in policy.robot.cameras}
policy.act({**observation, policy.robot.state_key: np.zeros(policy.robot.proprio_dim)}, "turn on the stove")
print(json.dumps(sorted(sys.modules)))
"""
NOT_NEEDED = {
    "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy", "wandb", "scipy", "sklearn",
    "pandas", "matplotlib", "accelerate", "peft", "diffusers", "bitsandbytes", "torchao", "tensorflow", "tensorboard",
    "prismatic.training",
}  # fmt: skip
USED_LATER = """
import sys
from prismatic import libraries
told = list(libraries._allowed_in_graph)
import torch
import transformers.modeling_utils as modeling
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist() == [2, 2]
from torch._dynamo.trace_rules import is_callable_allowed
assert told and all(map(is_callable_allowed, told)), "what transformers allowed while it was imported"
assert torch._dynamo.utils.is_compile_supported("cpu") in (True, False)
assert modeling.extract_model_from_parallel(model := torch.nn.Linear(1, 1)) is model
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
import torch.distributed.tensor._decompositions as decompositions
assert decompositions.GuardOnDataDependentSymNode is GuardOnDataDependentSymNode, "what `except` there looks for"
from transformers.loss.loss_for_object_detection import linear_sum_assignment
import scipy.optimize
assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
"""
BEHIND_A_SIMULATOR = """
from prismatic import libraries
from experiments.robot.libero.simulator.backend import choose_backend
choose_backend()
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
with LiberoEnvironment(load_task("libero_goal", 1), 64) as environment:
    environment.reset(0)
    assert environment.frame().std() > 5
    import torch._dynamo
    print("fine")
"""
NAMES = """
import transformers
print(sorted(dir(transformers)), sorted(dir(transformers.models)), transformers.BertModel)
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_a_first_action_imports_no_compiler_and_no_trainer(small_policy_directory: Path):
    imported = set(json.loads(run(FIRST_ACTION, str(small_policy_directory)).splitlines()[-1]))
    assert sorted(NOT_NEEDED & imported) == []
    assert {"torch", "timm", "transformers"} <= imported


def test_the_compiler_may_come_behind_a_simulator():
    """Mesa's LLVM and triton's in one process: the second one to be loaded must not be triton's."""
    assert run(BEHIND_A_SIMULATOR).splitlines()[-1] == "fine"


@pytest.mark.slow
def test_what_was_deferred_is_there_when_it_is_used():
    run(USED_LATER)


@pytest.mark.slow
def test_transformers_offers_what_it_offers_without():
    assert run("import prismatic.libraries" + NAMES) == run(NAMES)
