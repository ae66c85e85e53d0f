"""A run's page and one of several runs in headless Chromium. Skipped where there is none; `make setup` sees to one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Visit, chromium
from made_up_runs import add_pictures_and_rollouts, write_run

from prismatic.atomic_files import write_atomically
from prismatic.training.runs.folder import RunFolder
from prismatic.training.telling.compare import write_comparison
from prismatic.training.telling.page import write_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    note = "a_note_without_a_single_space_in_it_" * 4
    found = [
        write_run(folder, name=name * 30, run_id_note=note, report_minutes=0.01).run_dir for name in ("one", "two")
    ]
    add_pictures_and_rollouts(found[0])
    return found


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_sticks_out(browser: Any, runs: list[Path], tmp_path: Path, width: int) -> None:
    for page in (write_page(runs[0]), write_comparison(runs, tmp_path)):
        for scheme in ("light", "dark"):
            visit = Visit(browser, page, color_scheme=scheme, viewport={"width": width, "height": 900})
            assert visit.page.evaluate("document.documentElement.scrollWidth") == width
            brightness = visit.screenshot(tmp_path / "page.png").mean()
            assert brightness > 180 if scheme == "light" else brightness < 90
            for picture in visit.page.locator("img").all():
                picture.scroll_into_view_if_needed()
                visit.page.wait_for_function(
                    "image => image.complete && image.naturalWidth > 0", arg=picture.element_handle(), timeout=20000
                )
            assert visit.complaints == [] and {url.partition(":")[0] for url in visit.requests} == {"file"}
            visit.page.close()


def test_a_page_of_a_run_that_goes_on_loads_the_next_one(browser: Any, runs: list[Path]) -> None:
    with RunFolder(runs[0]).held():
        page = write_page(runs[0])
        page.write_text(page.read_text().replace('data-every="10"', 'data-every="0.5"'))
        visit = Visit(browser, page)
        visit.page.wait_for_function("document.getElementById('live').textContent.includes(' ago, and anew every ')")
        fold = visit.page.locator("details").nth(1)
        fold.locator("summary").click()
        write_atomically(page, page.read_text().replace("Running since", "Still running since"))
        visit.page.wait_for_function("document.body.innerText.includes('Still running since')", timeout=20000)
        visit.page.wait_for_function("document.querySelectorAll('details')[1].open", timeout=20000)
    assert "Still" not in write_page(runs[0]).read_text()
    visit.page.wait_for_function("!document.getElementById('live')", timeout=20000)
    assert visit.complaints == []
    visit.page.close()


def test_a_page_that_is_not_written_any_more_says_so(browser: Any, runs: list[Path]) -> None:
    with RunFolder(runs[0]).held():
        page = write_page(runs[0])
    text = page.read_text()
    begin = text.index('data-written="') + len('data-written="')
    page.write_text(text[:begin] + "1000000000" + text[text.index('"', begin) :])
    visit = Visit(browser, page)
    assert "That is long ago: the run may have been killed." in visit.page.locator("#live.alert").inner_text()
    visit.page.close()
