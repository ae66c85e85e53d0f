"""Hidden rows of the action tokens -> actions."""

import torch
from torch import nn


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

    def __init__(self, llm_dim: int, action_dim: int, chunk_length: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.chunk_length = chunk_length
        self.model = MLPResNet(llm_dim * action_dim, llm_dim, action_dim)

    def predict_action(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, chunk * action_dim, llm_dim) -> (B, chunk, action_dim), normalised."""
        return self.model(rows.reshape(rows.shape[0], self.chunk_length, -1))

    forward = predict_action
