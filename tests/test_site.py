"""The documentation as a site: it builds without a warning, loads nothing from elsewhere, and fits a phone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("index", "tutorials/pruning", "tutorials/compare", "guides/suites", "provenance", "reference/pruner")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def test_every_page_is_built(site: Path) -> None:
    sources = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {path for path in sources if not (site / path).is_file()} == set() and len(sources) > 20
    assert "<math" in (site / "tutorials" / "pruning.html").read_text()
    assert "score_tokens" in (site / "reference" / "pruner.html").read_text()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_nobody_and_fits(browser: Any, site: Path, name: str, width: int, scheme: str) -> None:
    viewport = {"width": width, "height": 900}
    visit = Visit(browser, site / f"{name}.html", viewport=viewport, color_scheme=scheme)
    visit.page.wait_for_load_state("networkidle")
    elsewhere = [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert not elsewhere and not visit.complaints
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.page.close()
