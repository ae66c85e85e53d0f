"""LeRobot datasets of the versions 2.1 and 3.0 on disk, written by their documented layout with pyarrow and PyAV."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures_rlds import encoded

from prismatic.vla.datasets.stored.episode import Episode

NAMES = {"full_image": "observation.images.image", "wrist_image": "observation.images.wrist_image"}
LOSSLESS = ("libx264rgb", "rgb24", {"qp": "0", "g": "2"})
LOSSY = ("libx264", "yuv420p", {"crf": "18", "g": "2"})
Codec = tuple[str, str, dict[str, str]]


def write_lerobot(
    folder: Path,
    episodes: Sequence[Episode],
    version: str = "v3.0",
    codec: Codec | None = None,
    fps: int = 20,
    names: Mapping[str, str] = NAMES,
    changed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Path:
    """Write episodes as stored, gripper included, into `folder`.

    Args:
        folder: of the dataset.
        episodes: whose pictures, states, actions and sentences are taken.
        version: `v2.1` or `v3.0`; the latter in one file of values and one video per camera.
        codec: of videos; None: PNG in Parquet files.
        fps: frames per second.
        names: camera -> feature.
        changed: what becomes of `info.json`.
    """
    texts = list(dict.fromkeys(text for episode in episodes for text in episode.instructions))
    tables = [
        _table(episode, number, texts, fps, names if codec is None else {}) for number, episode in enumerate(episodes)
    ]
    old = version != "v3.0"
    (folder / "meta").mkdir(parents=True)
    rows = _files(folder, episodes, tables, codec, fps, names, old)
    info: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": "panda",
        "total_episodes": len(episodes),
        "total_frames": sum(episode.num_frames for episode in episodes),
        "total_tasks": len(texts),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        if old
        else "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if old
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": _features(episodes[0], codec, names),
    }
    (folder / "meta" / "info.json").write_text(json.dumps(changed(info), indent=4))
    if old:
        _write_lines(folder / "meta" / "tasks.jsonl", [{"task_index": n, "task": text} for n, text in enumerate(texts)])
        _write_lines(folder / "meta" / "episodes.jsonl", rows)
    else:
        tasks = pa.table({"task_index": list(range(len(texts))), "__index_level_0__": texts})
        pq.write_table(tasks, folder / "meta" / "tasks.parquet")
        place = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        place.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), place)
    return folder


def encode_video(path: Path, pictures: Sequence[np.ndarray], codec: Codec, fps: int) -> None:
    """Pictures as a video. Skips the test where PyAV is not installed."""
    av = pytest.importorskip("av")
    name, pixel_format, options = codec
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(name, fps, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixel_format
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _files(
    folder: Path,
    episodes: Sequence[Episode],
    tables: Sequence[pa.Table],
    codec: Codec | None,
    fps: int,
    names: Mapping[str, str],
    old: bool,
) -> list[dict[str, Any]]:
    """Writes values and videos; returns what `meta` says of each episode."""
    rows: list[dict[str, Any]] = []
    for number, episode in enumerate(episodes):
        tasks = list(dict.fromkeys(episode.instructions))
        rows.append({"episode_index": number, "tasks": tasks, "length": episode.num_frames})
    cameras = names if codec is not None else {}
    if old:
        (folder / "data" / "chunk-000").mkdir(parents=True)
        for number, (episode, table) in enumerate(zip(episodes, tables, strict=True)):
            pq.write_table(table, folder / "data" / "chunk-000" / f"episode_{number:06d}.parquet")
            for camera, name in cameras.items():
                path = folder / "videos" / "chunk-000" / name / f"episode_{number:06d}.mp4"
                encode_video(path, _pictures(episode, camera), codec or LOSSLESS, fps)
        return rows
    (folder / "data" / "chunk-000").mkdir(parents=True)
    with pq.ParquetWriter(folder / "data" / "chunk-000" / "file-000.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    first = 0
    for row, episode in zip(rows, episodes, strict=True):
        end = first + episode.num_frames
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": first, "dataset_to_index": end}
        for name in cameras.values():
            row |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": 0}
            row |= {f"videos/{name}/from_timestamp": first / fps, f"videos/{name}/to_timestamp": end / fps}
        first = end
    for camera, name in cameras.items():
        pictures = [picture for episode in episodes for picture in _pictures(episode, camera)]
        encode_video(folder / "videos" / name / "chunk-000" / "file-000.mp4", pictures, codec or LOSSLESS, fps)
    return rows


def _pictures(episode: Episode, camera: str) -> list[np.ndarray]:
    return [episode.image(camera, step) for step in range(episode.num_frames)]


def _table(episode: Episode, number: int, texts: list[str], fps: int, names: Mapping[str, str]) -> pa.Table:
    steps = episode.num_frames
    columns: dict[str, Any] = {}
    for camera, name in names.items():
        pictures = [
            {"bytes": encoded(p, "PNG"), "path": f"frame-{n:06d}.png"} for n, p in enumerate(_pictures(episode, camera))
        ]
        columns[name] = pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    if episode.state is not None:
        columns["observation.state"] = pa.array(list(episode.state), pa.list_(pa.float32(), episode.state.shape[1]))
    columns["action"] = pa.array(list(episode.action), pa.list_(pa.float32()))
    columns["timestamp"] = pa.array((np.arange(steps) / fps).astype(np.float32))
    columns["frame_index"] = pa.array(np.arange(steps))
    columns["episode_index"] = pa.array(np.full(steps, number))
    columns["index"] = pa.array(np.arange(steps))
    columns["task_index"] = pa.array([texts.index(text) for text in episode.instructions])
    return pa.table(columns)


def _features(episode: Episode, codec: Codec | None, names: Mapping[str, str]) -> dict[str, Any]:
    height, width, _ = episode.image(next(iter(names)), 0).shape
    kind = "image" if codec is None else "video"
    features: dict[str, Any] = {
        name: {"dtype": kind, "shape": [height, width, 3], "names": ["height", "width", "channel"]}
        for name in names.values()
    }
    motors = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    if episode.state is not None:
        width = episode.state.shape[1]
        features["observation.state"] = {
            "dtype": "float32",
            "shape": [width],
            "names": {"motors": [*motors, "gripper"]},
        }
    features["action"] = {"dtype": "float32", "shape": [episode.action.shape[1]], "names": {"motors": motors}}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        features[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    return features


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
