"""Which files go into a page and which are linked, under one limit for the whole page."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from prismatic.report.data import Media

SUFFIXES = {"video/mp4": ".mp4", "image/png": ".png", "image/webp": ".webp"}
"""Kind of media -> how the names of its files end."""


@dataclass
class MediaFiles:
    """Embeds files while they fit, first come first served, and links the others.

    Args:
        folder: Where the report's file will be; links are relative to it.
        max_bytes: Room for embedded content, counted as it stands in the page (base64: 4/3 of the file).
        embedded: How many files went in.
        linked: How many did not fit.
        linked_bytes: Room that these would take.
        used_bytes: Room taken so far.
    """

    folder: Path
    max_bytes: int
    embedded: int = 0
    linked: int = 0
    linked_bytes: int = 0
    used_bytes: int = 0

    def add(self, folder: Path, name: str, mime: str) -> Media | None:
        """The file as the page shows it; None where `find_media` finds none."""
        path = find_media(folder, name, mime)
        if path is None:
            return None
        address = relative_address(path, self.folder)
        size = 4 * -(-path.stat().st_size // 3)
        if self.used_bytes + size > self.max_bytes:
            self.linked += 1
            self.linked_bytes += size
            return Media(mime, address=address)
        self.used_bytes += size
        self.embedded += 1
        return Media(mime, path.read_bytes(), address)


def find_media(folder: Path, name: str, mime: str) -> Path | None:
    """A file inside a folder, by the name that results give it.

    None when there is none, or when the name leads out of the folder (links are followed) or to another kind of file:
    results may come from somebody else, and a page that is passed on must hold nothing but clips and pictures.
    """
    try:
        path = (folder / name).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have; links in a circle
        return None
    fits = path.is_relative_to(folder.resolve()) and path.suffix.lower() == SUFFIXES[mime]
    return path if there and fits else None


def relative_address(path: Path, folder: Path) -> str:
    """Percent-encoded address of a file for a page in `folder`."""
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
