"""From pictures and sentences to model inputs: what is kept, and on which threads."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from prismatic.vla.prompt import TokenIds
from prismatic.vla.robots import LIBERO
from prismatic.vla.transform import PixelSpec, PolicyTransform, normalize_pixels

PIXELS = PixelSpec(32, ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)), ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)))


def test_pixels_are_normalised_per_vit_and_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    values = normalize_pixels(images, PIXELS)
    assert values.shape == (12, 32, 32) and values.dtype == torch.float32
    for channel in range(12):
        image, vit, colour = channel // 6, channel // 3 % 2, channel % 3
        plain = (images[image, ..., colour] / 255 - PIXELS.means[vit][colour]) / PIXELS.stds[vit][colour]
        np.testing.assert_allclose(values[channel], plain, atol=1e-6)


def test_sentences_are_tokenised_once_and_not_kept_without_bound():
    asked: list[str] = []

    def tokenize(text: str) -> list[int]:
        asked.append(text)
        return [1, len(text)]

    transform = PolicyTransform(LIBERO, PIXELS, tokenize, TokenIds(), {}, max_prompt_tokens=3)
    first = transform.input_ids("open the drawer")
    assert first.tolist() == [1, len("In: What action should the robot take to open the drawer?\nOut:"), 29871]
    assert transform.input_ids(b"open the drawer") is first and len(asked) == 1
    for number in range(3000):
        transform.input_ids(f"open drawer {number}")
    assert len(transform._ids) <= 1024
    short = PolicyTransform(LIBERO, PIXELS, tokenize, TokenIds(), {}, max_prompt_tokens=2)
    with pytest.raises(ValueError, match=r"takes 3 tokens with the prompt around it, but the model has room for 2 "):
        short.input_ids("open the drawer")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_images_are_prepared_on_the_calling_thread_alone():
    """Threads of torch that wait for each other stall a policy beside a busy process; there are none to wait for."""
    code = """
import os
import numpy as np
import torch
from prismatic.vla.datasets.collate import collate
from prismatic.vla.prompt import TokenIds
from prismatic.vla.robots import LIBERO
from prismatic.vla.transform import PixelSpec, PolicyTransform

def threads():
    return len(os.listdir("/proc/self/task"))

pixels = PixelSpec(224, ((0.5, 0.5, 0.5),) * 2, ((0.5, 0.5, 0.5),) * 2)
transform = PolicyTransform(LIBERO, pixels, lambda text: [1, 5], TokenIds(), {}, use_proprio=False)
images = np.random.default_rng(0).integers(0, 256, (2, 480, 640, 3), dtype=np.uint8)
before = threads()
prepared = transform.prepare_images(dict(zip(LIBERO.cameras, images)))
sample = {"input_ids": transform.input_ids("open"), "pixel_values": transform.pixel_values(prepared)}
collate([sample] * 4, 32000)
after = threads()
torch.ones(4000, 4000).add_(1)
print(after - before, threads() > after)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "True"], done
