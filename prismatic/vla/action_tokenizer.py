"""Continuous actions in [-1, 1] <-> bins <-> the last ids of the vocabulary (OpenVLA, section 3.2)."""

import numpy as np


class ActionTokenizer:
    """Uniform bins over [-1, 1]; bin b (1-based, as numpy.digitize counts) is token `action_end - b`.

    Args:
        action_end: one past the highest action token (32000 for Llama-2).
        bins: number of bin edges.
    """

    def __init__(self, action_end: int = 32000, bins: int = 256) -> None:
        self.action_end = action_end
        self.edges = np.linspace(-1.0, 1.0, bins)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2.0

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions of any shape -> token ids of the same shape (int64)."""
        return (self.action_end - np.digitize(np.clip(actions, -1.0, 1.0), self.edges)).astype(np.int64)

    def decode(self, token_ids: np.ndarray) -> np.ndarray:
        """Token ids of any shape -> bin centres (float64); ids outside the action range take the nearest bin."""
        return self.centers[np.clip(self.action_end - np.asarray(token_ids) - 1, 0, len(self.centers) - 1)]
