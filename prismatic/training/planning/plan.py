"""What a run will do and need, said before any weights are read: steps, samples, parameters, memory, disk and time."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from prismatic.machine import read_machine, resident_bytes
from prismatic.models import film
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import SampleCounts, TrainingData
from prismatic.training.distributed import Ranks
from prismatic.training.parallel.sharding import gathered_bytes, rounded_units
from prismatic.training.parts import Parts, assemble
from prismatic.training.planning.disk import DiskPlan, gigabytes, plan_disk
from prismatic.training.planning.memory import StepCost, StepShape, StepSimulator, nbytes
from prismatic.training.runs.computing import Computing
from prismatic.vla.prompt import prompt_ids

log = logging.getLogger(__name__)

PAPER_SHARE = 78 / 512
"""Of the visual tokens, what the paper's policy keeps; assumed where the run has not told its own."""
_LONGEST_SENTENCES = 200
"""So many sentences, the longest by their letters, are tokenized to find the longest prompt."""
_MEASURED_S = 0.1
"""Seconds of matrix products that the time of a step is estimated from."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the card of one process, or of one process on a CPU.

    Attributes:
        on_gpu: whether it is a card's memory.
        process: what this process already takes, on a CPU.
        frozen: weights that are not trained.
        trained: weights that are, in float32.
        optimizer: the two averages of AdamW.
        average: of the weights, with `--ema_decay`.
        gradients: of all trained weights.
        gradients_stay: whether they exist in the forward pass, too: summed over micro-steps, or in the buckets that
            processes exchange.
        kept: visual tokens that are assumed to stay, of the sample that keeps the most.
        kept_because: where that number comes from.
        num_visual: visual tokens of one sample.
        costs: number of kept tokens -> what a micro-step needs; empty where it could not be found out.
        free: bytes that there are, or None where nobody says.
        gathered: whole weights and gradients of a moment, where processes hold shares of them; the sizes above are
            those of the largest share then.
    """

    on_gpu: bool
    process: int
    frozen: int
    trained: int
    optimizer: int
    average: int
    gradients: int
    gradients_stay: bool
    kept: int
    kept_because: str
    num_visual: int
    costs: Mapping[int, StepCost]
    free: int | None
    gathered: int = 0

    def peak(self, kept: int | None = None) -> int:
        """Most bytes at once, where `kept` visual tokens stay (None: as many as assumed)."""
        cost = self.costs.get(self.kept if kept is None else kept, StepCost())
        lasting = self.process + self.frozen + self.trained + self.optimizer + self.average + self.gathered
        passing = self.gradients + cost.peak if self.gradients_stay else max(self.gradients, cost.peak)
        return lasting + passing

    def most_kept(self) -> int | None:
        """How many visual tokens may stay before memory ends; None where all may, or nothing is known."""
        if self.free is None or self.num_visual not in self.costs or self.peak(self.num_visual) <= self.free:
            return None
        few, all_of_them = self.peak(), self.peak(self.num_visual)
        share = (self.free - few) / max(1, all_of_them - few)
        return max(0, int(self.kept + share * (self.num_visual - self.kept)))


