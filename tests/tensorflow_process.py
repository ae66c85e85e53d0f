"""TensorFlow's side of the parity tests, for a process of its own.

TensorFlow and Mesa's software renderer each bring an LLVM: loaded into one process, in either order, they crash it. So
no test imports TensorFlow; the fixture `tensorflow` calls the functions below in a process that does.
"""

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

INSTALLED = all(importlib.util.find_spec(module) for module in ("tensorflow", "tensorflow_datasets"))

TensorFlow = Callable[..., Any]
"""`tensorflow(function, *arguments)` returns what the function returns in TensorFlow's process."""


@contextmanager
def started() -> Iterator[TensorFlow]:
    """A process for the functions of this module; it starts at the first call, which takes some seconds."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_set_environment) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def _set_environment() -> None:
    """Compute on the CPU, and say nothing about optimisations that do not concern us."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0"}


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A uint8 image (H, W, 3) as uint8 (size, size, 3): Lanczos with antialiasing, rounded."""
    import tensorflow as tf

    pixels = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8).numpy()


def center_cropped(image: np.ndarray, area: float = 0.9) -> np.ndarray:
    """The middle `area` of a square uint8 image (S, S, 3), enlarged to the image's size."""
    import tensorflow as tf

    extent = tf.sqrt(tf.constant(area))
    box = tf.stack([(1 - extent) / 2, (1 - extent) / 2, (1 + extent) / 2, (1 + extent) / 2])[None]
    pixels = tf.image.convert_image_dtype(image, tf.float32)[None]
    pixels = tf.clip_by_value(tf.image.crop_and_resize(pixels, box, [0], image.shape[:2]), 0, 1)
    return tf.image.convert_image_dtype(pixels, tf.uint8, saturate=True)[0].numpy()


def compressed(image: np.ndarray, quality: int = 95) -> np.ndarray:
    """A uint8 image (H, W, 3) after a JPEG round trip."""
    import tensorflow as tf

    return tf.io.decode_jpeg(tf.io.encode_jpeg(image, quality=quality)).numpy()


def decoded(data: bytes) -> np.ndarray:
    """A stored picture of any format as uint8 (H, W, 3)."""
    import tensorflow as tf

    return tf.io.decode_image(data, channels=3, expand_animations=False).numpy()


def augmented(images: np.ndarray, parameters: list[dict[str, float]]) -> np.ndarray:
    """uint8 images (I, H, W, 3), each augmented with its own parameters, named as in `AugmentationParameters`."""
    import tensorflow as tf

    side = np.sqrt(np.float32(0.9))
    results = []
    for image, values in zip(images, parameters, strict=True):
        top, left = np.float32(values["top"]), np.float32(values["left"])
        box = np.float32([[top, left, top + side, left + side]])
        x = tf.image.convert_image_dtype(image, tf.float32)
        x = tf.clip_by_value(tf.image.crop_and_resize(x[None], box, [0], image.shape[:2])[0], 0, 1)
        x = tf.clip_by_value(tf.image.adjust_brightness(x, values["brightness"]), 0, 1)
        x = tf.clip_by_value(tf.image.adjust_contrast(x, values["contrast"]), 0, 1)
        x = tf.clip_by_value(tf.image.adjust_saturation(x, values["saturation"]), 0, 1)
        x = tf.clip_by_value(tf.image.adjust_hue(x, values["hue"]), 0, 1)
        results.append(tf.image.convert_image_dtype(x, tf.uint8, saturate=True).numpy())
    return np.stack(results)


def read_rlds(folder: Path) -> list[dict[str, Any]]:
    """What tensorflow-datasets reads in `<root>/<name>/<version>`: `steps` and `path` of each training episode."""
    import tensorflow_datasets as tfds

    episodes = tfds.builder_from_directory(str(folder)).as_dataset(split="train", shuffle_files=False)
    return [
        {
            "steps": list(tfds.as_numpy(episode["steps"])),
            "path": episode["episode_metadata"]["file_path"].numpy().decode(),
        }
        for episode in episodes
    ]


def write_shard(path: Path, features: dict[str, list]) -> None:
    """Writes a shard of one record, a `tf.train.Example` of lists of bytes, ints or floats."""
    import tensorflow as tf

    def feature(values: list) -> Any:
        if isinstance(values[0], bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        if isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))

    example = tf.train.Example(
        features=tf.train.Features(feature={key: feature(values) for key, values in features.items()})
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(example.SerializeToString())
