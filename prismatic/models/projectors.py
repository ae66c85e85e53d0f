"""Small MLPs into the LLM's width, with the published parameter names."""

import torch
from torch import nn
from torch.nn import functional as F


class VisionProjector(nn.Module):
    """Patch features -> LLM width: three layers for a fused backbone, two for a single ViT, exact GELU between."""

    def __init__(self, feature_dim: int, llm_dim: int, fused: bool) -> None:
        super().__init__()
        hidden = 4 * feature_dim if fused else llm_dim
        self.fc1 = nn.Linear(feature_dim, hidden)
        self.fc2 = nn.Linear(hidden, llm_dim)
        self.fc3 = nn.Linear(llm_dim, llm_dim) if fused else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, V, feature_dim) -> (B, V, llm_dim)."""
        x = self.fc2(F.gelu(self.fc1(features)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


class ProprioProjector(nn.Module):
    """Normalised robot state -> one token."""

    def __init__(self, llm_dim: int, proprio_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, llm_dim)
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        """(B, proprio_dim) -> (B, 1, llm_dim). Computed in the projector's own dtype."""
        x = proprio.to(self.fc1.weight.dtype)
        return self.fc2(F.gelu(self.fc1(x)))[:, None]


class NoisyActionProjector(nn.Module):
    """One noisy action value -> one token, under diffusion."""

    def __init__(self, llm_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, llm_dim)
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def forward(self, noisy_actions: torch.Tensor) -> torch.Tensor:
        """(B, A, 1) -> (B, A, llm_dim). Computed in the projector's own dtype."""
        return self.fc2(F.gelu(self.fc1(noisy_actions.to(self.fc1.weight.dtype))))