@dataclass(frozen=True)
class Plan:
    """What a run will do and need.

    Attributes:
        config: its flags.
        processes: that train together.
        done: finished steps.
        counts: samples that there are.
        trained: part of the policy -> number of trained parameters.
        frozen: part of the policy -> number of others.
        memory: of a process.
        saving: bytes of the host's memory beside the model while a checkpoint is written.
        disk: of checkpoints.
        seconds_per_step: at best; None where it could not be found out.
    """

    config: FinetuneConfig
    processes: int
    done: int
    counts: SampleCounts
    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    memory: MemoryPlan
    saving: int
    disk: DiskPlan
    seconds_per_step: float | None

    @property
    def steps_left(self) -> int:
        """Steps to do."""
        return max(0, self.config.max_steps - self.done)

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimiser step, of all processes."""
        return self.config.samples_per_step(self.processes)

    def warnings(self) -> Iterator[str]:
        """What somebody should know before the run begins."""
        counts, memory = self.counts, self.memory
        if counts.train < self.samples_per_step:
            yield (
                f"the data have {counts.train} samples, fewer than the {self.samples_per_step} of one step, which then "
                "sees some of them several times; lower --batch_size or --grad_accumulation_steps"
            )
        if counts.held_out is not None and counts.held_out > counts.train:
            yield (
                f"{counts.held_out} samples are held out and {counts.train} are there to learn from; lower "
                "--val_fraction, or look at the dataset's splits"
            )
        if memory.free is None:
            return
        remedies = "--gradient_checkpointing True, or a smaller --batch_size with more --grad_accumulation_steps"
        if not self.config.use_lora:
            remedies += ", or --use_lora True: all weights are trained, with 16 bytes each beside activations"
        if self.processes > 1 and self.config.sharding == "none":
            remedies += ", or --sharding fsdp, by which processes share weights, gradients and averages"
        device = "the card has" if memory.on_gpu else "this machine has"
        if memory.peak() > memory.free:
            yield (
                f"a process is estimated to need {gigabytes(memory.peak())}, and {device} {gigabytes(memory.free)} "
                f"free: {remedies}"
            )
        elif not memory.on_gpu and 2 * memory.peak() > memory.free:
            yield (
                f"a process is estimated to use {gigabytes(memory.peak())} of {gigabytes(memory.free)}, and the C "
                "library may keep as much again of what is freed; set MALLOC_MMAP_THRESHOLD_=131072 in the environment"
            )
        elif (most := memory.most_kept()) is not None:
            yield (
                f"{device} {gigabytes(memory.free)} free, which suffices while no sample keeps more than about {most} "
                f"of {memory.num_visual} visual tokens (a new pruner, or much noise, keeps many): {remedies}"
            )


def make_plan(
    config: FinetuneConfig,
    ranks: Ranks,
    folder: Path,
    data: TrainingData,
    done: int = 0,
    computing: Computing | None = None,
) -> Plan:
    """Everything that can be said before weights are read.

    Args:
        config: the flags.
        ranks: this process among the others.
        folder: checkpoint that the weights come from.
        data: opened.
        done: steps that the run has finished before.
        computing: how the run computes; None: what is quickest here.

    Raises ValueError where checkpoint, data and flags do not fit.
    """
    process = resident_bytes() if ranks.device.type == "cpu" else 0
    with _quiet():  # the same is said when the weights are loaded
        parts = assemble(config, folder, ranks.device, data.robot, True, computing)
    state = nbytes(parts.trained.values()) * (3 + (config.ema_decay > 0))  # weights, AdamW's averages, and theirs
    largest = max(parameter.numel() for parameter in parts.module.parameters())
    # What shares are gathered into: of the state, and of the frozen weights where all are written.
    merges = config.merge_lora_during_training or not config.use_lora
    copied = nbytes(p for p in parts.module.parameters() if not p.requires_grad) if merges else 0
    saving = state + 3 * 4 * largest + (copied if config.sharding != "none" else 0)
    trained, frozen = _count_parameters(parts)
    disk = plan_disk(config, parts, state, done)  # before a rehearsal changes the module
    memory = _plan_memory(config, ranks, parts, data, process)
    cost = memory.costs.get(memory.kept)
    seconds = None
    if cost is not None:
        rate = _matrix_rate(parts, ranks.device, config.batch_size, memory.kept)
        seconds = cost.flops * config.grad_accumulation_steps / rate
    return Plan(config, ranks.world_size, done, data.counts(), trained, frozen, memory, saving, disk, seconds)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _count_parameters(parts: Parts) -> tuple[dict[str, int], dict[str, int]]:
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in parts.module.named_parameters():
        counts = trained if name in parts.trained else frozen
        counts[_part_of(name)] = counts.get(_part_of(name), 0) + parameter.numel()
    return trained, frozen


def _part_of(name: str) -> str:
    if ".lora_" in name:
        return "adapters"
    if film.is_film(name):
        return "FiLM"
    starts = {
        "model.vision_backbone.": "vision backbone", "model.projector.": "vision projector",
        "model.language_model.": "language model", "model.pruner.": "pruner", "action_head.": "action head",
    }  # fmt: skip
    return next((part for start, part in starts.items() if name.startswith(start)), "proprio projector")


def _plan_memory(config: FinetuneConfig, ranks: Ranks, parts: Parts, data: TrainingData, process: int) -> MemoryPlan:
    module, model = parts.module, parts.checkpoint.model
    everything, trained = nbytes([*module.parameters(), *module.buffers()]), nbytes(parts.trained.values())
    stay = config.grad_accumulation_steps > 1 or ranks.world_size > 1
    shares, gathered = (ranks.world_size, gathered_bytes(module)) if config.sharding != "none" else (1, 0)
    num_visual = model.num_visual_tokens
    kept, because = _kept_tokens(config, num_visual, parts)
    on_gpu = ranks.device.type == "cuda"
    prompt = _longest_prompt(parts, data)
    costs: dict[int, StepCost] = {}
    for unit in rounded_units(module) if config.sharding != "none" else ():
        unit.to(torch.bfloat16)
    try:
        simulator = StepSimulator(module, on_gpu)
        for number in dict.fromkeys((kept, num_visual)):
            noisy = model.config.pruner_spec.noise != "none"
            costs[number] = simulator.run(StepShape(config.batch_size, prompt, number, noisy, stay))
    except Exception as error:  # a version of torch may ask an operation for values; the run needs none of this
        log.warning("the memory of activations is not known: %s", " ".join(str(error).split()))
    frozen, trained = -(-(everything - trained) // shares), -(-trained // shares)
    return MemoryPlan(
        on_gpu, process, frozen, trained, 2 * trained, trained * (config.ema_decay > 0), trained, stay,
        kept, because, num_visual, costs, _free_memory(ranks.device, process), gathered,
    )  # fmt: skip


def _free_memory(device: torch.device, process: int) -> int | None:
    """Bytes that a process may take, what it has taken already included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = read_machine().memory_bytes
    return None if left is None else left // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + process


