"""The engine `compiled`: fixed shapes, nothing computed that the action does not need; CUDA graphs on a GPU."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prismatic.inference.buckets import Buckets
from prismatic.inference.engine import Answer, EagerEngine, Parts
from prismatic.inference.kernels import choose_kernels
from prismatic.inference.layers import Kernels, llama_layer
from prismatic.inference.plan import How, Plan, Shape
from prismatic.inference.prompts import PromptCache
from prismatic.inference.self_check import (
    ACTION_TOLERANCE,
    Found,
    compare_picks,
    counts_of,
    rounded_once_more,
    scores_of,
)
from prismatic.libraries import Block
from prismatic.models.batch import Call
from prismatic.models.film import has_film
from prismatic.models.sites import Projector
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner

logger = logging.getLogger(__name__)

_PLANS = 8
"""Shapes that are kept prepared; the one that was used longest ago goes first."""


def why_not(parts: Parts) -> str | None:
    """Why a policy cannot be run by this engine, in words; None: it can."""
    model = parts.model
    if parts.action_head.kind not in ("l1", "discrete"):
        return f"a head of kind {parts.action_head.kind} makes several passes"
    if has_film(model.vision_backbone):
        return "FiLM changes the vision backbone with every instruction"
    if not isinstance(model.site, Projector):
        return f"pruner {model.config.pruner_spec} drops tokens inside the model"
    if getattr(model, "is_quantized", False):
        return "quantized weights bring kernels of their own"
    blocks = [block for vit in model.vision_backbone.vits for block in vit.blocks]
    if others := {type(block).__name__ for block in blocks if type(block) is not Block or block.attn.gate is not None}:
        return f"blocks of kind {', '.join(sorted(others))} in the vision backbone"
    return None


def fused_layer() -> Callable[..., torch.Tensor]:
    """`llama_layer` by torch.compile: one kernel where there were many; shapes are fixed, so each is compiled once."""
    run = torch.compile(llama_layer, fullgraph=True, dynamic=False)

    def layer(*arguments: Any) -> torch.Tensor:
        # Every bucket is a shape, and past a number of shapes torch would rather give up.
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
            return run(*arguments)

    return layer


@dataclass
class CompiledEngine:
    """Several threads may call it; they take turns.

    Attributes:
        parts: what runs.
        padded: whether sizes are rounded up to prepared ones, as a graph needs. None: on a GPU.
        use_compiler: fuse each layer by torch.compile before it is captured. None: on a GPU.
    """

    parts: Parts
    padded: bool | None = None
    use_compiler: bool | None = None
    _plans: dict[Shape, Plan] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        device = self.parts.model.device
        self._on_gpu = device.type == "cuda"
        self._padded = self._on_gpu if self.padded is None else self.padded
        self._eager = EagerEngine(self.parts)
        self._broken: str | None = None
        self._warming_up = False
        self._checked: Found | None = None
        self._how: How | None = None
        self._prompts: PromptCache | None = None
        self._known: list[Any] = [None] * 4

    def answer(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        """As `Engine.answer`."""
        with self._lock:
            self._look()
            if self._broken is None and why_not(self.parts) is None:
                return self._answer(batch, call)
        return self._eager.answer(batch, call)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """As `Engine.warming_up`: the first observation behind it is the first that is compared."""
        self._warming_up = True
        try:
            yield
        finally:
            self._warming_up = False

    def describe(self) -> dict[str, Any]:
        """As `Engine.describe`."""
        if (reason := self._broken or why_not(self.parts)) is not None:
            return {"name": "eager", "instead_of_compiled": reason}
        found: dict[str, Any] = {"name": "compiled"}
        if (how := self._how) is not None:
            found |= {"kernels": dict(how.kernels.names), "fused_by_compiler": how.layer is not llama_layer}
        if graphs := sum(plan.captured for plan in self._plans.values()):
            found["cuda_graphs"] = graphs
        if self._checked is not None:
            found["action_error_to_eager"] = self._checked.action_error
        return found

    def _look(self) -> None:
        """Forget what was prepared for, or found out about, other parts."""
        parts = [self.parts.model, self.parts.model.pruner, self.parts.action_head, self.parts.proprio_projector]
        if any(part is not known for part, known in zip(parts, self._known, strict=True)):  # plans are made for them
            self._plans.clear()
            self._checked, self._prompts, self._broken, self._known = None, None, None, parts

    def _answer(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        try:
            plan, answer = self._run(batch, call)
            if self._checked is None and self._may_check(call) and not self._chosen().is_eager:
                self._check(plan, batch, call, answer)
        except RuntimeError as error:
            if not self._on_gpu:
                raise
            self._give_up(_first_line(error))
        if self._broken is not None:
            return self._eager.answer(batch, call)
        return answer

    def _may_check(self, call: Call) -> bool:
        """Whether it is a plain observation that was really seen."""
        return not self._warming_up and call.blankings is None

    def _run(self, batch: Mapping[str, torch.Tensor], call: Call) -> tuple[Plan, Answer]:
        parts = self.parts
        if self._prompts is None:
            model = parts.model
            ids, actions = model.config.special_tokens, model.robot.num_action_tokens
            self._prompts = PromptCache(model.get_input_embeddings(), actions, ids)
        prompts = [
            self._prompts(row[keep]) for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        reads_state = parts.proprio_projector is not None
        widths = {len(prompt.embeddings) + reads_state for prompt in prompts}
        rows, width = len(prompts), max(widths)
        exact = len(widths) == 1 and type(parts.model.pruner) is KeepAllTokens  # no mask, which flash attention refuses
        buckets = Buckets.of(parts.model.num_visual_tokens, rows) if self._padded else Buckets()
        padded = not exact and (self._padded or len(widths) > 1)
        shape = Shape(buckets.batch(rows), buckets.context_width(width) if padded else width, padded)
        plan = self._plans.pop(shape, None)
        if plan is None:
            plan = self._prepared(shape, buckets, batch["pixel_values"])
        self._plans[shape] = plan
        if len(self._plans) > _PLANS:
            del self._plans[next(iter(self._plans))]
        return plan, Answer(
            *plan.run(batch["pixel_values"], batch.get("proprio") if reads_state else None, prompts, call)
        )

    def _prepared(self, shape: Shape, buckets: Buckets, pixels: torch.Tensor) -> Plan:
        """A plan for that shape; without fusing where torch.compile fails, as where no compiler is installed."""
        how = self._chosen()
        logger.info("preparing a batch of %d with %d tokens behind the visual ones", shape.batch, shape.width)
        try:
            return Plan(self.parts, shape, buckets, how, pixels)
        except Exception as error:  # whatever a compiler says
            if how.layer is llama_layer or isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning("layers are not fused: torch.compile failed with %s", _first_line(error))
            self._how = replace(how, layer=llama_layer)
        return Plan(self.parts, shape, buckets, self._how, pixels)

    def _chosen(self) -> How:
        if self._how is None:
            model = self.parts.model
            kernels = Kernels() if self._on_gpu else choose_kernels(model, model.dtype)
            wants_compiler = self._on_gpu if self.use_compiler is None else self.use_compiler
            layer = fused_layer() if wants_compiler else llama_layer
            self._how = How(kernels, layer, capture=self._on_gpu)
        return self._how

    def _check(self, plan: Plan, batch: Mapping[str, torch.Tensor], call: Call, answer: Answer) -> None:
        """Compare with the eager engine, once; give up where they differ by more than rounding."""
        dtype, model = self.parts.model.dtype, self.parts.model
        if call.seeds is None and "seeds" in getattr(model.pruner, "needs", ()):
            return  # it would draw other tokens, and the stream would move on; a query with seeds can be compared
        call = replace(call, clock=None)
        eager = self._eager.answer(batch, call)
        others = unexcused = 0
        predicted = answer.predicted
        if type(model.pruner) is TokenPruner:
            rows = len(predicted)
            patches, context, mask = plan.patches(rows)
            ours = scores_of(patches, context, mask)
            visual = model.encode_images(batch["pixel_values"].to(model.device))
            others, unexcused = compare_picks(ours, scores_of(visual, context, mask), dtype)
            if others:
                predicted = plan.rerun(counts_of(eager.selection))
        error, spread = float((predicted - eager.predicted).abs().max()), 0.0
        if error > ACTION_TOLERANCE.get(dtype, 0.0):
            moved = {**batch, "pixel_values": rounded_once_more(batch["pixel_values"], dtype)}
            spread = float((self._eager.answer(moved, call).predicted - eager.predicted).abs().max())
        self._checked = Found(error, spread, others, unexcused)
        if (reason := self._checked.reason(dtype)) is not None and bool(eager.predicted.isfinite().all()):
            self._give_up(f"the first observation: {reason}")

    def _give_up(self, reason: str) -> None:
        logger.warning("engine compiled is given up for eager: %s", reason)
        self._broken = reason
        self._plans.clear()


def _first_line(error: BaseException) -> str:
    """What kind of error it is, and how its message begins."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
