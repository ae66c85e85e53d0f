"""Samples to a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def collate(samples: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """Stack samples; prompts are padded on the right to the longest.

    Args:
        samples: items of a `FrameDataset`, or `Policy.model_inputs` (no actions, no position).
        pad_token_id: fills the padding; `attention_mask` is what tells it from text.

    Returns:
        input_ids (B, T) int64, attention_mask (B, T) bool, pixel_values (B, 3*n*I, S, S) float32, and what else the
        samples have of actions (B, 8, 7) float32, proprio (B, P) float32, positions (B,) int64, dataset_names (B).
    """
    rows = [torch.as_tensor(sample["input_ids"]) for sample in samples]
    lengths = torch.tensor([len(row) for row in rows])
    batch: dict[str, Any] = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": torch.arange(int(lengths.max())) < lengths[:, None],
        # By NumPy, on the calling thread: large copies of torch's share the work among threads (see `images`).
        "pixel_values": torch.from_numpy(np.stack([np.asarray(sample["pixel_values"]) for sample in samples])),
    }
    for key in ("actions", "proprio"):
        if key in samples[0]:
            batch[key] = torch.stack([torch.as_tensor(sample[key]) for sample in samples])
    if "position" in samples[0]:
        batch["positions"] = torch.tensor([sample["position"] for sample in samples])
        batch["dataset_names"] = [sample["dataset_name"] for sample in samples]
    return batch
