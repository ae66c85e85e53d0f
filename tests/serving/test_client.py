"""The client against real servers: websockets of `policy_server.py`, and things that are none."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from policy_server import serving

from prismatic.serving.address import check_url
from prismatic.serving.client import PolicyClient, PolicyServerError
from prismatic.serving.wire import pack


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def clients() -> Iterator[list[PolicyClient]]:
    made: list[PolicyClient] = []
    yield made
    for client in made:
        client.close()


def double(observation: dict[str, Any]) -> dict[str, Any]:
    return {"actions": 2 * observation["x"], "heard": observation["prompt"]}


def test_request_and_answer(clients: list[PolicyClient]) -> None:
    with serving(double, {"robot": "libero", "stats": np.arange(3)}) as url:
        clients.append(client := PolicyClient(url))
        assert client.metadata["robot"] == "libero" and client.metadata["stats"].tolist() == [0, 1, 2]
        reply = client.infer({"x": np.array([[1.5, -2.0]]), "prompt": "pick up"})
        np.testing.assert_array_equal(reply.content["actions"], [[3.0, -4.0]])
        assert reply.content["heard"] == "pick up"
        assert 0 < reply.content["server_timing"]["infer_ms"] / 1000 < reply.seconds


def test_several_requests_are_on_their_way_at_once(clients: list[PolicyClient]) -> None:
    """The server answers only when four requests have arrived, each over a connection of its own."""
    together = threading.Barrier(4, timeout=20)

    def infer(observation: dict[str, Any]) -> dict[str, Any]:
        together.wait()
        return {"actions": observation["x"]}

    with serving(infer) as url:
        clients.append(client := PolicyClient(url))
        for _ in range(2):
            replies = client.infer_batch([{"x": np.array([k])} for k in range(4)])
            assert [int(reply.content["actions"][0]) for reply in replies] == [0, 1, 2, 3]


def test_an_error_of_the_server_becomes_one_here_and_the_next_request_is_answered(
    clients: list[PolicyClient], caplog: pytest.LogCaptureFixture
) -> None:
    def infer(observation: dict[str, Any]) -> dict[str, Any]:
        if observation["x"] == 0:
            raise ZeroDivisionError("no such thing")
        return {"actions": 1}

    with serving(infer) as url:
        clients.append(client := PolicyClient(url))
        with pytest.raises(PolicyServerError, match="with an error: ZeroDivisionError: no such thing$"):
            client.infer({"x": 0})
        assert "Traceback (most recent call last)" in caplog.text
        assert client.infer({"x": 1}).content["actions"] == 1


def test_a_late_answer_is_not_taken_for_the_next_one(clients: list[PolicyClient]) -> None:
    released = threading.Event()

    def infer(observation: dict[str, Any]) -> dict[str, Any]:
        if observation["x"] == 0:
            released.wait(20)
        return {"actions": observation["x"]}

    with serving(infer) as url:
        clients.append(client := PolicyClient(url, timeout_s=0.5))
        with pytest.raises(PolicyServerError, match="has not answered within 0.5 s"):
            client.infer({"x": 0})
        released.set()
        assert client.infer({"x": 1}).content["actions"] == 1


def test_a_server_that_came_back_is_asked_again(clients: list[PolicyClient]) -> None:
    port = unused_port()
    with serving(double, {"robot": "a"}, port) as url:
        clients.append(client := PolicyClient(url))
        client.infer({"x": np.ones(1), "prompt": ""})
    with pytest.raises(PolicyServerError, match="no policy server at .*refused"):
        client.infer({"x": np.ones(1), "prompt": ""})
    with serving(double, {"robot": "a", "engine": "as it was measured", "policy": {"dtype_reason": "quicker"}}, port):
        assert client.infer({"x": np.ones(1), "prompt": ""}).content["actions"] == [2.0]
    with (
        serving(double, {"robot": "b"}, port),
        pytest.raises(PolicyServerError, match=r"other metadata than before \(robot: 'b' instead of 'a'\)"),
    ):
        client.infer({"x": np.ones(1), "prompt": ""})


def test_a_connection_that_ends_without_an_answer(clients: list[PolicyClient]) -> None:
    with serving(lambda observation: double(observation) if observation["prompt"] else None) as url:
        clients.append(client := PolicyClient(url))
        with pytest.raises(PolicyServerError, match="closed the connection instead of answering"):
            client.infer({"x": np.ones(1), "prompt": ""})
        assert client.infer({"x": np.ones(1), "prompt": "again"}).content["actions"] == [2.0]


def test_nobody_there() -> None:
    url = f"ws://127.0.0.1:{unused_port()}"
    with pytest.raises(
        PolicyServerError, match=f"no policy server at {url} .*refused.*openpi-client.*start the server"
    ):
        PolicyClient(url)


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        ("hello", "greeted with an error: hello"),
        (b"\xc1\xc1", "greeted with not a message in msgpack .* expected a policy server"),
        (pack([1, 2]), "greeted with a list instead of a dict"),
    ],
)
def test_greetings_of_other_servers(greeting: str | bytes, words: str) -> None:
    with serving(double, greeting) as url, pytest.raises(PolicyServerError, match=words):
        PolicyClient(url)


class Website(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


class OldWebsite(Website):
    protocol_version = "HTTP/1.0"


@pytest.mark.parametrize(
    ("website", "words"), [(Website, "an HTTP server, which answers 404"), (OldWebsite, "not receive a valid HTTP")]
)
def test_websites_are_no_policy_servers(website: type[Website], words: str) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), website) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(PolicyServerError, match=f"no policy server at .*{words}"):
                PolicyClient(f"ws://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_silence_has_an_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.perf_counter()
        with pytest.raises(PolicyServerError, match="no answer within 0.3 s"):
            PolicyClient(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.3)
        assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "url", ["localhost:8000", "http://localhost:8000", "ws://", "ws://host:port", "ws://host:99999", "ws://a b:1", ""]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected ws://host:port or wss://host:port"):
        check_url(url)


def test_addresses_with_passwords_are_refused_without_repeating_them() -> None:
    with pytest.raises(ValueError, match="leave them out") as caught:
        check_url("wss://me:hunter2@example.org:8000")
    assert "hunter2" not in str(caught.value)
    for url in ("ws://localhost:8000", "wss://example.org/policy", "ws://[::1]:8000"):
        check_url(url)
