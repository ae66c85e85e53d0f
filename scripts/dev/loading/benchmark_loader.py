"""This loader beside tensorflow-datasets and tf.data: frames per second, and the most memory of all processes.

    python scripts/dev/loading/benchmark_loader.py --pictures_from datasets/NAME --folder EMPTY [--frames 100000]

Shards of so many frames with two cameras of 256 pixels are made of the pictures of an RLDS dataset in LIBERO's layout.
Both sides give batches of 8 samples: pictures decoded, resized to 224 (lanczos3), cropped and coloured at random, and
normalised for both ViTs; state, chunk of actions and sentence. tf.data shuffles encoded frames in a buffer of as many
as `--buffer`, this loader over everything. Each measurement is a process of its own; rounds alternate.

Processor time per frame is told beside the rate, since it depends less on what else a machine does. Memory is the
proportional set size of a process and its children: what is shared counts once. `own` leaves out pages of files, which
the system takes back when it needs them.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parents[3])

NAME, SIZE, BATCH, STORED = "libero_benchmark", 224, 8, 256
MEANS = ((0.484375, 0.455078125, 0.40625), (0.5, 0.5, 0.5))
STDS = ((0.228515625, 0.2236328125, 0.224609375), (0.5, 0.5, 0.5))
STEPS = 200  # of an episode
WARM_UP = 10  # batches


def make(source: Path, folder: Path, frames: int) -> None:
    """Write the shards; pictures that are smaller are enlarged."""
    from prismatic.pictures.images import resize
    from prismatic.vla.datasets.catalog import get_dataset_spec
    from prismatic.vla.datasets.rlds import RldsIndex
    from prismatic.vla.datasets.writer import NewEpisode, RldsWriter
    from prismatic.vla.images import encode_jpeg

    spec = get_dataset_spec(NAME)
    index = RldsIndex.open(source.parent, source.name)
    places = [(episode, step) for episode in index.episodes for step in range(episode.num_frames)]
    noise = np.random.default_rng(0).normal(0, 1.2, (STORED, STORED, 3))  # a renderer's; the enlarged have none
    pictures: dict[str, list[bytes]] = {}
    for camera in spec.image_keys:
        small = [episode.image(camera, step) for episode, step in places]
        large = [np.clip(resize(p, STORED) + noise, 0, 255).astype(np.uint8) for p in small]
        pictures[camera] = [encode_jpeg(picture) for picture in large]
    rng = np.random.default_rng(1)
    with RldsWriter(folder, spec, dict.fromkeys(pictures, (STORED, STORED))) as writer:
        for first in range(0, frames, STEPS):
            chosen = [(first + step) % len(places) for step in range(STEPS)]
            actions = rng.uniform(-1, 1, (STEPS, 7))
            actions[:, 6] = np.where(actions[:, 6] < 0, -1, 1)
            episode = NewEpisode(
                {camera: [stored[n] for n in chosen] for camera, stored in pictures.items()},
                state=rng.normal(size=(STEPS, 8)).astype(np.float32),
                action=actions.astype(np.float32),
                instruction="put the bowl on the plate",
            )
            writer.add(episode)


def our_batches(folder: Path, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    from prismatic.vla.datasets.collate import collate
    from prismatic.vla.datasets.dataset import FrameDataset
    from prismatic.vla.datasets.rlds import RldsIndex
    from prismatic.vla.datasets.sampler import GlobalBatchSampler
    from prismatic.vla.datasets.statistics import dataset_statistics
    from prismatic.vla.prompt import TokenIds
    from prismatic.vla.robots import LIBERO
    from prismatic.vla.transform import PixelSpec, PolicyTransform

    index = RldsIndex.open(folder, NAME, compare=False)
    statistics, pixels = dataset_statistics(index), PixelSpec(SIZE, MEANS, STDS)
    transform = PolicyTransform(LIBERO, pixels, lambda text: [ord(c) for c in text], TokenIds(), statistics)
    frames = FrameDataset(index, index.spec, transform, augment=True)
    sampler = GlobalBatchSampler(len(frames), BATCH)
    collated = DataLoader(
        frames, batch_sampler=sampler, num_workers=workers, prefetch_factor=4, collate_fn=lambda s: collate(s, 0)
    )
    yield from collated


def their_batches(folder: Path, buffer: int) -> Iterator[Any]:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    import tensorflow as tf
    import tensorflow_datasets as tfds

    skip = tfds.decode.SkipDecoding()
    builder = tfds.builder_from_directory(str(folder / NAME / "1.0.0"))
    decoders = {"steps": {"observation": {"image": skip, "wrist_image": skip}}}
    episodes = builder.as_dataset(split="train", decoders=decoders, shuffle_files=True).repeat()

    def frames(episode: Any) -> Any:
        steps = episode["steps"].batch(10_000).get_single_element()
        count = tf.shape(steps["action"])[0] - 7
        chunk = tf.gather(steps["action"], tf.range(count)[:, None] + tf.range(8)[None])
        stored = steps["observation"]
        kept = [stored["image"], stored["wrist_image"], stored["state"], steps["language_instruction"]]
        return tf.data.Dataset.from_tensor_slices((*(values[:count] for values in kept), chunk))

    def augmented(encoded: Any) -> Any:
        picture = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        picture = tf.image.resize(picture, (SIZE, SIZE), method="lanczos3", antialias=True)
        picture = tf.cast(tf.clip_by_value(tf.round(picture), 0, 255), tf.uint8)
        picture = tf.image.convert_image_dtype(picture, tf.float32)
        extent = tf.sqrt(0.9)
        corner = tf.random.uniform((2,), 0, 1 - extent)
        box = tf.concat([corner, corner + extent], 0)[None]
        picture = tf.clip_by_value(tf.image.crop_and_resize(picture[None], box, [0], (SIZE, SIZE))[0], 0, 1)
        picture = tf.clip_by_value(tf.image.random_brightness(picture, 0.2), 0, 1)
        picture = tf.clip_by_value(tf.image.random_contrast(picture, 0.8, 1.2), 0, 1)
        picture = tf.clip_by_value(tf.image.random_saturation(picture, 0.8, 1.2), 0, 1)
        picture = tf.clip_by_value(tf.image.random_hue(picture, 0.05), 0, 1)
        picture = tf.image.convert_image_dtype(picture, tf.uint8, saturate=True)
        pixels = tf.cast(picture, tf.float32) / 255
        both = [(pixels - mean) / std for mean, std in zip(MEANS, STDS, strict=True)]
        return tf.transpose(tf.concat(both, -1), (2, 0, 1))

    def sample(image: Any, wrist: Any, state: Any, text: Any, chunk: Any) -> Any:
        return tf.concat([augmented(image), augmented(wrist)], 0), state, text, chunk

    dataset = episodes.flat_map(frames).shuffle(buffer)
    dataset = dataset.map(sample, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(4)
    yield from dataset.as_numpy_iterator()


def measure(folder: Path, side: str, buffer: int, seconds: float) -> None:
    """What a process of its own does: one line of JSON at the end."""
    begun = time.perf_counter()
    batches = our_batches(folder, int(side)) if side.isdigit() else their_batches(folder, buffer)
    for _ in range(WARM_UP):
        next(batches)
    started, count, cpu = time.perf_counter(), 0, processor_seconds(os.getpid())
    while time.perf_counter() - started < seconds:
        next(batches)
        count += BATCH
    rate, cpu = count / (time.perf_counter() - started), processor_seconds(os.getpid()) - cpu
    print(json.dumps({"rate": rate, "cpu_ms": 1e3 * cpu / count, "ready": started - begun}), flush=True)
    os._exit(0)  # neither side's threads are waited for


def parts(folder: Path) -> None:
    """Processor time of each part of one sample, two pictures, on one thread."""
    import torch

    from prismatic.vla.augmentation import AugmentationParameters, augment
    from prismatic.vla.datasets.rlds import RldsIndex
    from prismatic.vla.images import resize_lanczos3
    from prismatic.vla.transform import PixelSpec, normalize_pixels

    torch.set_num_threads(1)
    episode = RldsIndex.open(folder, NAME, compare=False).episodes[0]
    cameras, pixels = sorted(episode.cameras), PixelSpec(SIZE, MEANS, STDS)
    stored = [episode.image(camera, 0) for camera in cameras]
    small = np.stack([resize_lanczos3(picture, SIZE) for picture in stored])
    drawn = AugmentationParameters.draw(np.random.default_rng(0), len(small))
    steps: dict[str, Callable[[], Any]] = {
        "decode": lambda: [episode.image(camera, 0) for camera in cameras],
        "resize": lambda: [resize_lanczos3(picture, SIZE) for picture in stored],
        "augment": lambda: augment(small, drawn),
        "normalise": lambda: normalize_pixels(small, pixels),
    }
    spent = {}
    for name, step in steps.items():
        step()
        begun = time.process_time()
        for _ in range(50):
            step()
        spent[name] = (time.process_time() - begun) / 50 * 1e3
    for name, took in spent.items():
        print(f"{name}: {took:.1f} ms of processor a frame, {took / sum(spent.values()):.0%}")


def family(root: int) -> set[int]:
    """A process and all below it."""
    parents = {pid: int(fields[1]) for pid, fields in _stats().items()}
    inside = {root}
    while more := {pid for pid, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return inside


def processor_seconds(root: int) -> float:
    """That a process and all below it have used."""
    stats = _stats()
    ticks = sum(int(stats[pid][11]) + int(stats[pid][12]) for pid in family(root) if pid in stats)
    return ticks / os.sysconf("SC_CLK_TCK")


def _stats() -> dict[int, list[str]]:
    """Of every process the fields of its `stat` behind the name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(stat.parent.name)] = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
    return found


