"""The last minute of moments: what is kept of events, how much of it, and for whom."""

import asyncio
import json
import time
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg

from prismatic.serving.page import live
from prismatic.serving.page.live import LiveFeed, encode_view, make_moment
from prismatic.serving.server.events import Answered, ConnectionChanged, Refused

VIEW = np.add.outer(np.arange(0, 120, 2), np.arange(60))[..., None].repeat(3, 2).astype(np.uint8)


def answered(number: int = 0, at: float = 1000.0, client: str = "websocket-1", **changes: object) -> Answered:
    parts: dict = {
        "request_id": f"r{number}",
        "time": at,
        "connection": client,
        "session": client,
        "query": number,
        "observation": {"full_image": VIEW, "wrist_image": VIEW[::-1], "state": np.zeros(8)},
        "instruction": "put the bowl on the plate",
        "actions": np.full((8, 7), number / 100),
        "kept": np.arange(98) % 7 < 3,
        "timing": {"total": 12.3456, "llm": 4.0},
    }
    return Answered(**{**parts, **changes})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The clock that paces go by, moved by hand."""
    now = [500.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    yield now


def tell(feed: LiveFeed, clock: list[float], count: int, rate_hz: float, client: str = "websocket-1") -> None:
    for number in range(count):
        clock[0] += 1 / rate_hz
        feed.tell(answered(number, at=clock[0], client=client))


def test_a_moment_says_what_was_kept_of_each_camera_in_bits_that_come_back() -> None:
    event = answered(3, warnings=("<b>far out</b>",))
    moment = make_moment(7, event)
    about = json.loads(moment.text)
    assert (about["number"], about["query"], about["client"]) == (7, 3, "websocket-1")
    assert about["cameras"] == ["full_image", "wrist_image"] and list(moment.pictures) == about["cameras"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(about["kept"]), np.uint8))[: about["tokens"]].astype(bool)
    np.testing.assert_array_equal(bits, event.kept)
    assert about["kept_of_camera"] == [int(event.kept[:49].sum()), int(event.kept[49:].sum())]
    assert about["actions"] == [[0.03] * 7] * 8 and about["timing"] == {"total": 12.346, "llm": 4.0}
    assert about["warnings"] == ["<b>far out</b>"]
    picture = simplejpeg.decode_jpeg(moment.pictures["full_image"])
    assert np.abs(picture.astype(int) - VIEW).mean() < 2


def test_a_policy_that_says_nothing_of_tokens_and_endless_text_are_taken() -> None:
    about = json.loads(make_moment(1, answered(kept=None, instruction="x" * 5000)).text)
    assert about["kept"] is None and about["kept_of_camera"] is None
    assert len(about["instruction"]) == 1000 and about["instruction"].endswith("…")


def test_large_pictures_are_made_smaller_in_proportion() -> None:
    height, width, _, _ = simplejpeg.decode_jpeg_header(encode_view(np.zeros((480, 640, 3), np.uint8)))
    assert (height, width) == (288, 384)


def test_a_minute_is_kept_and_found_by_number(clock: list[float]) -> None:
    feed = LiveFeed()
    tell(feed, clock, 700, rate_hz=9.0)
    kept = feed.moments("websocket-1")
    assert kept[-1].time - kept[0].time == pytest.approx(60, abs=0.2)
    assert [moment.number for moment in kept] == list(range(kept[0].number, 701))
    assert feed.find(650).number == 650 and feed.find(kept[0].number) is kept[0]
    assert feed.find(kept[0].number - 1) is None and feed.find(701) is None and LiveFeed().find(1) is None


def test_what_comes_faster_is_counted_and_not_kept(clock: list[float]) -> None:
    feed = LiveFeed()
    tell(feed, clock, 400, rate_hz=100.0)
    status = feed.status()
    assert 40 <= len(feed.moments("websocket-1")) <= 40 + 4  # four seconds at ten a second
    assert status["answered"] == 400 and status["not_shown"] == 400 - len(feed.moments("websocket-1"))
    crowd = LiveFeed()
    for _ in range(40):
        clock[0] += 0.1
        for client in range(20):
            crowd.tell(answered(at=clock[0], client=f"websocket-{client}"))
    assert sum(len(crowd.moments(f"websocket-{client}")) for client in range(20)) <= 4 * live.TOTAL_RATE_HZ + 4


def test_exact_pictures_are_kept_within_a_number_of_bytes(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EXACT_BYTES", 10 * 2 * VIEW.nbytes)
    feed = LiveFeed()
    tell(feed, clock, 30, rate_hz=5.0)
    has_event = [moment.event is not None for moment in feed.moments("websocket-1")]
    assert has_event == [False] * 20 + [True] * 10
    tell(feed, clock, 1, rate_hz=1 / 100)  # all others are older than a minute now
    assert len(feed.moments("websocket-1")) == 1 and feed.moments("websocket-1")[0].event is not None


def test_clients_are_listed_while_they_are_there_or_were_lately() -> None:
    feed, now = LiveFeed(), time.time()
    feed.tell(ConnectionChanged("websocket-1", "10.0.0.1:5", True, now - 500))
    feed.tell(ConnectionChanged("websocket-2", "10.0.0.2:5", True, now - 500))
    feed.tell(ConnectionChanged("websocket-2", "10.0.0.2:5", False, now - 400))
    feed.tell(answered(at=now - 300, client="http 10.0.0.3"))
    feed.tell(answered(at=now, client="http 10.0.0.4"))
    feed.tell(Refused("r9", now, "websocket-1", "a sentence", "bad_request"))
    status = feed.status()
    assert [client["name"] for client in status["clients"]] == ["http 10.0.0.4", "websocket-1"]
    assert status["refused"] == 1 and status["refusals"][0]["reason"] == "a sentence"
    for number in range(live._MAX_LISTED + 10):
        feed.tell(Refused(f"r{number}", now, "websocket-1", "a sentence", "bad_request"))
    assert len(feed.status()["refusals"]) == live._MAX_LISTED


def test_a_page_follows_one_client_until_it_is_silent(clock: list[float]) -> None:
    async def follow() -> tuple[list[str], list[str], bool]:
        feed = LiveFeed()
        feed.tell(answered(at=clock[0], client="a"))
        anyone, history = feed.subscribe(None)
        only_b, _ = feed.subscribe("b")
        assert [moment.client for moment in history] == ["a"] and feed.num_pages == 2
        for client in ("a", "b", "a", "b"):
            clock[0] += 1
            feed.tell(answered(at=clock[0], client=client))
        clock[0] += 3.5
        feed.tell(answered(at=clock[0], client="b"))
        seen = [[moment.client for moment in await page.take(1.0)] for page in (anyone, only_b)]
        assert await anyone.take(0.01) == []
        feed.close()
        await anyone.take(1.0)
        feed.unsubscribe(only_b)
        return seen[0], seen[1], anyone.ended and feed.num_pages == 1

    assert asyncio.run(follow()) == (["a", "a", "b"], ["b", "b", "b"], True)


def test_a_slow_page_misses_the_oldest_moments(clock: list[float]) -> None:
    async def follow() -> list[int]:
        feed = LiveFeed()
        page, _ = feed.subscribe(None)
        tell(feed, clock, 50, rate_hz=5.0)
        return [moment.number for moment in await page.take(1.0)]

    assert asyncio.run(follow()) == list(range(31, 51))
