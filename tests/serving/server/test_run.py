"""The command as a process: what it refuses before the model is read, and how it ends."""

import json
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import numpy as np
import pytest
import requests
from fastapi import FastAPI
from served_policy import serving_process
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from lightvla.commands import deploy
from prismatic.command_status import UNUSABLE
from prismatic.policy import Policy
from prismatic.serving.logs import JsonLines, TextLines
from prismatic.serving.server.run import PolicyServer, take_address
from prismatic.serving.settings import ServerConfig
from prismatic.serving.wire import pack, unpack


def refusal(capsys: pytest.CaptureFixture[str], **flags: Any) -> str:
    """What the command says when it ends for bad flags."""
    assert deploy.command(ServerConfig(**flags)) == UNUSABLE
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said.partition("error: ")[2]


@pytest.fixture
def _own_logging() -> Any:
    """The command's log goes elsewhere than the tests'."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("_own_logging")
def test_what_cannot_be_served_is_said_in_a_sentence(
    small_policy_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(small_policy_directory)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal(capsys, pretrained_checkpoint=checkpoint, port=port)
        assert said.startswith(f"--host 127.0.0.1 --port {port} cannot be used (Address already in use); stop what")
    assert "names no dataset" in refusal(capsys, pretrained_checkpoint=checkpoint, port=0, unnorm_key="other")
    assert "no-such-folder" in refusal(capsys, pretrained_checkpoint="./no-such-folder", port=0)
    monkeypatch.delenv("LIGHTVLA_API_KEY", raising=False)
    assert "there is no key" in refusal(capsys, pretrained_checkpoint=checkpoint, host="0.0.0.0", port=0)
    below_a_file = Path(__file__) / "records"
    said = refusal(capsys, pretrained_checkpoint="./no-such-folder", port=0, record=below_a_file)
    assert said.startswith(f"--record {below_a_file} cannot be written to (Not a directory)"), (
        "before the model is read"
    )
    assert "exclude each other" in refusal(
        capsys, pretrained_checkpoint=checkpoint, port=0, load_in_8bit=True, load_in_4bit=True
    )


def test_a_signal_lets_what_was_begun_be_answered(
    small_policy_directory: Path, policy: Policy, observe: Callable[[int], dict[str, Any]]
) -> None:
    """The request waits for a second one, which another client might ask; the signal comes meanwhile."""
    flags = ("--batch_wait_ms", "60000", "--dtype", "float32", "--log_format", "json", "--out_of_bounds", "allow")
    with serving_process(small_policy_directory, *flags) as (process, url):
        with connect(url, compression=None) as asks, connect(url, compression=None) as waits:
            for connection in (asks, waits):
                connection.recv(10)
            asks.send(pack({**observe(0), "prompt": "go"}))
            while "lightvla_queue_length 1.0" not in requests.get(f"http{url.removeprefix('ws')}/metrics").text:
                pass
            process.send_signal(signal.SIGTERM)
            answer = asks.recv(20)
            assert isinstance(answer, bytes)
            np.testing.assert_allclose(unpack(answer)["actions"], policy.act(observe(0), "go"), rtol=1e-5, atol=1e-5)
            for connection in (asks, waits):
                with pytest.raises(ConnectionClosed):
                    connection.recv(20)
                assert connection.close_code == 1001
        assert process.wait(20) == 0


def test_the_log_is_a_line_each_whatever_a_client_sent() -> None:
    words = ("%s refused", "a\x1b[31m\nERROR forged")
    record = logging.LogRecord("prismatic.x", logging.WARNING, __file__, 1, words[0], (words[1],), None)
    record.request_id, record.code = "ab12", "bad_request"
    line = json.loads(JsonLines().format(record))
    assert line["message"] == f"{words[1]} refused" and line["level"] == "WARNING" and line["request_id"] == "ab12"
    assert line["time"].endswith("+00:00") and line["code"] == "bad_request"
    text = TextLines().format(record)
    assert text.endswith(r"WARNING a\x1b[31m\nERROR forged refused")


def test_nobody_connects_to_an_address_that_is_taken_and_not_listened_to_yet() -> None:
    """openpi's client waits for a server as long as its address refuses connections, and no longer than that."""
    with take_address(ServerConfig(port=0)) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname()[:2], 5)


def test_the_log_names_the_page_once_it_can_be_opened(caplog: pytest.LogCaptureFixture) -> None:
    application = FastAPI()
    application.state.service = MagicMock(finish=AsyncMock())
    with caplog.at_level(logging.INFO):
        for page in (True, False):
            server = PolicyServer(application, ServerConfig(port=0, page=page))
            server.start()
            said = next(one for one in reversed(caplog.messages) if one.startswith("serving: "))
            assert said.endswith("in a browser to watch") == page and server.url in said
            server.stop()
