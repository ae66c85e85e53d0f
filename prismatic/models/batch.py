"""What travels with a batch through one call of the model, and what comes back."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from prismatic.models.stage_clock import StageClock
from prismatic.models.token_pruner import TokenSelection


@dataclass(frozen=True)
class Call:
    """What is a call's own, and of no module, so that several threads may call one model.

    Attributes:
        score_noise: (B, Q, V) added to the scores of the pruner's Q queries (V for LightVLA) in training, or None.
        seeds: one per sample, of what a pruner draws at random; None draws from the pruner's own stream.
        clock: told when a stage begins and ends, or None.
        number: which pass of the LLM over the same batch it is, from 0; denoising makes several.
    """

    score_noise: torch.Tensor | None = None
    seeds: Sequence[int] | None = None
    clock: StageClock | None = None
    number: int = 0

    @property
    def pruner_seeds(self) -> list[tuple[int, int]] | None:
        """Per sample what its random draw follows from: its seed and the number of the pass."""
        return None if self.seeds is None else [(seed, self.number) for seed in self.seeds]

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
