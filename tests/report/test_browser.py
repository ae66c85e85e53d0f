"""The page in a real browser: headless Chromium over file://. Skipped where there is none; `make setup` sees to one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium
from report_page import full_report

from prismatic.report.html import write_report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, video: Path) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "videos").mkdir()
    (folder / "videos" / "beside.mp4").write_bytes(video.read_bytes())
    return write_report(full_report(video), folder / "report.html")


def test_a_click_on_a_head_sorts_the_rows(browser: Any, written: Path) -> None:
    visit = Visit(browser, written)
    table = visit.page.locator("table.sortable")

    def rows() -> list[str]:
        return [row.split("\n")[0].strip() for row in table.locator("tbody tr th").all_inner_texts()]

    def click(head: str) -> str | None:
        table.get_by_role("button", name=head).click()
        return table.get_by_role("columnheader", name=head).get_attribute("aria-sort")

    assert rows() == ["red", "blue", "green"]
    assert click("steps") == "ascending" and rows() == ["blue", "red", "green"]  # 9, 10, 100: as numbers
    assert click("steps") == "descending" and rows() == ["green", "red", "blue"]
    assert click("solved") == "ascending" and rows() == ["green", "blue", "red"]  # -, 0 %, 75 %: by the rate
    assert table.get_by_role("columnheader", name="steps").get_attribute("aria-sort") is None
    assert click("colour") == "ascending" and rows() == ["blue", "green", "red"]
    assert table.locator("tfoot tr").count() == 1
    table.get_by_role("button", name="steps").press("Enter")
    assert rows() == ["blue", "red", "green"]
    visit.page.close()


def test_clips_play_and_nothing_is_fetched(browser: Any, written: Path) -> None:
    visit = Visit(browser, written)
    for clip in visit.page.locator("video").all():
        clip.scroll_into_view_if_needed()
        clip.evaluate("video => video.play()")  # rejects where the browser cannot play it
        handle = clip.element_handle()
        visit.page.wait_for_function(
            "video => video.currentTime > 0.2 && video.videoWidth === 96", arg=handle, timeout=20000
        )
    for picture in visit.page.locator("img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth") == 8
    assert visit.complaints == []
    assert {url.partition(":")[0] for url in visit.requests} <= {"file", "data"}
    assert any(url.endswith("report.html") for url in visit.requests)
    visit.page.close()


@pytest.mark.parametrize("width", [1200, 380])
def test_it_reads_in_light_and_dark_wide_and_narrow(browser: Any, written: Path, tmp_path: Path, width: int) -> None:
    brightness = {}
    for scheme in ("light", "dark"):
        visit = Visit(browser, written, color_scheme=scheme, viewport={"width": width, "height": 900})
        picture = visit.screenshot(tmp_path / f"{scheme}.png")
        brightness[scheme] = picture.mean()
        assert picture.std() > 5  # not blank
        assert visit.page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        ink = visit.page.locator("svg text").first.evaluate("text => getComputedStyle(text).fill")
        assert ink == visit.page.locator("body").evaluate("body => getComputedStyle(body).color")
        visit.page.close()
    assert brightness["light"] > 200 and brightness["dark"] < 80
