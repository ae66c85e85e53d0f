"""What a robot's program asks of the client: waiting, keys, certificates, and answers that can be executed."""

import dataclasses
import http
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_server import serving
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from prismatic.serving.client import PolicyClient, PolicyServerError
from prismatic.serving.wire import pack, unpack
from prismatic.vla.robots import ALOHA, LIBERO

METADATA = {"convention": "lightvla", "robot": LIBERO.to_json(), "echoes_id": True}
OBSERVATION = {"full_image": np.zeros((4, 4, 3), np.uint8), "state": np.arange(8.0)}


class Server:
    """Keeps what it was asked; answers what `actions` says."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.actions: Any = np.ones((8, 7), np.float32)

    def infer(self, message: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(message)
        return {"actions": self.actions, "id": message.get("id")}


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Iterator[PolicyClient]:
    with serving(server.infer, METADATA) as url:
        made = PolicyClient(url, timeout_s=10.0)
        yield made
        made.close()


def test_actions_of_one_observation(server: Server, client: PolicyClient) -> None:
    actions = client.act(OBSERVATION, "pick up the bowl", seed=3)
    assert actions.dtype == np.float64 and actions.tolist() == np.ones((8, 7)).tolist()
    client.act(OBSERVATION, "pick up the bowl")
    client.begin_episode()
    client.act(OBSERVATION, "put it down")
    first, second, third = server.asked
    assert first["prompt"] == "pick up the bowl" and first["state"].tolist() == list(range(8)) and first["seed"] == 3
    assert "seed" not in second
    assert [message["query"] for message in server.asked] == [0, 1, 0]
    assert first["session"] == second["session"] != third["session"], "an episode is a session"
    assert len({message["id"] for message in server.asked}) == 3


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (np.ones((8, 6)), r"actions as float64 \(8, 6\); expected numbers \(8, 7\), as its robot 'libero'"),
        (np.ones((3, 7)), r"\(3, 7\); expected numbers \(8, 7\)"),
        (np.full((8, 7), np.nan), r"NaN or infinity, first at \[0 0\]"),
        (np.ones((8, 7), bool), "actions as bool"),
        (None, "actions as object"),
        ([[1.0], [1.0, 2.0]], "actions of different lengths"),
        ("error", "actions as <U5"),
    ],
)
def test_what_no_robot_can_execute_is_never_returned(
    server: Server, client: PolicyClient, actions: Any, words: str
) -> None:
    server.actions = actions
    with pytest.raises(PolicyServerError, match=words):
        client.act(OBSERVATION, "x")
    server.actions = np.zeros((8, 7))
    assert client.act(OBSERVATION, "x").tolist() == np.zeros((8, 7)).tolist()


def test_a_server_of_another_robot_is_refused(server: Server) -> None:
    with serving(server.infer, METADATA) as url:
        PolicyClient(url, robot="libero").close()
        PolicyClient(url, robot=LIBERO).close()
        with pytest.raises(PolicyServerError, match=r"serves a policy for robot 'libero'; this client drives 'aloha'"):
            PolicyClient(url, robot="aloha")
        longer = dataclasses.replace(LIBERO, chunk_length=16)
        with pytest.raises(PolicyServerError, match="'libero', which differs in chunk_length; this client"):
            PolicyClient(url, robot=longer)
    strange = {"robot": {"name": "x", "wheels": 4}}
    with serving(server.infer, strange) as url, pytest.raises(PolicyServerError, match="robot that is none: .*wheels"):
        PolicyClient(url, robot=ALOHA)
    with serving(server.infer) as url, pytest.raises(PolicyServerError, match="does not describe its robot"):
        PolicyClient(url, robot=ALOHA)


@pytest.mark.parametrize("metadata", [{}, {"convention": "openpi", "robot": LIBERO.to_json()}])
def test_servers_of_other_conventions_are_not_asked_for_actions(server: Server, metadata: dict[str, Any]) -> None:
    with serving(server.infer, metadata) as url:
        client = PolicyClient(url)
        with pytest.raises(PolicyServerError, match="expected 'lightvla'; ask others by infer"):
            client.act(OBSERVATION, "x")
        assert client.infer({"observation/state": np.ones(8)}).content["actions"].shape == (8, 7)
        assert "id" not in server.asked[0], "others are sent nothing that they do not know"
        client.close()


def talking(script: Any, metadata: dict[str, Any] = METADATA) -> Any:
    """A server whose side of every connection is `script(connection)`, after the greeting."""

    def handle(connection: ServerConnection) -> None:
        connection.send(pack(metadata))
        script(connection)

    return serve(handle, "127.0.0.1", 0, compression=None, max_size=None)


def test_handshake_and_greeting_share_one_timeout() -> None:
    def late(connection: ServerConnection) -> None:
        time.sleep(1.0)
        with suppress(ConnectionClosed):
            connection.send(pack(METADATA))

    def hesitate(*_: Any) -> None:
        time.sleep(1.0)

    with serve(late, "127.0.0.1", 0, process_request=hesitate) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with pytest.raises(PolicyServerError, match=r"no answer within 1\.5 s"):
            PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout_s=1.5)
        server.shutdown()
        thread.join()


def test_the_answer_to_another_request_is_never_taken() -> None:
    """The server answers the second request of each connection with the first one's answer."""

    def script(connection: ServerConnection) -> None:
        first = unpack(connection.recv())
        answer = pack({"actions": np.zeros((8, 7)), "id": first["id"]})
        connection.send(answer)
        for _ in connection:
            connection.send(answer)

    with talking(script) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout_s=10)
        client.act(OBSERVATION, "x")
        with pytest.raises(PolicyServerError, match="answered request 0 when asked 1; that answer is not used"):
            client.act(OBSERVATION, "x")
        client.act(OBSERVATION, "x")
        client.close()
        server.shutdown()
        thread.join()


