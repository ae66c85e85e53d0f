from pathlib import Path
from urllib.parse import unquote

from prismatic.report.media import MediaFiles, relative_address


def test_files_are_embedded_while_they_fit(tmp_path: Path) -> None:
    videos = tmp_path / "run" / "videos"
    videos.mkdir(parents=True)
    sizes = {"a.mp4": 300, "b.mp4": 600, "c.mp4": 301}
    for name, size in sizes.items():
        (videos / name).write_bytes(b"x" * size)
    files = MediaFiles(tmp_path / "page", max_bytes=900)
    media = [files.add(videos / name, "video/mp4") for name in sizes]
    assert [item is not None and item.content is not None for item in media] == [True, False, True]
    assert (files.embedded, files.linked) == (2, 1)
    in_page = sum(len(item.source.partition(",")[2]) for item in media if item is not None and item.content)
    assert files.used_bytes == in_page <= 900
    assert media[1] is not None and media[1].source == "../run/videos/b.mp4"
    assert files.add(videos / "lacking.mp4", "video/mp4") is None and files.linked == 1


def test_addresses_lead_from_the_page_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "50 % (#1).mp4"
    address = relative_address(path, tmp_path / "page")
    assert not set(address) & set(" #()")
    assert (tmp_path / "page" / unquote(address)).resolve() == path.resolve()
