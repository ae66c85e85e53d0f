"""How fast a policy answers on the device, against what the card could do at best, and how much memory it takes."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismatic.checkpoints.saving import save_checkpoint
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.batch import Call
from prismatic.models.flops import count_flops
from prismatic.models.lora import unused_modules
from prismatic.models.quantization import check_quantization, convert_to_fp8
from prismatic.policy import Policy
from scripts.dev.gpu_figures import (
    Section,
    allocated_gb,
    clock,
    fits,
    free_memory,
    peak_gb,
    quantile,
    synchronize,
    tell_times,
    tell_waits,
    tell_work,
)
from scripts.dev.gpu_model import Card, Parts, observations

ATTENTIONS = ("sdpa", "eager")


def ceilings(section: Section, card: Card) -> None:
    """A large bfloat16 matrix product, and a large copy on the device."""
    side, device = card.preset.matmul, card.device
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = _each(lambda: torch.mm(a, b, out=out))
    card.matmul_flops = 2 * side**3 / (milliseconds / 1e3)
    section.tell(f"bfloat16 matrix product of side {side}", card.matmul_flops / 1e12, "TFLOP/s")
    source = torch.zeros(card.preset.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = _each(lambda: target.copy_(source))
    card.copy_bytes = 2 * card.preset.copied / (milliseconds / 1e3)
    section.tell(f"copy of {card.preset.copied / 1e9:.3g} GB, read and written", card.copy_bytes / 1e9, "GB/s")


def _each(work: Callable[[], Any], calls: int = 10) -> float:
    """Milliseconds of a call among `calls` that are given to the device at once; the median of five such rounds."""

    def several() -> None:
        for _ in range(calls):
            work()

    return quantile(clock(several, 5, warm_up=1), 0.5) / calls


@torch.inference_mode()
def latency(section: Section, card: Card) -> None:
    """One observation: unpruned, with LightVLA made to keep few tokens, and as random weights make it keep."""
    parts, repeats = card.parts(), card.preset.repeats
    section.tell("parameters", sum(p.numel() for p in parts.model.parameters()) / 1e9, "10^9")
    for name, prune in parts.policies(card.preset.kept).items():
        prune()
        section.attempt(partial(_tell_latency, section, card, parts, name))
        section.attempt(partial(_tell_compiled, section, card, parts, name))
    policy = card.policy()
    looks, sentences = observations(policy, 1)
    section.tell("Policy.act, prompt tokens", len(policy.transform.input_ids(sentences[0])))
    for name, prune in parts.policies(card.preset.kept).items():
        prune()
        stages: list[dict[str, float]] = []

        def act(stages: list[dict[str, float]] = stages) -> None:
            stages.append(policy.act_batch(looks, sentences).timing)

        name = f"Policy.act, {name}"
        tell_times(section, name, clock(act, repeats))
        for stage in stages[0]:
            section.tell(f"{name}, {stage}", float(np.median([1e3 * timing[stage] for timing in stages])), "ms")
        section.attempt(partial(tell_waits, section, name, act))


def _tell_latency(section: Section, card: Card, parts: Parts, name: str) -> None:
    """Time by part, floor, waits and work of one answer, with the pruner that the model has."""
    batch, repeats = parts.batch(1), card.preset.repeats
    encoded = parts.encode(batch)
    kept = int(parts.answer(batch)[1].selection.distinct()[0])
    section.tell(f"{name}, tokens kept", kept)
    tell_times(section, f"{name}, encode", clock(lambda: parts.encode(batch), repeats))
    tell_times(section, f"{name}, run", clock(lambda: parts.model.run(encoded), repeats))
    p50 = tell_times(section, f"{name}, whole", clock(lambda: parts.answer(batch), repeats))
    _tell_floor(section, f"{name}, whole", card, parts, None if name == "none" else kept, p50)
    section.attempt(lambda: tell_waits(section, name, lambda: parts.answer(batch)))
    section.attempt(lambda: tell_work(section, name, lambda: parts.answer(batch)))


@torch.inference_mode()
def fp8(section: Section, card: Card) -> None:
    """The compiled engine with the language model in fp8. It changes the policy's weights: the next section has a new
    policy."""
    try:
        check_quantization("fp8")
    except ValueError as error:
        section.tell("fp8 is left out", str(error))
        return
    parts = card.parts()
    policies, inputs = dict(list(parts.policies(card.preset.kept).items())[:2]), parts.batch(1)
    exact = {}
    for name, prune in policies.items():
        prune()
        exact[name] = parts.answer(inputs)[0]
    convert_to_fp8(parts.model.language_model.model.layers)
    for name, prune in policies.items():
        prune()
        section.tell(f"fp8, {name}: actions off by", float((parts.answer(inputs)[0] - exact[name]).abs().max()))
        section.attempt(partial(_tell_compiled, section, card, parts, f"fp8, {name}", with_floor=False))
    card.drop()
    free_memory()


def _tell_compiled(section: Section, card: Card, parts: Parts, name: str, with_floor: bool = True) -> None:
    """As `_tell_latency`, of the compiled engine: what preparing it took, and how far its actions are from eager's."""
    engine, name = parts.engine(), f"{name}, compiled"
    inputs = {key: value.cpu() for key, value in parts.batch(1).items()}
    began = time.perf_counter()
    with engine.warming_up():
        engine.answer(inputs, Call())
    synchronize()
    section.tell(f"{name}, prepared in", time.perf_counter() - began, "s")
    answer = engine.answer(inputs, Call())
    kept = int(answer.selection.distinct()[0])
    found = engine.describe()
    ran = found["name"] == "compiled" and ("cuda_graphs" in found or card.device.type != "cuda")
    section.test(f"{name}, engine that ran", found, "compiled, with graphs on a GPU", ran)
    p50 = tell_times(section, f"{name}, whole", clock(lambda: engine.answer(inputs, Call()), card.preset.repeats))
    if with_floor:  # the card's ceilings are bfloat16's
        _tell_floor(section, f"{name}, whole", card, parts, None if name.startswith("none") else kept, p50)
    section.attempt(lambda: tell_waits(section, name, lambda: engine.answer(inputs, Call())))
    section.attempt(lambda: tell_work(section, name, lambda: engine.answer(inputs, Call())))


