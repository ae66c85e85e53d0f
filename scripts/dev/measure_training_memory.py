"""The memory that a plan estimates beside what real steps take.

    python scripts/dev/measure_training_memory.py              # four small runs on this machine's CPU
    python scripts/dev/measure_training_memory.py --full_size  # a 7B policy's steps by arithmetic; no weights are made
    python scripts/dev/measure_training_memory.py --shared     # the same where 1 to 64 processes share the weights

Each small run is `lightvla finetune` in a process of its own, of random weights on made-up data: the plan's total
against the most memory that the process ever took (`ru_maxrss`).
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Instead of this file's folder: the packages of this tree come first, whatever else is installed or on PYTHONPATH.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests")]

import draccus
import torch
from fixtures_rlds import write_tiny_rlds
from rich.console import Console
from rich.table import Table

from lightvla.demo.small_model import SmallModelConfig, build
from prismatic.checkpoints.components import new_head
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.lora import attach_lora
from prismatic.models.projectors import ProprioProjector
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import TrainingData
from prismatic.training.distributed import Ranks
from prismatic.training.loop import finetune
from prismatic.training.parallel.sharding import gathered_bytes, rounded_units
from prismatic.training.planning.memory import StepShape, StepSimulator, nbytes
from prismatic.training.planning.plan import make_plan
from prismatic.training.step import TrainableVLA, choose_trained

DATASET = "libero_measured_no_noops"
COMMON = ["--batch_size", "8", "--max_steps", "2", "--precision", "fp32", "--device", "cpu", "--num_workers", "0",
          "--num_images_in_input", "2", "--use_proprio", "True", "--resume", "False"]  # fmt: skip
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""Has the C library give freed tensors back; else it keeps much of them, in pieces that later ones do not fit into."""
SMALL_RUNS = {
    "LoRA, compact": ["--pruner", "lightvla:noise=none"],
    "LoRA, a row per query": ["--compact_training", "False"],
    "all weights": ["--use_lora", "False", "--pruner", "none"],
    "gradient checkpointing": ["--gradient_checkpointing", "True", "--pruner", "none"],
}


@dataclass(frozen=True)
class Measured:
    """A row that `docs/guides/gpu.md` records of an H100: form, batch, recomputed activations, GB at its peak."""

    form: str
    batch_size: int
    kept: int
    recomputed: bool
    peak: float


CARDS = (2, 4, 8, 16, 64)
H100 = [
    Measured("none", 8, 512, False, 54.9), Measured("compact", 8, 78, False, 36.8),
    Measured("a row per query", 8, 512, False, 55.3), Measured("none", 1, 512, False, 25.0),
    Measured("compact", 1, 78, False, 22.7), Measured("a row per query", 1, 512, False, 25.0),
    Measured("none", 8, 512, True, 23.3),
]  # fmt: skip


