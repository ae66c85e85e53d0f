"""Training over distinct picks against training over one row per query: step time and peak memory, in one run.

    python scripts/dev/benchmark_compact_training.py        # hidden 512, 8 layers, CPU or GPU
    python scripts/dev/benchmark_compact_training.py --hidden_size 4096 --num_layers 32 --num_heads 32 \
        --mlp_size 11008 --lora_rank 32 --batch_size 8 --dtype bfloat16 --device cuda      # the sizes of a 7B policy
    python scripts/dev/benchmark_compact_training.py --vision_dim 384 --vision_depth 12 --vision_heads 6 --fused True \
        --lora_rank 32 --distinct '[80]' --split True      # where the time of a step goes, with ViTs that count

One step is forward and backward through the real model: two images in small ViTs, projector, pruner, Llama, L1 head.
The noise on the scores is chosen so that every sample picks exactly the wanted number of 512 tokens; both forms
get the same picks. Times are medians of alternating steps in one process. Peak memory is measured in a process of its
own per form: on a CPU what the step adds to the resident set, on a GPU what torch allocated. `--split True` tells how
long each part of a compact step takes on a CPU, forward and back, and how much of it is products, casts and the rest.
"""

import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `scripts` is no installed package

from lightvla.demo.small_model import SmallModelConfig, build_config, build_tokenizer
from prismatic.command_line import parse_or_exit
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.lora import attach_lora
from prismatic.models.projectors import ProprioProjector
from prismatic.models.token_pruner import TokenPruner
from prismatic.training.runs.computing import measured_computing
from prismatic.training.step import TrainableVLA, choose_trained

IMAGE_SIZE = 256  # 16 x 16 patches an image, 512 visual tokens in all
PROMPT_LENGTH = 30
FORCING = 1000.0  # added to the scores of the picks that are wanted; no score comes near


@dataclass
class BenchmarkConfig:
    """Sizes, and what to measure."""

    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8
    mlp_size: int = 1376
    vision_dim: int = 64  # of each ViT
    vision_depth: int = 2  # its blocks; the last does not run
    vision_heads: int = 4
    fused: bool = False  # two ViTs instead of one
    batch_size: int = 4
    distinct: list[int] = field(default_factory=lambda: [80, 160, 320])  # tokens picked of 512
    lora_rank: int = 0  # 0: all weights are trained
    steps: int = 5  # measured steps per form, after one that is not
    device: str = "cpu"
    dtype: str = "float32"  # of the frozen weights; bfloat16 computes under autocast
    split: bool = False  # tell the parts of a compact step on a CPU, too
    output: Path | None = None  # JSON of all figures
    only: str = ""  # internal: `compact:80` measures that form's memory in this process