def _tell_floor(section: Section, name: str, card: Card, parts: Parts, kept: int | None, milliseconds: float) -> None:
    """The least time that the card's ceilings allow, and its share of the time that was measured."""
    flops = count_flops(parts.model, parts.head, parts.projector, kept, card.preset.prompt).total
    section.tell(f"{name}, work", flops / 1e12, "TFLOP")
    if card.matmul_flops is None or card.copy_bytes is None:
        return
    computing, reading = 1e3 * flops / card.matmul_flops, 1e3 * _bytes_read(parts) / card.copy_bytes
    section.tell(f"{name}, floor by computing", computing, "ms")
    section.tell(f"{name}, floor by reading the weights once", reading, "ms")
    section.tell(f"{name}, floor's share of p50", max(computing, reading) / milliseconds)


def _bytes_read(parts: Parts) -> int:
    """Of all weights that an answer depends on, without the token embeddings, of which a few rows are read."""
    skipped = [*unused_modules(parts.model), parts.model.get_input_embeddings()]
    unread = {id(parameter) for module in skipped for parameter in module.parameters()}
    modules = (parts.model, parts.head, parts.projector)
    read = [p for module in modules for p in module.parameters() if id(p) not in unread]
    return sum(parameter.numel() * parameter.element_size() for parameter in read)


