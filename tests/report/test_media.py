from pathlib import Path
from urllib.parse import unquote

from prismatic.report.media import MediaFiles, find_media, relative_address


def test_files_are_embedded_while_they_fit(tmp_path: Path) -> None:
    videos = tmp_path / "run" / "videos"
    videos.mkdir(parents=True)
    sizes = {"a.mp4": 300, "b.mp4": 600, "c.mp4": 301}
    for name, size in sizes.items():
        (videos / name).write_bytes(b"x" * size)
    files = MediaFiles(tmp_path / "page", max_bytes=900)
    media = [files.add(tmp_path / "run", f"videos/{name}", "video/mp4") for name in sizes]
    assert [item is not None and item.content is not None for item in media] == [True, False, True]
    assert (files.embedded, files.linked) == (2, 1)
    in_page = sum(len(item.source.partition(",")[2]) for item in media if item is not None and item.content)
    assert files.used_bytes == in_page <= 900
    assert media[1] is not None and media[1].source == "../run/videos/b.mp4"
    assert files.add(videos, "lacking.mp4", "video/mp4") is None and files.linked == 1


def test_only_media_inside_the_folder_are_found(tmp_path: Path) -> None:
    folder, secret = tmp_path / "run", tmp_path / "secret.mp4"
    (folder / "videos").mkdir(parents=True)
    for path in (secret, folder / "id_rsa", folder / "videos" / "a.mp4", folder / "videos" / "a.png"):
        path.write_bytes(b"x")
    (folder / "link.mp4").symlink_to(secret)
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    (tmp_path / "same").symlink_to(folder)
    inside = (folder / "videos" / "a.mp4").resolve()
    for name in ("videos/a.mp4", "videos/../videos/a.mp4", str(folder / "videos" / "a.mp4")):
        assert find_media(folder, name, "video/mp4") == find_media(tmp_path / "same", name, "video/mp4") == inside
    assert find_media(folder, "videos/a.png", "image/png") == inside.with_suffix(".png")
    for name in (
        str(secret),
        "../secret.mp4",
        "link.mp4",
        "circle.mp4",
        "id_rsa",
        "videos/a.png",
        "videos",
        ".",
        "a\0b",
    ):
        assert find_media(folder, name, "video/mp4") is None
    assert find_media(folder, "x" * 5000 + ".mp4", "video/mp4") is None
    files = MediaFiles(tmp_path, max_bytes=900)
    assert files.add(folder, "../secret.mp4", "video/mp4") is None and files.used_bytes == files.linked == 0


def test_addresses_lead_from_the_page_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "50 % (#1).mp4"
    address = relative_address(path, tmp_path / "page")
    assert not set(address) & set(" #()")
    assert (tmp_path / "page" / unquote(address)).resolve() == path.resolve()
