"""Headless Chromium over file://, for the tests of pages. Skipped where there is none; `make setup` sees to one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.setup_environment import BROWSER_PACKAGES, BROWSERS, find_browser

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser; skips the test where it cannot be had."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    path = find_browser()
    if path is None:
        packages = " ".join(BROWSER_PACKAGES)
        pytest.skip(f"no browser ({', '.join(BROWSERS)}): sudo apt-get install -y {packages}")
    with playwright.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        except playwright.Error as error:
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield started
        started.close()


class Visit:
    """A file or an address, open in a window of its own, with everything that it asked for and complained about."""

    def __init__(self, browser: Any, place: Path | str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(place if isinstance(place, str) else place.resolve().as_uri())

    def screenshot(self, path: Path) -> np.ndarray:
        self.page.screenshot(path=path)
        with Image.open(path) as image:
            return np.asarray(image.convert("L"), np.float64)
