"""The sequence: BOS | visual | proprio | prompt | action placeholders | stop | padding. One owner for its positions."""

import dataclasses
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from prismatic.models.token_pruner import TokenSelection
from prismatic.vla.prompt import TokenIds

_FIRST_ROW = {"aligned": -1, "tail": 1}
"""By read-out, where the first row lies, from the first action placeholder."""


@dataclass
class Context:
    """Everything behind the visual tokens.

    Attributes:
        embeddings: (B, C, D).
        mask: (B, C) bool, false for padding.
        prefix: number of tokens before the prompt: proprio, then the time step of diffusion, where there are such.
        prompt_length: (B,) prompt tokens without BOS.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor
    prefix: int
    prompt_length: torch.Tensor

    def prompt_mask(self) -> torch.Tensor:
        """(B, C) bool: which of it is the prompt."""
        place = torch.arange(self.mask.shape[1], device=self.mask.device) - self.prefix
        return (place >= 0) & (place < self.prompt_length[:, None])


def complete_prompt(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, ids: TokenIds
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append the empty piece to rows (B, T) that do not end in it; right-pads again where rows then differ.

    Returns:
        ids and mask, (B, T') each.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    rows = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
    piece = input_ids.new_tensor([ids.empty])
    rows = [row if row[-1] == ids.empty else torch.cat([row, piece]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ids.pad)
    length = torch.tensor([len(row) for row in rows], device=input_ids.device)
    return padded, torch.arange(padded.shape[1], device=input_ids.device)[None] < length[:, None]


def tail_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, num_actions: int, ids: TokenIds
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt without BOS, `num_actions` placeholders, stop, padding behind the stop.

    Args:
        input_ids: (B, T) BOS, prompt, empty piece, right-padded.
        attention_mask: (B, T), false for padding.

    Returns:
        ids (B, L) with -1 for placeholders, mask (B, L), prompt length (B,).
    """
    length = attention_mask.long().sum(1) - 1
    width = int(length.max()) + num_actions + 1
    at = torch.arange(width, device=input_ids.device)[None]
    prompt = F.pad(input_ids[:, 1:], (0, max(0, width - input_ids.shape[1] + 1)), value=ids.pad)[:, :width]
    actions_end = length[:, None] + num_actions
    tail = torch.where(at < length[:, None], prompt, torch.full_like(prompt, -1))
    tail = torch.where(at == actions_end, ids.stop, tail)
    tail = torch.where(at > actions_end, ids.pad, tail)
    return tail, at <= actions_end, length


def build_context(
    embed: torch.nn.Embedding,
    tail: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    proprio_token: torch.Tensor | None = None,
    timestep_token: torch.Tensor | None = None,
    action_tokens: torch.Tensor | None = None,
) -> Context:
    """Embed the tail behind the proprio token and the time step (B, 1, D each), where there are such.

    `action_tokens` (B, A, D), the projected noisy actions of diffusion, take the places of the actions, else zeros.
    """
    ids, mask, length = tail
    placeholder = (ids < 0)[..., None]
    embeddings = embed(ids.clamp(min=0)).masked_fill(placeholder, 0.0)
    if action_tokens is not None:
        embeddings = embeddings.masked_scatter(placeholder, action_tokens.to(embeddings.dtype))
    before = [token.to(embeddings.dtype) for token in (proprio_token, timestep_token) if token is not None]
    return Context(
        torch.cat([*before, embeddings], dim=1), F.pad(mask, (len(before), 0), value=True), len(before), length
    )


@dataclass
class Sequence:
    """What the LLM runs over.

    Attributes:
        embeddings: (B, S, D).
        position_ids: (B, S): kept visual tokens have their own original position, the text stands behind all V.
        key_bias: (B, S) float32 added to the attention logits of each key; -inf for padding.
        action_start: (B,) where the first action placeholder stands.
        num_visual: visual rows; they stand behind BOS.
    """

    embeddings: torch.Tensor
    position_ids: torch.Tensor
    key_bias: torch.Tensor
    action_start: torch.Tensor
    num_visual: int

    def action_places(self, num_actions: int, readout: str) -> torch.Tensor:
        """Where in the sequence the rows stand that predict the actions, (B, num_actions).

        `aligned` reads the row before each action token: last prompt row, a0 .. a54. `tail` reads the last rows of the
        sequence, a1 .. stop, as the LightVLA research code does at inference. Raises ValueError for any other.
        """
        if readout not in _FIRST_ROW:
            raise ValueError(f"action_readout {readout!r} is unknown; known: {', '.join(_FIRST_ROW)}")
        first = self.action_start + _FIRST_ROW[readout]
        return first[:, None] + torch.arange(num_actions, device=first.device)

    def action_rows(self, hidden: torch.Tensor, num_actions: int, readout: str) -> torch.Tensor:
        """Rows of hidden (B, S, D) that predict the actions, (B, num_actions, D). As `action_places`."""
        return take_rows(hidden, self.action_places(num_actions, readout))

    def split(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows (B, S, ...) of BOS, of the visual tokens and of the context behind them."""
        return hidden[:, :1], hidden[:, 1 : 1 + self.num_visual], hidden[:, 1 + self.num_visual :]

    def narrow(self, hidden: torch.Tensor, selection: TokenSelection) -> "Sequence":
        """Go on from hidden (B, S, D) of all visual tokens with the selected ones; the other rows stay as they are."""
        bos, _, context = self.split(hidden)
        first, _, behind = self.split(self.position_ids)
        bos_bias, _, context_bias = self.split(self.key_bias)
        kept = selection.index.shape[1]
        return dataclasses.replace(
            self,
            embeddings=torch.cat([bos, selection.tokens.to(hidden.dtype), context], dim=1),
            position_ids=torch.cat([first, 1 + selection.index, behind], dim=1),
            key_bias=torch.cat([bos_bias, selection.key_bias().to(self.key_bias.dtype), context_bias], dim=1),
            action_start=self.action_start - self.num_visual + kept,
            num_visual=kept,
        )


def take_rows(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Of hidden (B, S, D) the rows at places (B, R): (B, R, D)."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def lay_out(bos: torch.Tensor, selection: TokenSelection, context: Context) -> Sequence:
    """Put BOS (B, 1, D), the selected visual tokens and the context in order."""
    batch, kept = selection.index.shape
    width = context.embeddings.shape[1]
    dtype = context.embeddings.dtype
    device = selection.index.device
    embeddings = torch.cat([bos.to(dtype), selection.tokens.to(dtype), context.embeddings], dim=1)
    behind = 1 + selection.num_visual + torch.arange(width, device=device).expand(batch, -1)
    positions = torch.cat([torch.zeros(batch, 1, dtype=torch.long, device=device), 1 + selection.index, behind], dim=1)
    text_bias = torch.zeros(batch, width, device=device).masked_fill(~context.mask, float("-inf"))
    key_bias = torch.cat([torch.zeros(batch, 1, device=device), selection.key_bias(), text_bias], dim=1)
    return Sequence(embeddings, positions, key_bias, 1 + kept + context.prefix + context.prompt_length, kept)