def seven_billion(use_lora: bool) -> TrainableVLA:
    """A policy of that size on the meta device, with adapters of rank 32 over bfloat16 or all of it to be trained."""
    config = OpenVLAConfig(
        text_config={"pad_token_id": 32000, "vocab_size": 32064, "rms_norm_eps": 1e-6},
        pruner={"name": "lightvla", "multiplicity": "weighted"}, num_images_in_input=2, action_head="l1",
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = OpenVLAForActionPrediction(config)
        model.to(torch.bfloat16 if use_lora else torch.float32)
        model.language_model.set_attn_implementation("sdpa")
        head, projector = new_head(model, "l1"), ProprioProjector(config.llama.hidden_size, model.robot.proprio_dim)
        if use_lora:
            attach_lora(model, 32)
    return TrainableVLA(model, head, projector, bf16=True)


def full_size() -> Table:
    """LoRA of rank 32 on a 7B policy, as `scripts/dev/gpu_check.py` trains it."""
    module = seven_billion(use_lora=True)
    model: Any = module.model
    trained = nbytes(choose_trained(module).values())
    lasting = nbytes(module.parameters()) + 2 * trained
    simulator = StepSimulator(module, on_gpu=True)
    table = Table(
        "7B, LoRA r = 32, bfloat16", "plan", "H100", "", title=f"weights and optimizer {lasting / 1e9:.1f} GB"
    )
    for row in H100:
        model.pruner = KeepAllTokens() if row.form == "none" else TokenPruner(compact=row.form == "compact")
        model.pruner.train()
        if row.recomputed:
            model.enable_gradient_checkpointing()
        cost = simulator.run(StepShape(row.batch_size, 35, row.kept, noisy=row.form != "none"))
        estimate = (lasting + max(cost.peak, trained)) / 1e9
        name = f"{row.form}, batch {row.batch_size}" + (", gradient checkpointing" if row.recomputed else "")
        table.add_row(name, f"{estimate:.1f} GB", f"{row.peak} GB", f"{100 * (estimate / row.peak - 1):+.1f} %")
    return table


def shared() -> Table:
    """What a process of several keeps of a 7B policy, whole (DDP) and where weights are shared (FSDP2)."""
    table = Table(
        "7B", "bytes per weight", "whole", *(f"{n} cards" for n in CARDS), "+ gathered", "+ batch 1", "+ batch 8"
    )
    for use_lora in (True, False):
        module = seven_billion(use_lora)
        model: Any = module.model
        trained = nbytes(choose_trained(module).values())
        everything = nbytes([*module.parameters(), *module.buffers()])
        lasting = everything + 3 * trained  # gradients and AdamW's two averages
        gathered = gathered_bytes(module)
        model.enable_gradient_checkpointing()
        for unit in rounded_units(module):
            unit.to(torch.bfloat16)
        simulator = StepSimulator(module, on_gpu=True)
        steps = [simulator.run(StepShape(batch, 35, 78, noisy=True, gradients_stay=True)).peak for batch in (1, 8)]
        count = sum(parameter.numel() for parameter in module.parameters())
        told = [lasting, *(lasting / number for number in CARDS), gathered, *steps]
        name = "LoRA r = 32" if use_lora else "all weights"
        table.add_row(name, f"{lasting / count:.2f}", *(f"{size / 1e9:.1f} GB" for size in told))
    return table


def small_runs(folder: Path) -> Table:
    """Plans and peaks of fine-tuning a policy of 56 million parameters on this CPU."""
    base = folder / "base"
    sizes = SmallModelConfig(
        output_dir=base, image_size=224, vision_dim=384, vision_depth=6, vision_heads=6, llm_dim=768, llm_layers=6,
        llm_heads=12, llm_mlp=2048,
    )  # fmt: skip
    build(sizes)
    write_tiny_rlds(folder, DATASET, episodes=4, steps=30, size=224)
    table = Table("on this CPU, float32", "plan", "measured", "", "default heap", "kept tokens")
    for name, flags in SMALL_RUNS.items():
        run = folder / name.replace(" ", "-")
        places = ["--vla_path", str(base), "--data_root_dir", str(folder), "--dataset_name", DATASET,
                  "--run_root_dir", str(run), "--run_id_override", "run"]  # fmt: skip
        flags = [*places, *COMMON, *flags]
        heap, _ = _child("--run", flags, {})
        shutil.rmtree(run)
        peak, _ = _child("--run", flags, RETURNED)
        plan, kept = _child("--plan", flags, RETURNED)  # at as many tokens as the run has told
        told = [f"{size / 1e6:.0f} MB" for size in (plan, peak, heap)]
        table.add_row(name, *told[:2], f"{100 * (plan / peak - 1):+.1f} %", told[2], f"{kept}")
    return table


def _child(what: str, flags: list[str], environment: dict[str, str]) -> tuple[int, int]:
    command = [sys.executable, str(Path(__file__).resolve()), what, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(done.stderr)
    first, second = done.stdout.split()[-2:]
    return int(first), int(second)


def run(config: FinetuneConfig) -> tuple[int, int]:
    """Fine-tune; the most memory that this process has taken, and nothing."""
    finetune(config)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10, 0


def plan(config: FinetuneConfig) -> tuple[int, int]:
    """What a plan estimates of the same process, and for how many kept tokens."""
    memory = make_plan(config, Ranks(0, 1, torch.device("cpu")), Path(config.vla_path), TrainingData(config)).memory
    return memory.peak(), memory.kept


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full_size", action="store_true", help="a 7B policy beside an H100's figures, by arithmetic")
    if sys.argv[1:2] in (["--run"], ["--plan"]):
        config = draccus.parse(FinetuneConfig, args=sys.argv[2:])
        print(*(run if sys.argv[1] == "--run" else plan)(config))
        return
    parser.add_argument("--shared", action="store_true", help="one of 1 to 64 processes that share its weights")
    flags = parser.parse_args()
    if flags.full_size or flags.shared:
        Console(width=None if sys.stdout.isatty() else 140).print(full_size() if flags.full_size else shared())
        return
    with tempfile.TemporaryDirectory() as folder:
        Console().print(small_runs(Path(folder)))


if __name__ == "__main__":
    main()
