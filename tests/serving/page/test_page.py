"""The page in headless Chromium, over the real server of a real small policy."""

import base64
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Visit, chromium
from PIL import Image
from served_policy import served

from prismatic.pictures.overlay import dim_pruned, kept_grids, outline_kept
from prismatic.policy import Policy
from prismatic.serving.client import PolicyClient
from prismatic.serving.page.live import LiveFeed
from prismatic.serving.page.routes import page_router
from prismatic.serving.server.events import Answered
from prismatic.vla.robots import LIBERO

HOSTILE = "<img src=x onerror=document.title='stolen'> put the <b>bowl</b> on the plate"
SIDE = 128


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def policy(small_policy_directory: Path) -> Policy:
    return Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager")


def observation(number: int) -> dict[str, Any]:
    """Two smooth pictures, other ones for each number."""
    ramp = np.linspace(60, 220, SIDE)
    red, green = np.roll(ramp, 9 * number)[:, None], ramp[None]
    view = np.stack(np.broadcast_arrays(red, green, 255 - (red + green) / 2), axis=2).astype(np.uint8)
    return {"full_image": view, "wrist_image": view[::-1].copy(), "state": np.full(8, number / 50)}


class Robot:
    """Asks a server again and again until it is stopped; remembers what it was answered."""

    def __init__(self, url: str, session: str, instruction: str) -> None:
        self.replies: list[dict[str, Any]] = []
        self._about = {"prompt": instruction, "session": session, "seed": 0}
        self._client, self._stopped = PolicyClient(url), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(0.12):
            number = len(self.replies)
            request = {**observation(number), **self._about, "query": number}
            self.replies.append(self._client.infer(request).content)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._client.close()


@contextmanager
def asking(url: str, session: str = "kitchen", instruction: str = "put the bowl on the plate") -> Iterator[Robot]:
    robot = Robot(url, session, instruction)
    try:
        yield robot
    finally:
        robot.stop()


def as_file(event: Answered) -> bytes:
    """Stands for the maker of records, which the command brings."""
    file = io.BytesIO()
    np.savez(file, actions=event.actions, **event.observation)
    return file.getvalue()


@contextmanager
def watched(policy: Policy, **flags: Any) -> Iterator[tuple[Any, LiveFeed]]:
    feed = LiveFeed()
    with served(policy, [feed], [page_router(feed, as_file)], **flags) as server:
        yield server, feed


def shown_query(visit: Visit) -> int:
    """The number of the policy query that the page shows."""
    return int(visit.page.inner_text("#which").split()[2])


def wait_for(visit: Visit, holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
    """Playwright's own way evaluates text as code, which the page forbids."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, visit.page.inner_text("main")
        visit.page.wait_for_timeout(30)


def is_drawn(visit: Visit, query: int) -> bool:
    """Whether the pictures are those of a query; moments count from 1."""
    shown = visit.page.locator("#cameras").get_attribute("data-shown") or ""
    return shown.startswith(f"{query + 1} ")


def drawn(visit: Visit, camera: str) -> np.ndarray:
    """What the page's canvas shows of a camera, at the picture's own size."""
    address = visit.page.locator(f"figure[data-camera={camera}] canvas").evaluate("canvas => canvas.toDataURL()")
    with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)


def test_it_follows_a_robot_freezes_steps_back_and_gives_the_moment(browser: Any, policy: Policy) -> None:
    with watched(policy) as (server, feed), asking(server.url, instruction=HOSTILE) as robot:
        visit = Visit(browser, server.http_url, viewport={"width": 390, "height": 844})
        page = visit.page
        wait_for(visit, lambda: page.inner_text("#state") == "live")
        first = shown_query(visit)
        wait_for(visit, lambda: shown_query(visit) > first + 2)
        assert page.inner_text("#instruction") == HOSTILE and page.title() == "LightVLA policy server"
        assert page.locator("#instruction b, #instruction img").count() == 0
        assert "8 actions, 8 executed by default" in page.inner_text("#facts")

        page.keyboard.press(" ")
        wait_for(visit, lambda: page.inner_text("#state").startswith("frozen"))
        frozen = shown_query(visit)
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        answered, now = len(robot.replies), frozen - 3
        wait_for(visit, lambda: is_drawn(visit, now))
        time.sleep(0.5)
        assert shown_query(visit) == now and len(robot.replies) > answered  # the robot goes on, the page does not

        kept, seen = np.asarray(robot.replies[now]["kept"]), observation(now)
        counts = [int(grid.sum()) for grid in kept_grids(kept, 2)]
        assert page.inner_text("#kept") == (
            f"{kept.sum()} of {kept.size} visual tokens kept: full_image {counts[0]}, wrist_image {counts[1]}"
        )
        for camera, grid in zip(("full_image", "wrist_image"), kept_grids(kept, 2), strict=True):
            expected = outline_kept(dim_pruned(seen[camera], grid, center_crop=True), grid, center_crop=True)
            assert np.abs(drawn(visit, camera) - expected).mean() < 6  # one wrong patch in 16 adds 5
            assert np.abs(drawn(visit, camera) - seen[camera]).mean() > 20 or grid.mean() > 0.8

        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        with np.load(download.value.path()) as record:
            np.testing.assert_array_equal(record["full_image"], seen["full_image"])
            np.testing.assert_array_equal(record["actions"], robot.replies[now]["actions"])

        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert f"{LIBERO.chunk_length} actions, {LIBERO.open_loop_steps} executed" in page.inner_text("#facts")
        page.get_by_role("button", name="Go live").click()
        wait_for(visit, lambda: shown_query(visit) > frozen)
        assert visit.complaints == []
        assert {url.split("/")[2] for url in visit.requests if not url.startswith(("data:", "blob:"))} == {
            server.http_url.split("/")[2]
        }

        robot.stop()
        wait_for(visit, lambda: re.search(r"gone, \d+ s$", page.inner_text("#clients")) is not None)
        assert page.locator("#clients td").nth(1).get_attribute("title").startswith("127.0.0.1:")
        page.close()
