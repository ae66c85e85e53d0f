"""What callers hand over as an observation: read in any usual form, refused where it says too little, doubted once."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image

from prismatic.vla.robots import RobotSpec

logger = logging.getLogger(__name__)

_EMPTY_SPREAD = 8
"""Grey levels between the darkest and the brightest value of a picture that shows nothing."""
_FAR = 2.0
"""How many of its ranges a state may lie outside its range before it is doubted. Millimetres, centimetres and degrees
lie further; a new workspace does not."""
_LEAST_RANGE = 1e-3
"""Smaller ranges count as this one: a joint that hardly moved says nothing about units."""


@dataclass(frozen=True)
class Observation:
    """An observation as arrays.

    Attributes:
        images: observation key -> (H, W, 3) uint8, in the order in which the model reads them.
        state: (P,) float64, or None where the model reads none.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray | None


def read_observation(
    observation: Mapping[str, Any], robot: RobotSpec, num_images: int, use_proprio: bool
) -> Observation:
    """What the model reads of an observation; the caller's arrays are left alone.

    Raises ValueError naming the key, what came, what was expected and the remedy.
    """
    cameras = robot.cameras[:num_images]
    needed = [*cameras, *([robot.state_key] if use_proprio else [])]
    if not isinstance(observation, Mapping):
        raise ValueError(f"an observation is a mapping with the keys {needed}, but a {type(observation).__name__} came")
    if missing := [key for key in needed if key not in observation]:
        got = sorted(map(str, observation))
        raise ValueError(f"observation lacks {missing}; robot {robot.name!r} needs {needed}, got {got}")
    images = {key: _image(observation[key], key) for key in cameras}
    return Observation(images, _state(observation[robot.state_key], robot) if use_proprio else None)


def _image(value: Any, key: str) -> np.ndarray:
    if isinstance(value, Image.Image) and value.mode != "RGB":
        raise ValueError(
            f"observation[{key!r}] is a PIL picture of mode {value.mode!r}; expected RGB: image.convert('RGB')"
        )
    image = _array(value, key)
    if isinstance(value, list | tuple) and image.dtype.kind in "iu" and image.size and 0 <= image.min() <= 255:
        image = image.astype(np.uint8) if image.max() <= 255 else image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise ValueError(
            f"observation[{key!r}] is {image.dtype} {image.shape}; expected uint8 (H, W, 3) RGB in 0..255"
            f"{_image_remedy(image)}"
        )
    return image


def _image_remedy(image: np.ndarray) -> str:
    steps = []
    if image.ndim == 4 and len(image) == 1:
        steps.append("one picture per camera and observation: image[0]")
    elif image.ndim == 3 and image.shape[0] == 3 != image.shape[-1]:
        steps.append("colours last: np.transpose(image, (1, 2, 0))")
    elif image.ndim == 3 and image.shape[-1] == 4:
        steps.append("without the alpha channel: image[..., :3]")
    elif image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 1):
        steps.append("grey as three equal colours: np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=-1)")
    if image.dtype.kind == "f" and image.size and np.nanmax(image) <= 1:
        steps.append("values in 0..1 as 0..255: (255 * image).round().astype(np.uint8)")
    elif image.dtype.kind in "iuf" and image.dtype != np.uint8:
        steps.append("values in 0..255 as bytes: image.astype(np.uint8)")
    return "".join(f"; {step}" for step in steps)


def _state(value: Any, robot: RobotSpec) -> np.ndarray:
    key, expected = robot.state_key, f"expected ({robot.proprio_dim},) numbers"
    array = _array(value, key)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"observation[{key!r}] is {array.dtype} {array.shape}; {expected}")
    state = array.astype(np.float64)
    if state.shape != (robot.proprio_dim,):
        hint = f": observation[{key!r}][0]" if state.shape == (1, robot.proprio_dim) else ""
        raise ValueError(f"observation[{key!r}] has shape {state.shape}; {expected}{hint}")
    if not np.isfinite(state).all():
        raise ValueError(f"observation[{key!r}] holds NaN or infinity: {state.tolist()}")
    return state


def _array(value: Any, key: str) -> np.ndarray:
    """Tensors (of any device), PIL pictures, lists and what else NumPy takes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        if isinstance(value, list | tuple):
            value = [v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for v in value]
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"observation[{key!r}], a {type(value).__name__}, makes no array: {error}") from None


@dataclass
class ObservationDoubts:
    """Says once, in the log, what is likely a mistake though it can be computed with; one of these per policy.

    Pictures that show nothing, equal pictures of several cameras, and a state far outside its statistics (other units)
    are noticed. Swapped colours (BGR) and rotated pictures cannot be told from other scenes.

    Args:
        state_key: the observation's key of the state.
        statistics: of the state (`proprio`), or None where the model reads none.
    """

    state_key: str
    statistics: Mapping[str, Any] | None = None
    _said: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self, observation: Observation) -> None:
        """Compare an observation with what may be expected. What has been said is not looked for again."""
        images = observation.images
        if "empty" not in self._said and (key := next((k for k, v in images.items() if _is_empty(v)), None)):
            low, high = int(images[key].min()), int(images[key].max())
            self._say(
                "empty",
                f"observation[{key!r}] shows nothing: all its values are between {low} and {high} of 255. "
                "Is the camera on, and are pictures given as 0..255?",
            )
        if "equal" not in self._said:
            for (first, one), (second, other) in combinations(images.items(), 2):
                if np.array_equal(one, other):
                    self._say(
                        "equal",
                        f"observation[{first!r}] and observation[{second!r}] are the same picture; "
                        "the policy was trained with different cameras",
                    )
                    break
        if "state" not in self._said and observation.state is not None and self.statistics is not None:
            self._look_at_state(observation.state, self.statistics)

    def _look_at_state(self, state: np.ndarray, statistics: Mapping[str, Any]) -> None:
        low, high = (np.asarray(statistics[bound], np.float64) for bound in ("min", "max"))
        with np.errstate(over="ignore"):
            outside = np.maximum(low - state, state - high) / np.maximum(high - low, _LEAST_RANGE)
        far = np.flatnonzero((outside > _FAR) & (high > low)).tolist()
        if not far:
            return
        dimension = max(far, key=lambda number: outside[number])
        self._say(
            "state",
            f"observation[{self.state_key!r}] lies far outside the training data in dimensions {far}: "
            f"{state[dimension]:g} in dimension {dimension}, where it was {low[dimension]:g} to {high[dimension]:g}. "
            "Are units (metres, radians) and order those of the dataset whose statistics apply (unnorm_key)?",
        )

    def _say(self, kind: str, words: str) -> None:
        with self._lock:
            if kind in self._said:
                return
            self._said.add(kind)
        logger.warning("%s (said once per policy)", words)


def _is_empty(image: np.ndarray) -> bool:
    return int(image.max()) - int(image.min()) <= _EMPTY_SPREAD