@torch.inference_mode()
def batch(section: Section, card: Card) -> None:
    """Several observations at once: time of each, and whether they are told what they are told alone."""
    parts, sizes = card.parts(), card.preset.batches
    names = dict(list(parts.policies(card.preset.kept).items())[:2])
    for attention in ATTENTIONS:
        parts.model.language_model.set_attn_implementation(attention)
        for name, prune in names.items():
            prune()
            for size in (1, *sizes):
                inputs = parts.batch(size)

                def measure(
                    inputs: dict[str, torch.Tensor] = inputs, what: str = f"{attention}, {name}, {size} at once"
                ) -> None:
                    times = clock(lambda: parts.answer(inputs), card.preset.repeats // 2, 2.0, warm_up=2)
                    section.tell(f"{what}, each", quantile(times, 0.5) / len(inputs["input_ids"]), "ms")

                section.attempt(partial(fits, section, f"{attention}, {name}, {size} at once", measure))
    parts.model.language_model.set_attn_implementation("sdpa")
    for name, prune in parts.policies(card.preset.kept).items():
        prune()
        section.attempt(partial(_tell_equality, section, name, parts, sizes[0]))


def _tell_equality(section: Section, name: str, parts: Parts, size: int) -> None:
    """Actions and picks of a batch against those of its samples alone, in bfloat16."""
    inputs = parts.batch(size)
    together, hidden = parts.answer(inputs)
    kept = hidden.selection.kept()
    alone = [parts.answer({key: value[row : row + 1] for key, value in inputs.items()}) for row in range(size)]
    actions = torch.cat([answer[0] for answer in alone])
    others = torch.cat([answer[1].selection.kept() for answer in alone])
    name = f"{name}, {size} at once against alone"
    section.test(f"{name}: all finite", bool(together.isfinite().all()), "True", bool(together.isfinite().all()))
    section.tell(f"{name}: kept tokens that differ", int((kept != others).sum()))
    section.tell(f"{name}: kept tokens", int(others.sum()))
    section.tell(f"{name}: actions off by", float((together - actions).abs().max()))
    section.tell(f"{name}: deviation of actions", float(actions.std()))
    backwards, _ = parts.answer({key: value.flip(0) for key, value in inputs.items()})
    section.tell(f"{name}: in another order, actions off by", float((backwards.flip(0) - together).abs().max()))


@torch.inference_mode()
def memory(section: Section, card: Card) -> None:
    """GPU memory of the weights, and the most that an answer needs, weights included."""
    parts = card.parts()
    free_memory()
    section.tell(
        "weights by their sizes", sum(p.numel() * p.element_size() for p in parts.model.parameters()) / 1e9, "GB"
    )
    section.tell("allocated before an answer", allocated_gb(), "GB")
    for attention in ATTENTIONS:
        parts.model.language_model.set_attn_implementation(attention)
        for name, prune in list(parts.policies(card.preset.kept).items())[:2]:
            prune()
            for size in (1, *card.preset.batches):
                inputs = parts.batch(size)

                def measure(
                    inputs: dict[str, torch.Tensor] = inputs, what: str = f"{attention}, {name}, {size} at once"
                ) -> None:
                    section.tell(f"{what}, peak", peak_gb(lambda: parts.answer(inputs)), "GB")

                section.attempt(partial(fits, section, f"{attention}, {name}, {size} at once", measure))
    parts.model.language_model.set_attn_implementation("sdpa")


def load(section: Section, card: Card) -> None:
    """Writing a checkpoint, and reading it from the disk and from the system's cache, by both ways there are."""
    policy = card.policy()
    looks, sentences = observations(policy, 1)
    policy.set_pruner("none")
    answer = policy.act(looks[0], sentences[0])
    sums = _checksums(policy.model)
    folder = card.folder / "saved"
    began = time.perf_counter()
    save_checkpoint(folder, policy.checkpoint, 0)
    section.tell("save_checkpoint", time.perf_counter() - began, "s")
    section.tell("folder", sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e9, "GB")
    del policy
    card.drop()
    free_memory()

    def from_policy() -> Policy:
        return Policy.from_pretrained(folder, device=card.device, dtype="bfloat16", pruner="none", attention="sdpa")

    def from_map() -> Any:
        return OpenVLAForActionPrediction.from_pretrained(folder, dtype=torch.bfloat16, device_map=str(card.device))

    ways: dict[str, Callable[[], Any]] = {"Policy.from_pretrained": from_policy, "device_map": from_map}
    for name, read in ways.items():
        for state in ("from the disk", "from the cache"):
            if state == "from the disk":
                _forget_pages(folder)
            began = time.perf_counter()
            found = read()
            synchronize()
            section.tell(f"{name}, {state}", time.perf_counter() - began, "s")
            if isinstance(found, Policy):
                off = float(np.abs(found.act(looks[0], sentences[0]) - answer).max())
                loaded = _checksums(found.model)
                differing = [key for key in sums if loaded.get(key) != sums[key]]
                section.test(f"{name}, {state}: tensors that differ", differing[:5] or 0, "none", not differing)
                section.tell(f"{name}, {state}: actions off by", off, at_most=0)
            del found
            free_memory()
    shutil.rmtree(folder)


def _checksums(model: torch.nn.Module) -> dict[str, int]:
    """The sum of each tensor's bytes, buffers included."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {key: int(each.detach().contiguous().view(torch.uint8).sum()) for key, each in tensors.items()}


def _forget_pages(folder: Path) -> None:
    """Have the system drop the files' pages from its cache, where it takes such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
