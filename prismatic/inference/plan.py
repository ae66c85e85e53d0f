"""One batch size and one context width, prepared: places for inputs, and the stages of an action over them.

see: pixels -> projected patches; choose: patches and context -> how often each token is picked; act: kept tokens and
context -> hidden rows of the actions, and the actions where the head can be captured. On a GPU each stage is one graph,
`act` one per number of kept tokens.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from prismatic.inference.buckets import Buckets
from prismatic.inference.engine import Parts
from prismatic.inference.layers import Kernels, llama_layer, see, think
from prismatic.inference.prompts import Prompt
from prismatic.inference.replay import Replay
from prismatic.models.batch import Call
from prismatic.models.sequence import Context, lay_out
from prismatic.models.token_pruner import (
    KeepAllTokens,
    TokenSelection,
    gather_tokens,
    group_counts,
    keep_all,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class How:
    """How stages run.

    Attributes:
        kernels: what computes.
        layer: runs a layer of the language model: `llama_layer`, or that compiled.
        capture: into CUDA graphs.
    """

    kernels: Kernels
    layer: Callable[..., torch.Tensor] = llama_layer
    capture: bool = False

    @property
    def is_eager(self) -> bool:
        """Whether the same operations run as in the eager engine: then there is nothing to check."""
        return not self.capture and self.kernels == Kernels() and self.layer is llama_layer


@dataclass(frozen=True)
class Shape:
    """What a plan is made for.

    Attributes:
        batch: rows.
        width: tokens behind the visual ones.
        padded: whether some of them may be padding.
    """

    batch: int
    width: int
    padded: bool


class Plan:
    """See the module. Not for several threads at once.

    Args:
        parts: the policy's; a pruner in front of the language model.
        shape: what it is for.
        buckets: of kept tokens.
        how: stages run.
        pixels: (B, channels, S, S) of the kind that will come.
    """

    def __init__(self, parts: Parts, shape: Shape, buckets: Buckets, how: How, pixels: torch.Tensor) -> None:
        self.parts, self.shape, self.buckets, self.how = parts, shape, buckets, how
        model = parts.model
        device, dtype, batch = model.device, model.dtype, shape.batch
        self._head: Any = parts.action_head  # one of those that `compiled.why_not` lets through: they have `read`
        self._prefix = int(parts.proprio_projector is not None)
        embed = model.get_input_embeddings()
        self._pixels = torch.zeros(batch, *pixels.shape[1:], device=device)
        self._proprio = torch.zeros(batch, model.robot.proprio_dim, device=device)
        self._text = torch.zeros(batch, shape.width - self._prefix, embed.embedding_dim, device=device, dtype=dtype)
        self._mask = torch.zeros(batch, shape.width, device=device, dtype=torch.bool)
        self._length = torch.zeros(batch, device=device, dtype=torch.long)
        self._bos = embed(torch.full((batch, 1), model.config.special_tokens.bos, device=device))
        self._keys: list[bytes] = []
        self._see = Replay(self._seen)
        self._context = Replay(self._read)
        self._choose = Replay(self._chosen)
        self._acts: dict[int, Replay[tuple[torch.Tensor, TokenSelection]]] = {}
        if how.capture:
            self._capture()

    @property
    def captured(self) -> int:
        """Number of graphs."""
        replays: list[Replay[Any]] = [self._see, self._context, self._choose, *self._acts.values()]
        return sum(replay.captured for replay in replays)

    def run(
        self, pixels: torch.Tensor, proprio: torch.Tensor | None, prompts: Sequence[Prompt], call: Call
    ) -> tuple[torch.Tensor, TokenSelection]:
        """Normalised actions (B, chunk, action_dim) float32 and the selection, of as many rows as there are prompts."""
        rows, model = len(prompts), self.parts.model
        self._fill(pixels, proprio, prompts)
        with call.stage("vision"):
            patches = self._see()
        context = self._context()
        if self._counts and call.blankings is None:
            with call.stage("pruner"):
                kept = self.buckets.fit(int(self._choose()[2]))  # the only wait for the device before the end
            with call.stage("llm"):
                result, selection = self._act(kept)()
        elif type(model.pruner) is KeepAllTokens and call.blankings is None:
            with call.stage("llm"):
                result, selection = self._act(model.num_visual_tokens)()
        else:
            layout = Context(context, self._mask, self._prefix, self._length)
            known = {"prompt_mask": layout.prompt_mask()[:rows], "memories": call.memories}
            picked = model.prune(patches[:rows], context[:rows], self._mask[:rows], call=call, known=known)
            with call.stage("llm"):
                result, selection = self._acted_on(_repeated(picked, self.shape.batch), llama_layer)
        return self._predicted(result, rows).clone(), _first(selection, rows)

    def rerun(self, counts: torch.Tensor) -> torch.Tensor:
        """The latest batch's actions, had the tokens of (B, V) counts been picked."""
        rows = len(counts)
        picked = F.pad(counts, (0, 0, 0, self.shape.batch - rows), value=1.0)
        kept = self.buckets.fit(int((picked > 0).sum(1).max()))
        result, _ = self._acted(kept, picked, torch.zeros_like(picked))
        return self._predicted(result, rows)

    def patches(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the latest batch: projected patches (B, V, D), context (B, C, D) and its mask."""
        return self._result(self._see)[:rows], self._result(self._context)[:rows], self._mask[:rows]

    @property
    def _head_inside(self) -> bool:
        return self._head.kind == "l1"

    @property
    def _counts(self) -> bool:
        """Whether the pruner's work has a fixed shape; else it runs between the stages.

        It must say so itself: the `count` of a class that it refines is not its own.
        """
        return "count" in vars(type(self.parts.model.pruner))

    def _fill(self, pixels: torch.Tensor, proprio: torch.Tensor | None, prompts: Sequence[Prompt]) -> None:
        """Put a batch into its places; rows that nobody asked for repeat the first."""
        rows = len(prompts)
        self._pixels[:rows].copy_(pixels, non_blocking=True)
        if proprio is not None:
            self._proprio[:rows].copy_(proprio, non_blocking=True)
        if rows < self.shape.batch:
            self._pixels[rows:] = self._pixels[:1]
            self._proprio[rows:] = self._proprio[:1]
        keys = [prompt.key for prompt in prompts]
        if keys == self._keys:
            return
        self._keys = []  # whatever interrupts the filling leaves nothing that could be taken for filled
        every = [*prompts, *[prompts[0]] * (self.shape.batch - rows)]
        self._text.zero_()
        self._mask.zero_()
        for row, prompt in enumerate(every):
            number = len(prompt.embeddings)
            self._text[row, :number] = prompt.embeddings
            self._mask[row, : self._prefix + number] = True
        self._length.copy_(torch.tensor([prompt.length for prompt in every]))
        self._keys = keys

    def _seen(self) -> torch.Tensor:
        model, multiply = self.parts.model, self.how.kernels.multiply
        projector = model.projector
        features = see(model.vision_backbone, self._pixels.to(model.dtype), self.how.kernels)
        x = multiply(projector.fc2, F.gelu(multiply(projector.fc1, features)))
        return x if projector.fc3 is None else multiply(projector.fc3, F.gelu(x))

    def _read(self) -> torch.Tensor:
        """(B, C, D) of the context."""
        if self.parts.proprio_projector is None:
            return self._text.clone()
        state = self.parts.proprio_projector(self._proprio)
        return torch.cat([state.to(self._text.dtype), self._text], dim=1)

    def _chosen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts and best scores (B, V), and the largest number of kept tokens ()."""
        counts, best = self.parts.model.pruner.count(self._result(self._see), self._result(self._context), self._mask)
        return counts, best, (counts > 0).sum(1).max()

    def _predicted(self, result: torch.Tensor, rows: int) -> torch.Tensor:
        """Actions of the first rows: `result` itself, or what the head reads in it."""
        return result[:rows] if self._head_inside else self._head.read(self.parts.model, result[:rows])

    def _act(self, kept: int) -> Replay[tuple[torch.Tensor, TokenSelection]]:
        if kept not in self._acts:
            self._acts[kept] = self._act_stage(kept)
        return self._acts[kept]

    def _act_stage(self, kept: int) -> Replay[tuple[torch.Tensor, TokenSelection]]:
        if self._counts:
            return Replay(lambda: self._acted(kept, *self._result(self._choose)[:2]))
        return Replay(lambda: self._acted_on(keep_all(self._result(self._see)), self.how.layer))

    def _acted(self, kept: int, counts: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, TokenSelection]:
        patches = self._result(self._see)
        index, valid, count = group_counts(counts, kept)
        tokens = gather_tokens(patches, index, valid)
        multiplicity = self.parts.model.pruner.multiplicity
        picked = TokenSelection(tokens, index, valid, count, patches.shape[1], multiplicity, best)
        return self._acted_on(picked, self.how.layer)

    def _acted_on(
        self, selection: TokenSelection, layer: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, TokenSelection]:
        """Actions (or their hidden rows, where the head runs behind), and the selection."""
        model, kernels = self.parts.model, self.how.kernels
        context = Context(self._result(self._context), self._mask, self._prefix, self._length)
        sequence = lay_out(self._bos, selection, context)
        rows = sequence.action_places(model.robot.num_action_tokens, model.config.action_readout)
        bias = None
        if self.shape.padded or type(model.pruner) is not KeepAllTokens:
            lowest = torch.finfo(model.dtype).min
            bias = sequence.key_bias.clamp(min=lowest).to(model.dtype)[:, None, None, :]
        llama = model.language_model.model
        hidden = think(llama, sequence.embeddings, sequence.position_ids, bias, rows, kernels, layer)
        if self._head_inside:
            return self._head.read(model, hidden), selection
        return hidden, selection

    def _capture(self) -> None:
        began = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        stages: list[Replay[Any]] = [self._see, self._context]
        if self._counts:
            stages.append(self._choose)
        sizes: tuple[int, ...] = ()
        if self._counts:
            sizes = self.buckets.sizes
        elif type(self.parts.model.pruner) is KeepAllTokens:
            sizes = (self.parts.model.num_visual_tokens,)
        self._acts = {size: self._act_stage(size) for size in sizes}
        stages += reversed(self._acts.values())  # the largest first: smaller ones fit into its memory
        for number, stage in enumerate(stages, 1):
            stage()
            stage.capture(pool)
            logger.info("captured %d of %d graphs, %.0f s", number, len(stages), time.perf_counter() - began)

    @staticmethod
    def _result(replay: Replay[Any]) -> Any:
        if replay.result is None:
            raise RuntimeError("a stage ran before the one whose result it reads")
        return replay.result


def _first(selection: TokenSelection, rows: int) -> TokenSelection:
    """Those rows of a selection, without columns that none of them fills, as copies that stay."""
    width = int(selection.valid[:rows].sum(1).max())  # actions are on their way: this waits for them, which comes next
    return _each(selection, lambda x, by_token: (x[:rows, :width] if by_token else x[:rows]).clone())


def _repeated(selection: TokenSelection, rows: int) -> TokenSelection:
    """So many rows; those that nobody asked for repeat the first."""
    there = len(selection.index)
    index = torch.arange(rows).masked_fill(torch.arange(rows) >= there, 0)
    return _each(selection, lambda x, by_token: x[index.to(x.device)])


def _each(selection: TokenSelection, change: Callable[[torch.Tensor, bool], torch.Tensor]) -> TokenSelection:
    """The selection with its tensors changed; the second argument says whether columns are kept tokens."""
    by_token: dict[str, Any] = {
        name: change(value, True)
        for name in ("tokens", "index", "valid", "count", "blanked")
        if (value := getattr(selection, name)) is not None
    }
    scores = None if selection.scores is None else change(selection.scores, False)
    return dataclasses.replace(selection, **by_token, scores=scores)
