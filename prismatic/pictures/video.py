"""MP4 files of frames."""

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prismatic.atomic_files import replacing
from prismatic.pictures.images import Picture


def write_mp4(path: str | Path, frames: Iterable[Picture], fps: float) -> Path:
    """H.264 in MP4, playable in any browser. Frames are uint8 (H, W, 3), all of one even-sided shape.

    They may come from a generator; no more than one at a time is held. After an error there is no new file.

    Raises:
        ValueError: without frames, or when their shapes differ or have odd sides.
        ImportError: when imageio-ffmpeg is missing.
        RuntimeError: when ffmpeg fails, with its words.
    """
    waiting = iter(frames)
    first = next(waiting, None)
    if first is None or any(side % 2 for side in first.shape[:2]):
        found = "none" if first is None else first.shape
        raise ValueError(f"a video needs frames of one shape with even sides, got {found}")
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError("writing videos needs imageio-ffmpeg: pip install 'imageio[ffmpeg]'") from error
    height, width = first.shape[:2]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "25", "-preset", "veryfast", "-movflags", "+faststart"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *source, *target, "-f", "mp4"]
    with replacing(path) as partial, tempfile.TemporaryFile() as words:
        with subprocess.Popen([*command, str(partial)], stdin=subprocess.PIPE, stderr=words) as ffmpeg:
            try:
                _feed(ffmpeg, itertools.chain([first], waiting), first.shape)
            except BaseException:
                ffmpeg.kill()
                ffmpeg.wait()
                raise
        if ffmpeg.returncode:
            words.seek(0)
            raise RuntimeError(f"ffmpeg could not write {path}: {words.read().decode(errors='replace').strip()}")
    return Path(path)


def _feed(ffmpeg: subprocess.Popen[bytes], frames: Iterable[Picture], shape: tuple[int, ...]) -> None:
    """Hand all frames over. Raises ValueError at the first one of another shape."""
    assert ffmpeg.stdin is not None
    with contextlib.suppress(BrokenPipeError), ffmpeg.stdin as stream:  # where ffmpeg gives up it says why
        for frame in frames:
            if frame.shape != shape:
                raise ValueError(f"a video needs frames of one shape with even sides, got {shape} and {frame.shape}")
            stream.write(frame.tobytes())
