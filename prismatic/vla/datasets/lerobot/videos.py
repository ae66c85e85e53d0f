"""Single frames of videos, at random: seek to the key frame before, decode from there on."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.vla.datasets.lerobot.libraries import import_av
from prismatic.vla.datasets.stored.episode import UnreadableImage

TOLERANCE_S = 1e-4
"""A frame that lies further from its row's timestamp is another one; LeRobot's own tolerance."""
MAX_OPEN = 8
"""Videos that a process keeps open; each holds a decoder and its reference frames."""
_LOOKED_AT = 240  # packets that tell how far key frames lie apart
_FORWARD_S = 0.5  # a frame that follows so soon on the last one is reached without a seek


class VideoFiles:
    """The videos of a dataset, opened on first use in each process; pickles as the list of paths."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._open: dict[int, OrderedDict[int, _Decoder]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"paths": self.paths, "_open": {}}

    def frame(self, number: int, time: float) -> np.ndarray:
        """(H, W, 3) uint8 of a video at a time in seconds.

        Raises UnreadableImage where it does not decode, or has no frame within `TOLERANCE_S`; names file and time.
        """
        # A forked worker leaves its parent's decoders alone.
        mine = self._open.setdefault(os.getpid(), OrderedDict())
        try:
            if number not in mine:
                if len(mine) >= MAX_OPEN:
                    mine.popitem(last=False)[1].close()
                mine[number] = _Decoder(self.paths[number])
            mine.move_to_end(number)
            return mine[number].frame(time)
        except (ValueError, OSError) as error:  # PyAV's own errors are both
            if number in mine:
                mine.pop(number).close()
            raise UnreadableImage(f"video {self.paths[number]} at {time:.4f} s: {error}") from error


class _Decoder:
    """One open video, and how far it is decoded."""

    def __init__(self, path: Path):
        self._container = import_av().open(str(path))
        self._stream = _video_stream(self._container)
        self._stream.codec_context.thread_count = 1  # workers share the cores already
        # What is damaged is an error, where the decoder would else fill it with what lies about it and say nothing.
        self._stream.codec_context.options = {"err_detect": "explode"}
        self._frames: Iterator[Any] = iter(())
        self._last: Any = None

    def close(self) -> None:
        self._frames = iter(())
        self._container.close()

    def frame(self, time: float) -> np.ndarray:
        """Raises ValueError where no frame lies at that time."""
        tick = float(self._stream.time_base)
        if self._last is None or not 0 <= time - self._last.time + TOLERANCE_S <= _FORWARD_S:
            self._seek(time)
        frame = self._forward(time)
        if frame is not None and frame.time - time > TOLERANCE_S + tick / 2:  # a seek that went too far
            self._seek(0.0)
            frame = self._forward(time)
        if frame is None or abs(frame.time - time) > TOLERANCE_S + tick / 2:
            nearest = "the end of the video" if frame is None else f"{frame.time:.4f} s"
            raise ValueError(f"no frame lies there within {TOLERANCE_S} s; what follows is {nearest}")
        picture: np.ndarray = frame.to_ndarray(format="rgb24")
        return picture

    def _seek(self, time: float) -> None:
        self._last = None
        self._container.seek(round(time / float(self._stream.time_base)), stream=self._stream, backward=True)
        self._frames = self._decoded()

    def _decoded(self) -> Iterator[Any]:
        """All frames from here on. Raises ValueError at one that is damaged: those behind it may be made of it."""
        first = None
        for packet in self._container.demux(self._stream):
            if packet.pts is not None:
                first = packet.pts if first is None else first
                if packet.pts < first:  # shown before its key frame, so made of frames that a seek left out
                    continue
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError(f"the frame at {frame.time:.4f} s is damaged")
                yield frame

    def _forward(self, time: float) -> Any:
        """The first frame that is not before that time; None behind the last one."""
        if self._last is not None and self._last.time >= time - TOLERANCE_S:
            return self._last
        for frame in self._frames:
            self._last = frame
            if frame.time >= time - TOLERANCE_S - float(self._stream.time_base) / 2:
                return frame
        self._last = None
        return None


@dataclass(frozen=True)
class VideoHeading:
    """What a video's heading says.

    Attributes:
        frames: how many there are.
        fps: frames per second; 0 where it does not say.
    """

    frames: int
    fps: float

    @classmethod
    def read(cls, path: Path) -> "VideoHeading":
        """Nothing is decoded. Raises ValueError for a file that is no video, FileNotFoundError where it lacks."""
        with _opened(path) as (container, stream):
            count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            return cls(count, float(stream.average_rate or 0))


def key_frame_spacing(path: Path) -> float:
    """Frames between key frames at a video's beginning; so many are decoded for one at random, half on average.

    Errors as of `VideoHeading.read`.
    """
    with _opened(path) as (container, stream):
        packets = [packet.is_keyframe for packet in islice(container.demux(stream), _LOOKED_AT) if packet.size]
    return len(packets) / max(sum(packets), 1)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video and its stream of pictures."""
    if not path.is_file():
        raise FileNotFoundError(f"the video {path} is missing: the copy is incomplete. Download it again")
    try:
        with import_av().open(str(path)) as container:
            yield container, _video_stream(container)
    except (ValueError, OSError) as error:
        raise ValueError(f"the video {path} cannot be opened: {error}. Download or encode it again") from error


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it holds no pictures")
    return container.streams.video[0]
