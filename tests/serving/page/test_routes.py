"""What the page asks a server for, without a browser."""

import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import simplejpeg
from served_policy import served

from lightvla.commands.deploy import watching
from prismatic.policy import Policy
from prismatic.recordings.recording import Recording
from prismatic.serving.client import PolicyClient
from prismatic.serving.page import live, routes
from prismatic.serving.page.live import LiveFeed
from prismatic.serving.page.routes import FILES, MAX_PAGES, page_router
from prismatic.serving.server.events import Answered
from prismatic.serving.server.served import ServedPolicy
from prismatic.serving.settings import ServerConfig

KEY = "a key that is long enough"


def as_file(event: Answered) -> bytes:
    file = io.BytesIO()
    np.savez(file, actions=event.actions, **event.observation)
    return file.getvalue()


@pytest.fixture(scope="module")
def policy(small_policy_directory: Path) -> Policy:
    return Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager")


@pytest.fixture(scope="module")
def feed() -> LiveFeed:
    return LiveFeed()


@pytest.fixture(scope="module")
def server(policy: Policy, feed: LiveFeed) -> Iterator[Any]:
    with served(policy, [feed], [page_router(feed, as_file, ["/more.js"])]) as server:
        yield server


def ask(url: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    """One request over a connection of its own; its reply."""
    view = np.random.default_rng(number).integers(256, size=(64, 64, 3), dtype=np.uint8)
    request = {"full_image": view, "wrist_image": view, "state": np.zeros(8), "prompt": "turn on the stove", "seed": 0}
    client = PolicyClient(url)
    try:
        return client.infer({**request, **changes}).content
    finally:
        client.close()


def wait_for_moment(feed: LiveFeed, request_id: str) -> dict[str, Any]:
    """Of a request; watchers are told behind the answer."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for moment in list(feed._moments):
            if (about := json.loads(moment.text))["request"] == request_id:
                return about
        time.sleep(0.01)
    raise AssertionError(f"no moment of {request_id}")


def events(answer: requests.Response) -> Iterator[tuple[str, Any]]:
    """Of a stream of server-sent events: name and data."""
    name = ""
    for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_the_page_and_its_files_load_nothing_from_elsewhere(server: Any) -> None:
    page = requests.get(server.http_url, timeout=10)
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert '<script type="module" src="/more.js"></script>' in page.text
    for name, kind in FILES.items():
        file = requests.get(f"{server.http_url}/page/{name}", timeout=10)
        assert file.headers["Content-Type"].startswith(kind)
        assert "http" not in file.text and ".innerHTML" not in file.text and "eval(" not in file.text
    for path in ("/page/live.py", "/page/..%2Flive.py", "/page/%2e%2e/live.py"):
        assert requests.get(server.http_url + path, timeout=10).status_code == 404


def test_a_moment_is_given_as_it_was_and_as_a_record(server: Any, feed: LiveFeed) -> None:
    reply = ask(server.url, 3, session="kitchen", query=5)
    about = wait_for_moment(feed, reply["request_id"])
    assert (about["session"], about["query"], about["instruction"]) == ("kitchen", 5, "turn on the stove")
    np.testing.assert_allclose(about["actions"], reply["actions"], atol=1e-5)
    assert sum(about["kept_of_camera"]) == reply["kept"].sum()
    address = f"{server.http_url}/moments/{about['number']}"
    assert requests.get(address, timeout=10).json() == about
    assert about in requests.get(f"{server.http_url}/moments", {"client": about["client"]}, timeout=10).json()
    view = requests.get(f"{address}/views/wrist_image", timeout=10)
    assert view.headers["Content-Type"] == "image/jpeg" and simplejpeg.decode_jpeg(view.content).shape == (64, 64, 3)
    record = requests.get(f"{address}/record", timeout=10)
    assert record.headers["Content-Disposition"] == f'attachment; filename="moment_{about["number"]}.npz"'
    with np.load(io.BytesIO(record.content)) as content:
        np.testing.assert_array_equal(content["actions"], reply["actions"])


def test_what_is_not_there_is_said(server: Any, feed: LiveFeed, monkeypatch: pytest.MonkeyPatch) -> None:
    number = wait_for_moment(feed, ask(server.url)["request_id"])["number"]
    for path, status, word in (
        ("/moments/999999", 404, "the last 60 s"),
        ("/moments/minus/record", 422, "number"),
        (f"/moments/{number}/views/left_eye", 404, "full_image"),
    ):
        answer = requests.get(server.http_url + path, timeout=10)
        assert answer.status_code == status and word in answer.json()["error"]
    monkeypatch.setattr(feed.find(number), "event", None)
    gone = requests.get(f"{server.http_url}/moments/{number}/record", timeout=10)
    assert gone.status_code == 410 and "as they came" in gone.json()["error"]


def test_the_feed_tells_history_facts_status_and_then_moments_of_the_chosen_client(
    server: Any, feed: LiveFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "_STATUS_S", 0.1)
    monkeypatch.setattr(live, "_SILENT_S", 0.3)
    before = wait_for_moment(feed, ask(server.url)["request_id"])
    with requests.get(f"{server.http_url}/feed", {"client": before["client"]}, stream=True, timeout=10) as answer:
        told = events(answer)
        name, history = next(told)
        assert name == "history" and history == {"client": before["client"], "moments": [before]}
        name, facts = next(told)
        assert name == "facts" and facts["info"]["num_visual_tokens"] == 32 and facts["has_records"] is True
        name, status = next(told)
        assert name == "status" and before["client"] in [client["name"] for client in status["clients"]]
        ask(server.url, instruction="of another client")  # whose moments do not come
        assert [next(told)[0] for _ in range(2)] == ["status"] * 2
    with requests.get(f"{server.http_url}/feed", stream=True, timeout=10) as answer:
        told = events(answer)
        assert [next(told)[0] for _ in range(3)] == ["history", "facts", "status"]
        time.sleep(0.4)  # whoever asks next is followed after a silence
        reply = ask(server.url, 9)
        name, what = next((name, what) for name, what in told if name in ("history", "moment"))
        assert name == "history" and what["moments"][-1]["request"] == reply["request_id"]
        name, what = next(told)
        assert name == "moment" and what["moment"]["request"] == reply["request_id"]
        assert sorted(what["pictures"]) == ["full_image", "wrist_image"]


def test_a_key_guards_the_page_and_its_feed_and_a_cookie_opens_both(policy: Policy) -> None:
    feed = LiveFeed()
    with served(policy, [feed], [page_router(feed)], api_key=KEY) as server:
        for path in ("/", "/feed", "/page/page.js", "/moments", "/moments/1/record"):
            assert requests.get(server.http_url + path, timeout=10, stream=True).status_code == 401
        browser = requests.Session()
        assert browser.get(f"{server.http_url}/", params={"key": KEY}, timeout=10).status_code == 200
        with browser.get(f"{server.http_url}/feed", stream=True, timeout=10) as answer:
            assert next(events(answer))[0] == "history"


def test_so_many_pages_may_follow_and_open_ones_do_not_keep_the_server(policy: Policy) -> None:
    feed = LiveFeed()
    with served(policy, [feed], [page_router(feed)]) as server:
        address = f"{server.http_url}/feed"
        pages = [requests.get(address, stream=True, timeout=10) for _ in range(MAX_PAGES)]
        assert requests.get(address, timeout=10).status_code == 429
        pages.pop().close()
        until = time.monotonic() + 10
        while (another := requests.get(address, stream=True, timeout=10)).status_code == 429:
            assert time.monotonic() < until
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(4)  # uvicorn would end them after five seconds
        assert not stopping.is_alive() and feed.num_pages == 0
        for page in (*pages, another):
            page.close()


def test_the_flag_decides_whether_there_is_a_page_which_gives_records_that_can_be_read(
    policy: Policy, tmp_path: Path
) -> None:
    config = ServerConfig(port=0)
    watchers, routers = watching(config, ServedPolicy(policy, config))
    (feed,) = watchers
    assert isinstance(feed, LiveFeed)
    with served(policy, watchers, routers) as server:
        reply = ask(server.url, 4)
        number = wait_for_moment(feed, reply["request_id"])["number"]
        content = requests.get(f"{server.http_url}/moments/{number}/record", timeout=10).content
    (tmp_path / "moment.npz").write_bytes(content)
    record = Recording.load(tmp_path / "moment.npz")
    np.testing.assert_array_equal(record.chunks, reply["actions"][None])
    assert record.instruction == "turn on the stove" and record.policy == policy.description()
    assert watching(ServerConfig(port=0, page=False), ServedPolicy(policy, config)) == ([], [])