def memory(root: int) -> tuple[int, int]:
    """Bytes of a process and all below it: proportional, and of that what is no page of a file."""
    total = own = 0
    for pid in family(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        total += sizes["Pss"]
        own += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
    return total, own


def measured(given: argparse.Namespace, side: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(given.folder), "--side", side, "--buffer", str(given.buffer)]
    process = subprocess.Popen([*command, "--seconds", str(given.seconds)], stdout=subprocess.PIPE, text=True)
    most = own = 0
    while process.poll() is None:
        now = memory(process.pid)
        most, own = max(most, now[0]), max(own, now[1])
        time.sleep(0.3)
    assert process.stdout is not None
    if process.returncode:
        raise RuntimeError(f"{side} ended with {process.returncode}, having had {most / 1e9:.2f} GB")
    found: dict[str, float] = json.loads(process.stdout.read().splitlines()[-1])
    return found | {"pss": most / 1e9, "own": own / 1e9}


def told(side: str, found: dict[str, float]) -> str:
    return (
        f"{side}: {found['rate']:.1f} frames a second, {found['cpu_ms']:.1f} ms of processor a frame, "
        f"{found['pss']:.2f} GB, own {found['own']:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures_from", type=Path, help="an RLDS dataset; needed where the shards are not there yet")
    parser.add_argument("--folder", type=Path, required=True, help="where the shards are made, and found again")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--buffer", type=int, default=100_000, help="frames that tf.data shuffles")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--parts", action="store_true", help="tell what the parts of this loader take, and end")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measure(given.folder, given.side, given.buffer, given.seconds)
    if not (given.folder / NAME).is_dir():
        make(given.pictures_from.resolve(), given.folder, given.frames)
    if given.parts:
        return parts(given.folder)
    names = {"tf.data": "tf.data", "1": "1 worker", "2": "2 workers"}
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in names}
    for _ in range(given.rounds):
        for side in names:
            rounds[side].append(measured(given, side))
            one = rounds[side][-1]
            print(f"{told(names[side], one)}; the first {WARM_UP} batches took {one['ready']:.0f} s", flush=True)
    print("median:")
    for side, found in rounds.items():
        middle = {key: float(np.median([one[key] for one in found])) for key in found[0]}
        print(told(names[side], middle))


if __name__ == "__main__":
    main()
