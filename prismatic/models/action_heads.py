"""Hidden rows of the action tokens -> actions: by regression, or by the most likely action tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from prismatic.models.batch import ActionHidden, EncodedBatch
from prismatic.models.contract import ActionModel, HeadLoss
from prismatic.vla.action_tokenizer import ActionTokenizer


class _ResidualBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """LayerNorm, linear, residual blocks, LayerNorm, linear (OpenVLA-OFT, section IV-B)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_blocks: int = 2) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(_ResidualBlock(hidden_dim) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., input_dim) -> (..., output_dim)."""
        x = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1RegressionActionHead(nn.Module):
    """Continuous actions by regression; trained on the mean absolute error of normalised actions.

    Args:
        llm_dim: width of a hidden row.
        action_dim: length of one action.
        chunk_length: actions predicted at once.
    """

    kind = "l1"

    def __init__(self, llm_dim: int, action_dim: int, chunk_length: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.chunk_length = chunk_length
        self.model = MLPResNet(llm_dim * action_dim, llm_dim, action_dim)

    def predict_action(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, chunk * action_dim, llm_dim) -> (B, chunk, action_dim), normalised."""
        return self.model(rows.reshape(rows.shape[0], self.chunk_length, -1))

    forward = predict_action

    def loss(self, model: ActionModel, encoded: EncodedBatch, batch: Mapping[str, torch.Tensor]) -> HeadLoss:
        """Mean absolute error against `batch["actions"]` (B, chunk, action_dim), computed in float32 at least."""
        hidden = model.run(encoded)
        predicted = self.predict_action(hidden.rows.to(self.model.fc2.weight.dtype))
        predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        return HeadLoss((predicted - batch["actions"].to(predicted.dtype)).abs().mean(), predicted, hidden)

    def predict(
        self, model: ActionModel, encoded: EncodedBatch, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, ActionHidden]:
        """Normalised actions (B, chunk, action_dim) float32 and the `ActionHidden` they came from; draws nothing."""
        hidden = model.run(encoded)
        return self.read(model, hidden.rows), hidden

    def read(self, model: ActionModel, rows: torch.Tensor) -> torch.Tensor:
        """Normalised actions (B, chunk, action_dim) float32 of hidden rows (B, A, D)."""
        return self.predict_action(rows.to(self.model.fc2.weight.dtype)).float()


class DiscreteActionHead(nn.Module):
    """Action tokens, all at once, by the LLM's own head (OpenVLA-OFT, section IV-A, parallel decoding).

    Has no parameters: what is trained is the LLM's head.

    Args:
        tokenizer: actions <-> token ids.
        action_dim: length of one action.
        chunk_length: actions predicted at once.
        stop: id of the token behind the actions, which the loss counts too.
    """

    kind = "discrete"

    def __init__(self, tokenizer: ActionTokenizer, action_dim: int, chunk_length: int, stop: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.action_dim = action_dim
        self.chunk_length = chunk_length
        self.stop = stop

    def loss(self, model: ActionModel, encoded: EncodedBatch, batch: Mapping[str, torch.Tensor]) -> HeadLoss:
        """Mean cross-entropy over the action tokens and the stop token, each predicted by the row before it."""
        hidden = model.run(encoded, further_rows=1)
        logits = model.language_model.lm_head(hidden.rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = torch.from_numpy(self.tokenizer.encode(batch["actions"].double().cpu().numpy())).flatten(1)
        labels = F.pad(ids, (0, 1), value=self.stop).to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return HeadLoss(loss, self._actions(logits.detach()[:, :-1]), hidden)

    def predict(
        self, model: ActionModel, encoded: EncodedBatch, seeds: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, ActionHidden]:
        """Normalised actions (B, chunk, action_dim) float32 and the `ActionHidden` they came from; draws nothing."""
        hidden = model.run(encoded)
        return self.read(model, hidden.rows), hidden

    def read(self, model: ActionModel, rows: torch.Tensor) -> torch.Tensor:
        """Normalised actions (B, chunk, action_dim) float32 of hidden rows (B, A, D)."""
        return self._actions(model.language_model.lm_head(rows))

    def _actions(self, logits: torch.Tensor) -> torch.Tensor:
        """Most likely tokens over the whole vocabulary, (B, A, vocabulary) -> bin centres (B, chunk, action_dim).

        NaN where a logit is NaN or infinite, of which argmax would make a believable action.
        """
        best, tokens = logits.max(-1)
        actions = torch.from_numpy(self.tokenizer.decode(tokens.cpu().numpy())).float().to(logits.device)
        return actions.masked_fill(~best.isfinite(), torch.nan).reshape(-1, self.chunk_length, self.action_dim)
