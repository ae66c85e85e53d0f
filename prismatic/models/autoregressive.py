"""Action tokens one after another, as the original OpenVLA decodes them (arXiv 2406.09246, section 3)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from prismatic.models.batch import ActionHidden, EncodedBatch
from prismatic.models.contract import ActionModel, HeadLoss
from prismatic.vla.action_tokenizer import ActionTokenizer

AUTOREGRESSIVE = "autoregressive"
WITHOUT_FILES = ("discrete", AUTOREGRESSIVE)
"""Kinds of heads that read the LLM's own head and have no file."""


class AutoregressiveActionHead(nn.Module):
    """One action per policy query: its tokens by greedy decoding over the LLM's own head, under causal attention.

    Has no parameters, reads all visual tokens and no state. Only for policies that were trained so; fine-tuning starts
    with another head.

    Args:
        tokenizer: actions <-> token ids.
        action_dim: length of one action, and so the number of tokens.
    """

    kind = AUTOREGRESSIVE
    chunk_length = 1

    def __init__(self, tokenizer: ActionTokenizer, action_dim: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.action_dim = action_dim

    def loss(self, model: ActionModel, encoded: EncodedBatch, batch: Mapping[str, torch.Tensor]) -> HeadLoss:
        """Raises RuntimeError."""
        raise RuntimeError("the autoregressive head is for inference; fine-tune with an l1, diffusion or discrete head")

    def predict(
        self, model: ActionModel, encoded: EncodedBatch, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, ActionHidden]:
        """Normalised actions (B, 1, action_dim) float32 and the `ActionHidden` they came from; draws nothing.

        NaN where a token's logit is NaN or infinite, which would else pass for an action.
        """
        ids, logits, hidden = model.decode(encoded, self.action_dim)
        actions = torch.from_numpy(self.tokenizer.decode(ids.cpu().numpy())).float().to(ids.device)
        return actions.masked_fill(~logits.isfinite(), torch.nan)[:, None], hidden


def check_decodable(pruner: str, reads_state: bool = False, readout: str = "aligned") -> None:
    """Raises ValueError where tokens cannot be decoded one after another.

    Args:
        pruner: name of the pruner.
        reads_state: whether there is a token of the robot state.
        readout: which rows are read.
    """
    what = "action tokens are decoded one after another (autoregressive) "
    if pruner != "none":
        raise ValueError(f"{what}over all visual tokens, but the pruner is {pruner!r}; set pruner to none")
    if reads_state:
        raise ValueError(f"{what}without the robot state; set use_proprio to False")
    if readout != "aligned":
        raise ValueError(f"{what}each by the row before it, so action_readout {readout!r} means nothing; leave it out")
