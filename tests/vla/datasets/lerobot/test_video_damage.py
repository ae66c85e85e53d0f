"""A video that is damaged, cut or no video is said by its name, and its pictures are right or refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fixtures_lerobot import LOSSY, write_lerobot

from prismatic.vla.datasets.catalog import LAYOUTS
from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.stored.episode import UnreadableImage
from prismatic.vla.gripper import GRIPPERS

SPEC = replace(LAYOUTS["libero"], name="arm", map_actions=GRIPPERS["libero"])
VIDEO = Path("videos/observation.images.image/chunk-000/file-000.mp4")


def pictures(root: Path) -> dict[tuple[int, int], np.ndarray | None]:
    """Episode and step -> picture; None where it is refused."""
    found: dict[tuple[int, int], np.ndarray | None] = {}
    for number, episode in enumerate(open_dataset(root, "arm", SPEC).episodes):
        for step in range(episode.num_frames):
            try:
                found[number, step] = episode.image("full_image", step)
            except UnreadableImage as error:
                assert "file-000.mp4 at" in str(error)
                found[number, step] = None
    return found


def test_a_damaged_video_shows_no_wrong_picture(tmp_path: Path, tiny_index: RldsIndex) -> None:
    path = write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", LOSSY) / VIDEO
    whole, data = pictures(tmp_path), path.read_bytes()
    begin = data.index(b"mdat")
    end = data.index(b"moov")
    for place in np.linspace(begin + 1000, end - 500, 6).astype(int).tolist():
        path.write_bytes(data[:place] + bytes(400) + data[place + 400 :])
        damaged = pictures(tmp_path)
        assert any(picture is None for picture in damaged.values())
        for key, picture in damaged.items():
            assert picture is None or (picture == whole[key]).all(), (place, key)


def test_key_frames_that_others_are_shown_before(tmp_path: Path, tiny_index: RldsIndex) -> None:
    """Of such a video a seek finds frames that cannot be decoded, and nothing is damaged."""
    codec = (*LOSSY[:2], {"crf": "18", "g": "6", "bf": "2", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"})
    write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", codec)
    episodes = open_dataset(tmp_path, "arm", SPEC).episodes
    front = [[episode.image("full_image", step) for step in range(episode.num_frames)] for episode in episodes]
    for number, step in [(2, 13), (0, 7), (1, 2), (2, 0), (1, 12), (0, 6), (2, 9), (1, 7), (0, 1)]:
        np.testing.assert_array_equal(episodes[number].image("full_image", step), front[number][step])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aaa\nsize 1\n")


def _sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", 44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_cut, "image/chunk-000/file-000.mp4 cannot be opened"),
        (lambda path: path.unlink(), "image/chunk-000/file-000.mp4 is missing"),
        (lambda path: path.write_bytes(b""), "image/chunk-000/file-000.mp4 cannot be opened"),
        (_pointer, "image/chunk-000/file-000.mp4 cannot be opened"),
        (_sound, "image/chunk-000/file-000.mp4 cannot be opened: it holds no pictures"),
    ],
)
def test_the_first_video_is_named_as_any_other(
    tmp_path: Path, tiny_index: RldsIndex, damage: Callable[[Path], None], told: str
) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", LOSSY)
    damage(folder / VIDEO)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^the video .*{told}"):
        open_dataset(tmp_path, "arm", SPEC)