def _kept_tokens(config: FinetuneConfig, num_visual: int, parts: Parts) -> tuple[int, str]:
    spec = parts.checkpoint.model.config.pruner_spec
    if spec.name == "none":
        return num_visual, "no pruner"
    if (fixed := spec.tokens(num_visual)) is not None:
        return fixed, "as the pruner's options say"
    if not getattr(parts.checkpoint.model.pruner, "compact", True):
        return num_visual, "a row per query"
    if (measured := _measured_kept(config.run_dir / "metrics.jsonl")) is not None:
        return min(measured, num_visual), "as many as the run kept last"
    kept = max(1, round(num_visual * PAPER_SHARE), int(spec.option("min_tokens")))
    return min(kept, spec.num_queries or num_visual, num_visual), "assumed: the share that the paper's policy keeps"


def _measured_kept(metrics: Path) -> int | None:
    """What the last steps of an earlier part of the run tell, of the sample that kept the most."""
    if not metrics.is_file():
        return None
    lines = metrics.read_text().splitlines()[-50:]
    told = [json.loads(line) for line in lines if line.endswith("}")]
    return max((int(line["tokens_kept_max"]) for line in told if "tokens_kept_max" in line), default=None)


def _longest_prompt(parts: Parts, data: TrainingData) -> int:
    tokenizer, ids = parts.checkpoint.processor.tokenizer, parts.checkpoint.model.config.special_tokens

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]

    longest = sorted(data.instructions, key=len)[-_LONGEST_SENTENCES:]
    return max(len(prompt_ids(tokenize, text, ids)) for text in longest)


def _matrix_rate(parts: Parts, device: torch.device, batch_size: int, kept: int) -> float:
    """Floating-point operations per second of the language model's widest product on this device."""
    llama = parts.checkpoint.model.config.llama
    dtype = torch.bfloat16 if parts.module.bf16 else torch.float32
    rows = torch.ones(batch_size * (kept + 100), llama.hidden_size, dtype=dtype, device=device)
    weight = torch.ones(llama.hidden_size, llama.intermediate_size, dtype=dtype, device=device)
    products, began = 0, 0.0
    for number in range(1 << 20):
        rows @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number == 0:  # the first prepares
            began = time.perf_counter()
            continue
        products = number
        if time.perf_counter() - began > _MEASURED_S:
            break
    return 2 * rows.numel() * llama.intermediate_size * products / (time.perf_counter() - began)