class Bench:
    """The model in training, and one batch."""

    def __init__(self, config: BenchmarkConfig) -> None:
        torch.manual_seed(0)
        self.device = torch.device(config.device)
        self.bf16 = config.dtype == "bfloat16"
        sizes = SmallModelConfig(
            image_size=IMAGE_SIZE, vision_dim=config.vision_dim, vision_depth=config.vision_depth,
            vision_heads=config.vision_heads, fused=config.fused, llm_dim=config.hidden_size,
            llm_layers=config.num_layers, llm_heads=config.num_heads, llm_mlp=config.mlp_size,
        )  # fmt: skip
        _, ids = build_tokenizer()
        settings = {key: value for key, value in build_config(sizes, ids).items() if key != "model_type"}
        with torch.device(self.device):
            model = OpenVLAForActionPrediction(OpenVLAConfig(**settings)).to(getattr(torch, config.dtype))
            head = L1RegressionActionHead(config.hidden_size, model.robot.action_dim, model.robot.chunk_length)
            projector = ProprioProjector(config.hidden_size, model.robot.proprio_dim)
        if config.lora_rank:
            attach_lora(model, config.lora_rank)
        if self.device.type == "cpu":  # as training chooses
            llama = model.config.llama
            measured_computing(model.vision_backbone, llama, config.batch_size, 2, self.bf16).apply(model)
        self.module = TrainableVLA(model, head, projector, self.bf16).to(self.device).train()
        self.trained = choose_trained(self.module)
        self.num_tokens = model.num_visual_tokens
        size, robot = config.batch_size, model.robot
        with torch.device(self.device):
            self.batch = {
                "input_ids": torch.randint(10, 200, (size, PROMPT_LENGTH)),
                "attention_mask": torch.ones(size, PROMPT_LENGTH, dtype=torch.bool),
                "pixel_values": torch.randn(size, 12 if config.fused else 6, IMAGE_SIZE, IMAGE_SIZE),
                "proprio": torch.randn(size, robot.proprio_dim),
                "actions": torch.randn(size, robot.chunk_length, robot.action_dim),
            }

    def noise(self, distinct: int) -> torch.Tensor:
        """Noise (B, V, V) under which every sample's queries pick `distinct` tokens, each about equally often."""
        size, tokens = len(self.batch["input_ids"]), self.num_tokens
        noise = torch.zeros(size, tokens, tokens, device=self.device)
        for row in noise:
            chosen = torch.randperm(tokens, device=self.device)[:distinct]
            row[torch.arange(tokens, device=self.device), chosen.repeat(-(-tokens // distinct))[:tokens]] = FORCING
        return noise

    def step(self, compact: bool, noise: torch.Tensor) -> float:
        """Seconds of one forward and backward pass."""
        self.module.model.pruner = TokenPruner("weighted", compact).train()
        self.module.zero_grad(set_to_none=True)
        self._synchronize()
        began = time.perf_counter()
        loss, metrics = self.module(self.batch, noise)
        loss.backward()
        self._synchronize()
        seconds = time.perf_counter() - began
        self.kept = int(metrics.kept.sum(1).max())
        return seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


PARTS = ("ViTs", "projector", "pruner", "language model", "head")
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "convolution", "scaled_dot_product"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::cat"),
    "softmax": ("softmax",),
    "multiplications": ("aten::mul",),
}
"""Of a step's operations, by what their names contain; all else is `other`."""


class Split:
    """When each part of a step begins and ends: modules' hooks in the forward pass, gradients' on the way back."""

    def __init__(self, module: TrainableVLA) -> None:
        model, self.marks = module.model, dict[str, float]()
        head: Any = module.action_head
        first, head = model.vision_backbone, head.model
        self._hooks = [
            first.register_forward_pre_hook(lambda *_: self._mark("begin")),
            first.register_forward_hook(lambda _, __, out: self._leave("ViTs", out)),
            model.projector.register_forward_hook(lambda _, __, out: self._leave("projector", out)),
            model.pruner.register_forward_hook(lambda _, __, out: self._leave("pruner", out.tokens)),
            head.register_forward_pre_hook(lambda _, inputs: self._leave("language model", inputs[0])),
        ]

    def _mark(self, name: str) -> None:
        self.marks[name] = time.thread_time()

    def _leave(self, part: str, outcome: torch.Tensor) -> None:
        self._mark(part)
        outcome.register_hook(lambda _: self._mark(f"{part} back"))

    def take(self, bench: Bench, noise: torch.Tensor) -> dict[str, tuple[float, float]]:
        """Part -> seconds of this thread, forward and back, of one step."""
        bench.module.zero_grad(set_to_none=True)
        loss, _ = bench.module(bench.batch, noise)
        self._mark("head")
        loss.backward()
        self._mark("end")
        forward = ["begin", *PARTS]
        back = ["head", *(f"{part} back" for part in reversed(PARTS[:-1])), "end"]
        ahead = [self.marks[b] - self.marks[a] for a, b in itertools.pairwise(forward)]
        behind = [self.marks[b] - self.marks[a] for a, b in itertools.pairwise(back)]
        return {part: (a, b) for part, a, b in zip(PARTS, ahead, reversed(behind), strict=True)}

    def leave(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def split_step(config: BenchmarkConfig, console: Console) -> None:
    """Print where a compact step's time goes, on one thread: medians of parts, and one step's operations by kind."""
    torch.set_num_threads(1)
    bench = Bench(config)
    noise = bench.noise(config.distinct[0])
    bench.step(True, noise)
    split = Split(bench.module)
    taken = [split.take(bench, noise) for _ in range(config.steps)]
    split.leave()
    table = Table("one thread", "forward", "back", title=f"compact, {bench.kept} distinct")
    for part in PARTS:
        ahead, behind = (statistics.median(step[part][way] for step in taken) for way in (0, 1))
        table.add_row(part, f"{1000 * ahead:.0f} ms", f"{1000 * behind:.0f} ms")
    console.print(table)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        bench.step(True, noise)
    spent: dict[str, float] = {}
    casts = 0
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "other")
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
        casts += event.count if event.key == "aten::_to_copy" else 0
    shares = ", ".join(f"{kind} {100 * time / sum(spent.values()):.0f} %" for kind, time in spent.items())
    console.print(f"{shares}; {casts} casts")


def resident_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(config: BenchmarkConfig) -> float:
    """MiB that one step of the form named by `only` needs at its peak, beyond weights and batch on a CPU."""
    form, _, distinct = config.only.partition(":")
    bench = Bench(config)
    noise = bench.noise(int(distinct))
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
        bench.step(form == "compact", noise)
        return torch.cuda.max_memory_allocated(bench.device) / 2**20
    before = resident_mib()
    bench.step(form == "compact", noise)
    return resident_mib() - before


def memory_in_own_process(config: BenchmarkConfig, form: str, distinct: int) -> float:
    """As `measure_memory`, where nothing ran before."""
    flags = [
        word
        for name, value in asdict(config).items()
        if name not in ("only", "output", "distinct", "split")
        for word in (f"--{name}", str(value))
    ]
    command = [sys.executable, str(Path(__file__)), *flags, "--only", f"{form}:{distinct}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout.split()[-1])


def run(config: BenchmarkConfig, console: Console) -> list[dict[str, float]]:
    """One row of figures per number of distinct tokens."""
    memory = {
        (form, distinct): memory_in_own_process(config, form, distinct)
        for distinct in track(config.distinct, "memory", console=console)
        for form in ("duplicated", "compact")
    }
    bench = Bench(config)
    rows = []
    for distinct in config.distinct:
        noise = bench.noise(distinct)
        times: dict[str, list[float]] = {"duplicated": [], "compact": []}
        for _ in track(range(config.steps + 1), f"{distinct} tokens", console=console):
            for form, found in times.items():
                found.append(bench.step(form == "compact", noise))
        if bench.kept != distinct:
            raise RuntimeError(f"{bench.kept} tokens were picked, not {distinct}")
        rows.append(
            {
                "distinct": distinct,
                **{f"{form}_s": statistics.median(found[1:]) for form, found in times.items()},
                **{f"{form}_mib": memory[form, distinct] for form in times},
            }
        )
    return rows


def show(rows: list[dict[str, float]], console: Console) -> None:
    """Prints a table: step time and peak memory, duplicated against compact, and their ratios."""
    table = Table("distinct", "duplicated", "compact", "time", "duplicated", "compact", "memory")
    for row in rows:
        table.add_row(
            str(row["distinct"]), f"{row['duplicated_s']:.3f} s", f"{row['compact_s']:.3f} s",
            f"{row['duplicated_s'] / row['compact_s']:.2f} x", f"{row['duplicated_mib']:.0f} MiB",
            f"{row['compact_mib']:.0f} MiB", f"{row['duplicated_mib'] / row['compact_mib']:.2f} x",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    config = parse_or_exit(BenchmarkConfig)
    console = Console()
    if config.only:
        console.print(measure_memory(config))
        return
    if config.split:
        split_step(config, console)
        return
    rows = run(config, console)
    show(rows, console)
    if config.output is not None:
        config.output.write_text(json.dumps({"config": {k: str(v) for k, v in asdict(config).items()}, "rows": rows}))


if __name__ == "__main__":
    main()
