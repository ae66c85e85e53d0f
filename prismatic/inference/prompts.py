"""What stands behind the visual tokens, by instruction: token ids, their number and their embeddings, kept at hand."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import torch

from prismatic.models.sequence import tail_ids
from prismatic.vla.prompt import TokenIds

_KEPT = 64
"""Instructions; at 7B one takes about 0.8 MB."""


@dataclass(frozen=True)
class Prompt:
    """Attributes:
    key: its token ids as bytes.
    length: prompt tokens without BOS.
    embeddings: (L, D) of prompt, action placeholders (zero) and stop.
    """

    key: bytes
    length: int
    embeddings: torch.Tensor


class PromptCache:
    """Several threads may ask at once.

    Args:
        embed: the language model's token embeddings.
        num_actions: action placeholders.
        ids: special tokens.
    """

    def __init__(self, embed: torch.nn.Embedding, num_actions: int, ids: TokenIds) -> None:
        self._embed, self._num_actions, self._ids = embed, num_actions, ids
        self._prompts: OrderedDict[bytes, Prompt] = OrderedDict()
        self._lock = Lock()

    def __call__(self, row: torch.Tensor) -> Prompt:
        """(T,) int64 in the host's memory: BOS, prompt, empty piece, without padding."""
        key = row.numpy().tobytes()
        with self._lock:
            if (found := self._prompts.get(key)) is not None:
                self._prompts.move_to_end(key)
                return found
        ids, _, _ = tail_ids(row[None], torch.ones_like(row)[None], self._num_actions, self._ids)
        ids = ids[0].to(self._embed.weight.device)
        embeddings = self._embed(ids.clamp(min=0)).masked_fill((ids < 0)[:, None], 0.0)
        made = Prompt(key, len(row) - 1, embeddings)
        with self._lock:
            self._prompts[key] = made
            if len(self._prompts) > _KEPT:
                self._prompts.popitem(last=False)
        return made
