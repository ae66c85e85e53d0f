"""From an observation and a sentence to model inputs: the one path that the dataset and the policy both take."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prismatic.vla import normalization
from prismatic.vla.images import prepare_image
from prismatic.vla.prompt import TokenIds, as_instruction, prompt_ids
from prismatic.vla.robots import RobotSpec

_SENTENCES_KEPT = 1024
_TOKENIZING = threading.Lock()
"""Fast tokenizers are set up anew by every call, and refuse that while another thread uses them."""


@dataclass(frozen=True)
class PixelSpec:
    """What the vision backbone wants to see.

    Attributes:
        size: image side in pixels.
        means: per ViT, the three channel means that are subtracted from values in [0, 1].
        stds: per ViT, the three channel deviations that are divided by.
    """

    size: int
    means: tuple[tuple[float, float, float], ...]
    stds: tuple[tuple[float, float, float], ...]


def normalize_pixels(images: np.ndarray, pixels: PixelSpec) -> torch.Tensor:
    """(I, S, S, 3) uint8 -> (I * 3 * n, S, S) float32, n ViTs; per image the channels of every ViT in turn."""
    x = images.transpose(0, 3, 1, 2).astype(np.float32, order="C")
    x /= 255
    mean = np.array(pixels.means, np.float32)[:, :, None, None]
    std = np.array(pixels.stds, np.float32)[:, :, None, None]
    normalized = x[:, None] - mean
    normalized /= std
    return torch.from_numpy(normalized.reshape(-1, *x.shape[2:]))


@dataclass(frozen=True)
class PolicyTransform:
    """Turns facts into model inputs, and normalised actions back into the robot's.

    Attributes:
        robot: shapes and normalisation.
        pixels: image size and channel normalisation.
        tokenize: text -> token ids.
        token_ids: the special ids of that tokenizer.
        statistics: one dataset's statistics (see `prismatic.vla.normalization`).
        num_images: how many of the robot's cameras the model reads, in order.
        use_proprio: whether the model reads the state.
        center_crop: whether inference crops the central 0.9 of the area, as after training with augmentation.
        max_prompt_tokens: room in the model's sequence for BOS, prompt and empty piece; None: unlimited.
    """

    robot: RobotSpec
    pixels: PixelSpec
    tokenize: Callable[[str], Sequence[int]]
    token_ids: TokenIds
    statistics: Mapping[str, Any]
    num_images: int = 2
    use_proprio: bool = True
    center_crop: bool = True
    max_prompt_tokens: int | None = None
    _ids: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def image_size(self) -> int:
        """Image side in pixels."""
        return self.pixels.size

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows of a batch."""
        return self.token_ids.pad

    def input_ids(self, instruction: str | bytes) -> np.ndarray:
        """(T,) int64: BOS, prompt, empty piece. A sentence that was met lately is not tokenised again.

        Raises ValueError for what is no sentence (see `as_instruction`), and for one too long for the model.
        """
        sentence = as_instruction(instruction)
        ids = self._ids.get(sentence)
        if ids is None:
            with _TOKENIZING:
                ids = np.asarray(prompt_ids(self.tokenize, sentence, self.token_ids), np.int64)
            if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
                raise ValueError(
                    f"the instruction takes {len(ids)} tokens with the prompt around it, but the model has room for "
                    f"{self.max_prompt_tokens} beside images and actions; shorten it: {sentence[:60]!r}..."
                )
            if len(self._ids) >= _SENTENCES_KEPT:
                self._ids.clear()
            self._ids[sentence] = ids
        return ids

    def prepare_images(self, observation: Mapping[str, Any]) -> np.ndarray:
        """Raw camera images of an observation -> (I, S, S, 3) uint8, as the model sees them at inference."""
        cameras = self.robot.cameras[: self.num_images]
        return np.stack([prepare_image(observation[key], self.image_size, crop=self.center_crop) for key in cameras])

    def pixel_values(self, images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
        """Prepared (I, S, S, 3) uint8 images -> (I * 3 * n, S, S) float32."""
        return normalize_pixels(np.asarray(images), self.pixels)

    def proprio(self, state: np.ndarray) -> np.ndarray:
        """Raw (P,) state -> (P,) float32 in [-1, 1]. The caller's array is left alone."""
        with np.errstate(over="ignore"):  # clipped, however large it is
            return normalization.normalize(state, self.statistics["proprio"], self.robot.normalization)

    def actions(self, actions: np.ndarray) -> np.ndarray:
        """Raw (..., A) actions, gripper in [0, 1] -> float32, normalised."""
        return normalization.normalize(actions, self.statistics["action"], self.robot.normalization)

    def unnormalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """Normalised (..., A) actions -> the robot's units, float64."""
        return normalization.unnormalize(actions, self.statistics["action"], self.robot.normalization)
