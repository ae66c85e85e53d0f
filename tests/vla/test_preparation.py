"""Several observations at once are what they are one by one."""

import threading

import numpy as np
import pytest
from reference_checkpoint import reference_image

from prismatic.vla import preparation
from prismatic.vla.images import prepare_image
from prismatic.vla.preparation import Preparation, in_threads
from prismatic.vla.prompt import TokenIds
from prismatic.vla.robots import LIBERO
from prismatic.vla.transform import PixelSpec, PolicyTransform

PIXELS = PixelSpec(56, ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)), ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)))
BOUNDS = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-1.0] * 8, "max": [1.0] * 8}
TRANSFORM = PolicyTransform(LIBERO, PIXELS, lambda text: [1, *map(ord, text)], TokenIds(), {"proprio": BOUNDS})


def observation(seed: int) -> dict[str, np.ndarray]:
    images = {camera: reference_image(10 * seed + number, 64) for number, camera in enumerate(LIBERO.cameras)}
    return {**images, LIBERO.state_key: np.linspace(-0.5, 0.5, 8) + seed / 100}


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "available_cores", lambda: 4)


def test_threads_change_no_bit(four_cores):
    observations = [observation(seed) for seed in range(6)]
    samples = Preparation(TRANSFORM).samples(TRANSFORM, observations, [f"turn on stove {n}" for n in range(6)])
    for number, (given, sample) in enumerate(zip(observations, samples, strict=True)):
        images = np.stack([prepare_image(given[camera], PIXELS.size, crop=True) for camera in LIBERO.cameras])
        assert np.array_equal(sample["pixel_values"], TRANSFORM.pixel_values(images))
        assert np.array_equal(sample["input_ids"], TRANSFORM.input_ids(f"turn on stove {number}"))
        assert np.array_equal(sample["proprio"], TRANSFORM.proprio(given[LIBERO.state_key]))


def test_the_first_that_is_wrong_is_the_one_that_is_named(four_cores):
    observations = [observation(seed) for seed in range(4)]
    observations[1][LIBERO.state_key] = np.full(8, np.nan)
    del observations[2][LIBERO.cameras[0]]
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        Preparation(TRANSFORM).samples(TRANSFORM, observations, ["turn on the stove"] * 4)


def test_no_more_threads_than_cores(four_cores):
    names = set(in_threads(lambda _: threading.current_thread().name, range(200)))
    assert 1 <= len(names) <= 4 and threading.current_thread().name not in names
    assert list(in_threads(lambda _: threading.current_thread().name, [0])) == [threading.current_thread().name]
