"""What travels with a batch through one call of the model, and what comes back."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from prismatic.models.stage_clock import StageClock
from prismatic.models.token_pruner import TokenSelection
from prismatic.vla.request import Blanking


@dataclass(eq=False)
class Session:
    """What a pruner remembers of an episode, from one policy query to the next. For one thread at a time.

    Attributes:
        memories: by the number of the LLM's pass, whatever the pruner's site left there in the last query.
    """

    memories: dict[int, Any] = field(default_factory=dict)
    _of: tuple[nn.Module, str | bytes] | None = None
    _is_whole: bool = True

    def begin_query(self, pruner: nn.Module, instruction: str | bytes) -> None:
        """Forget what is of no use: another pruner's, of another instruction, or of a query that was never ended."""
        is_same = self._of is not None and self._of[0] is pruner and self._of[1] == instruction
        if not (is_same and self._is_whole):
            self.memories.clear()
        self._of, self._is_whole = (pruner, instruction), False

    def end_query(self) -> None:
        """The query has brought an answer, so that what was remembered holds."""
        self._is_whole = True


@dataclass(frozen=True)
class Call:
    """What is a call's own, and of no module, so that several threads may call one model.

    Attributes:
        score_noise: (B, Q, V) added to the scores of the pruner's Q queries (V for LightVLA) in training, or None.
        seeds: one per sample, of what a pruner draws at random; None draws from the pruner's own stream.
        clock: told when a stage begins and ends, or None.
        sessions: one per sample, or None for a sample that stands for itself; None: all do.
        number: which pass of the LLM over the same batch it is, from 0; denoising makes several.
        blankings: one per sample, or None for a sample whose tokens keep their content; None: all do.
    """

    score_noise: torch.Tensor | None = None
    seeds: Sequence[int] | None = None
    clock: StageClock | None = None
    sessions: Sequence[Session | None] | None = None
    number: int = 0
    blankings: Sequence[Blanking | None] | None = None

    @property
    def pruner_seeds(self) -> list[tuple[int, int]] | None:
        """Per sample what its random draw follows from: its seed and the number of the pass."""
        return None if self.seeds is None else [(seed, self.number) for seed in self.seeds]

    @property
    def memories(self) -> list[Any] | None:
        """Per sample what its session remembers of this pass in the last query, or None; None without sessions."""
        if self.sessions is None:
            return None
        return [None if session is None else session.memories.get(self.number) for session in self.sessions]

    def remember(self, memories: Sequence[Any]) -> None:
        """Keep for each sample that has a session what the next query is told of this pass."""
        for session, memory in zip(self.sessions or (), memories, strict=False):
            if session is not None:
                session.memories[self.number] = memory

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Count what happens inside as that stage's."""
        return nullcontext() if self.clock is None else self.clock.stage(name)


@dataclass
class EncodedBatch:
    """A batch up to the LLM, which may run over it several times.

    Attributes:
        input_ids: (B, T) BOS, prompt, empty piece; right-padded.
        attention_mask: (B, T), false for padding.
        visual: the projected visual tokens: all of them, or those that a pruner inside the vision backbone kept.
        state_token: (B, 1, D), or None where the state is not read.
        call: noise, seeds and clock.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    visual: TokenSelection
    state_token: torch.Tensor | None
    call: Call = field(default_factory=Call)

    def of_pass(self, number: int) -> "EncodedBatch":
        """The same batch for the LLM's pass of that number."""
        return replace(self, call=replace(self.call, number=number))


@dataclass
class ActionHidden:
    """What the LLM says about the actions.

    Attributes:
        rows: (B, A, D) hidden rows that predict the A action tokens, after the final norm; more where asked for.
        selection: the visual tokens the LLM saw; those that its last layers saw, where they are dropped inside it.
        position_ids: (B, S) of the whole sequence, behind that place.
    """

    rows: torch.Tensor
    selection: TokenSelection
    position_ids: torch.Tensor