def test_an_answer_that_nobody_asked_for_ends_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    """Each first answer comes twice, without ids: the second one must not answer the next request."""
    sent = threading.Event()

    def script(connection: ServerConnection) -> None:
        for message in connection:
            x = unpack(message)["x"]
            connection.send(pack({"actions": x}))
            connection.send(pack({"actions": x}))
            sent.set()

    with talking(script, {}) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = PolicyClient(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", timeout_s=10)
        for x in range(3):
            assert client.infer({"x": x}).content["actions"] == x
            assert sent.wait(10)
            sent.clear()
            time.sleep(0.05)  # until it is here
        assert "sent an answer without a request; opening another connection" in caplog.text
        client.close()
        server.shutdown()
        thread.join()


def test_a_server_that_is_still_starting_is_waited_for(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    started = threading.Event()

    def start_later() -> None:
        time.sleep(0.6)
        with serving(server.infer, METADATA, port):
            started.wait(20)

    thread = threading.Thread(target=start_later)
    thread.start()
    with caplog.at_level(logging.INFO):
        client = PolicyClient(f"ws://127.0.0.1:{port}", wait_s=15.0)
    assert "waiting for a policy server, 0 of 15 s: no policy server at" in caplog.text
    assert client.act(OBSERVATION, "x").shape == (8, 7)
    client.close()
    started.set()
    thread.join()
    began = time.monotonic()
    with pytest.raises(PolicyServerError, match="no policy server at .*start the server"):
        PolicyClient(f"ws://127.0.0.1:{port}", wait_s=0.6)
    assert 0.3 < time.monotonic() - began < 5


def test_the_key_is_shown_and_a_refusal_says_where_it_belongs(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[str | None] = []

    def check(connection: ServerConnection, request: Request) -> Response | None:
        shown.append(request.headers.get("Authorization"))
        return None if shown[-1] == "Api-Key s3cret" else connection.respond(http.HTTPStatus.UNAUTHORIZED, "no\n")

    monkeypatch.delenv("LIGHTVLA_API_KEY", raising=False)
    with serving(server.infer, METADATA, process_request=check) as url:
        began = time.monotonic()
        with pytest.raises(PolicyServerError, match=r"refuses a client without a key \(401\); give its key as api_key"):
            PolicyClient(url, wait_s=20.0)
        assert time.monotonic() - began < 10, "waiting will not help"
        with pytest.raises(PolicyServerError, match=r"refuses the key that was given \(401\)") as caught:
            PolicyClient(url, api_key="wrong")
        assert "wrong" not in str(caught.value)
        PolicyClient(url, api_key="s3cret").close()
        monkeypatch.setenv("LIGHTVLA_API_KEY", "s3cret")
        PolicyClient(url).close()
    assert shown == [None, "Api-Key wrong", "Api-Key s3cret", "Api-Key s3cret"]
    assert "unencrypted" not in caplog.text
    with pytest.raises(PolicyServerError, match="no policy server"):
        PolicyClient("ws://localhost.invalid:1", timeout_s=1.0)
    assert "the key goes to localhost.invalid unencrypted" in caplog.text and "s3cret" not in caplog.text
    with pytest.raises(ValueError, match="expected one word") as told:
        PolicyClient("ws://127.0.0.1:1", api_key="two words")
    assert "two words" not in str(told.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_is_trusted_when_its_file_is_given(server: Server, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    made = [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(server.infer, METADATA, ssl=context) as url:
        with pytest.raises(PolicyServerError, match=r"certificate that is not trusted here \(self-signed.*as tls"):
            PolicyClient(url)
        for tls in (certificate, str(certificate), ssl.create_default_context(cafile=certificate)):
            client = PolicyClient(url, tls=tls)
            assert client.act(OBSERVATION, "x").shape == (8, 7)
            client.close()
        with pytest.raises(ValueError, match="not encrypted; expected wss"):
            PolicyClient(url.replace("wss", "ws"), tls=certificate)
        with pytest.raises(ValueError, match=r"key.pem is no file of certificates"):
            PolicyClient(url, tls=key)
        with pytest.raises(ValueError, match=r"absent.pem is no file of certificates"):
            PolicyClient(url, tls=tmp_path / "absent.pem")
