"""The WebSocket endpoint by real sockets: the policy's own actions, errors that are texts, watchers that see it all."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from served_policy import served
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from prismatic.policy import Policy, PolicyOutput
from prismatic.serving.client import PolicyClient, PolicyServerError
from prismatic.serving.server.events import Answered, ConnectionChanged, Event, Refused
from prismatic.serving.wire import pack, unpack

Observe = Callable[[int], dict[str, Any]]
SENTENCE = "put the bowl on the plate"


class Notes:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.is_closed = False

    def tell(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.is_closed = True


def test_actions_are_the_policy_s_own_and_the_greeting_describes_it(policy: Policy, observe: Observe) -> None:
    with served(policy, out_of_bounds="allow") as server, closing(PolicyClient(server.url)) as client:
        for number in range(3):
            reply = client.infer({**observe(number), "prompt": SENTENCE, "id": f"q{number}"}).content
            expected = policy.act_batch([observe(number)], [SENTENCE])
            np.testing.assert_array_equal(reply["actions"], expected.actions[0])
            np.testing.assert_array_equal(reply["kept"], expected.selection.kept()[0].numpy())
            assert reply["picks"].sum() == policy.model.num_visual_tokens and (reply["picks"] > 0).sum() > 0
            np.testing.assert_array_equal(reply["picks"] > 0, reply["kept"])
            assert reply["id"] == f"q{number}" and reply["request_id"] and reply["warnings"] == []
            timing = reply["server_timing"]
            assert timing["batch"] == 1 and 0 < timing["llm_ms"] < timing["infer_ms"] < timing["total_ms"]
        greeting = client.metadata
    assert greeting["convention"] == "lightvla" and greeting["echoes_id"] is True
    assert greeting["robot"] == policy.robot.to_json() and greeting["pruner"] == policy.description()["pruner"]
    assert greeting["cameras"] == ["full_image", "wrist_image"] and greeting["unnorm_key"] == policy.unnorm_key


def test_openpi_s_keys_and_gripper(policy: Policy, observe: Observe) -> None:
    own = observe(0)
    request = {"observation/image": own["full_image"], "observation/wrist_image": own["wrist_image"]}
    request |= {"observation/state": own["state"], "prompt": SENTENCE}
    with served(policy, convention="openpi") as server, closing(PolicyClient(server.url + "/any/path")) as client:
        actions = client.infer(request).content["actions"]
        with pytest.raises(PolicyServerError, match=r"lacks \['observation/image'.*started by --convention lightvla"):
            client.infer({**own, "prompt": SENTENCE})
    expected = policy.act(own, SENTENCE)
    np.testing.assert_array_equal(actions[:, :6], expected[:, :6])
    # What the simulator makes of a policy's gripper is the sign of -(2 a - 1).
    np.testing.assert_allclose(actions[:, 6], -(2 * expected[:, 6] - 1), atol=1e-15)


def test_requests_that_wait_together_are_answered_together_each_its_own(policy: Policy, observe: Observe) -> None:
    numbers = range(12)
    together = threading.Barrier(len(numbers))
    with served(policy, max_batch_size=4, batch_wait_ms=50.0) as server:

        def ask(number: int) -> dict[str, Any]:
            with closing(PolicyClient(server.url)) as client:
                together.wait(20)
                return client.infer({**observe(number), "prompt": SENTENCE, "id": number}).content

        with ThreadPoolExecutor(len(numbers)) as threads:
            replies = list(threads.map(ask, numbers))
    sizes = [reply["server_timing"]["batch"] for reply in replies]
    assert max(sizes) <= 4 and sum(sizes) / len(sizes) > 2
    for number, reply in zip(numbers, replies, strict=True):
        assert reply["id"] == number
        np.testing.assert_allclose(reply["actions"], policy.act(observe(number), SENTENCE), rtol=1e-5, atol=1e-5)


def test_what_is_asked_wrongly_ends_its_connection_by_a_sentence_and_no_other(policy: Policy, observe: Observe) -> None:
    good = {**observe(0), "prompt": SENTENCE}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({key: value for key, value in good.items() if key != "wrist_image"}, "lacks \\['wrist_image'\\]"),
        ({**good, "full_image": good["full_image"].astype(np.float32)}, "'full_image'.* is float32 .*expected uint8"),
        ({**good, "full_image": good["full_image"][0]}, "'full_image'.* is uint8 \\(64, 3\\); expected"),
        ({**good, "full_image": np.zeros((5000, 8, 3), np.uint8)}, "full_image is \\(5000, 8, 3\\).*--max_side"),
        ({**good, "full_image": np.zeros((0, 8, 3), np.uint8)}, "'full_image'.*expected uint8"),
        ({**good, "state": np.zeros(9)}, "'state'.* has shape \\(9,\\); expected \\(8,\\)"),
        ({**good, "state": np.full(8, np.nan)}, "'state'.* holds NaN"),
        ({**good, "prompt": 3}, "prompt is 3; expected a sentence"),
        ({**good, "prompt": "x" * 10_000_000}, "prompt has 10000000 bytes; expected at most 2048"),
        ({**good, "prompt": " \n"}, "prompt is empty"),
        ({**good, "prompt": "a\x1b[31mb"}, "characters that cannot be shown"),
        ({**good, "seed": -1}, "seed is -1; expected a whole number"),
        ({**good, "query": 1.5}, "query is 1.5; expected a whole number"),
        ({**good, "session": "x" * 200}, "session is a str; expected a text of at most 128"),
        ({**good, "id": [1]}, "id is a list; expected"),
        ({"observation/image": good["full_image"], "prompt": ""}, "started by --convention openpi"),
    ]
    with served(policy) as server, closing(PolicyClient(server.url)) as steady:
        expected = steady.infer(good).content["actions"]
        for request, words in wrong:
            with closing(PolicyClient(server.url)) as client, pytest.raises(PolicyServerError, match=words) as caught:
                client.infer(request)
            assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)
        np.testing.assert_array_equal(steady.infer(good).content["actions"], expected)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hello", "a text came; expected a request packed by msgpack"),
        (b"", "not a message in msgpack"),
        (b"\xc1", "not a message in msgpack"),
        (pack([1, 2]), "a request is a dictionary, and a list came"),
        (b"\x91" * 5000, "not a message in msgpack"),
        (b"\x90" * 10 + pack({})[:0], "not a message in msgpack"),
    ],
)
def test_messages_that_are_none(policy: Policy, message: str | bytes, words: str) -> None:
    with served(policy) as server, connect(server.url, compression=None) as connection:
        assert unpack(_bytes(connection.recv(5)))["server"] == "lightvla"
        connection.send(message)
        answer = connection.recv(5)
        assert isinstance(answer, str) and words in answer and "Traceback" not in answer
        with pytest.raises(ConnectionClosed):
            connection.recv(5)
        assert connection.close_code == 1011


def test_a_message_that_is_too_large_closes_the_connection_and_is_noted(policy: Policy) -> None:
    notes = Notes()
    with served(policy, [notes], max_message_mb=0.1) as server, connect(server.url, compression=None) as connection:
        connection.recv(5)
        connection.send(b"\x00" * 200_000)
        with pytest.raises(ConnectionClosed):
            connection.recv(5)
        assert connection.close_code == 1009
    assert [event.code for event in notes.events if isinstance(event, Refused)] == ["too_large"]


def test_watchers_are_told_in_order_and_a_failing_one_changes_nothing(policy: Policy, observe: Observe) -> None:
    class Fails(Notes):
        def tell(self, event: Event) -> None:
            raise RuntimeError("no")

    notes, fails = Notes(), Fails()
    with served(policy, [fails, notes]) as server, closing(PolicyClient(server.url)) as client:
        for number in range(2):
            client.infer({**observe(number), "prompt": SENTENCE})
        client.infer({**observe(2), "prompt": "go", "session": "kitchen 3", "query": 7})
        with pytest.raises(PolicyServerError):
            client.infer({})
    assert notes.is_closed and fails.is_closed
    came, *between, gone = notes.events
    assert isinstance(came, ConnectionChanged) and came.is_open and came.address.startswith("127.0.0.1:")
    assert isinstance(gone, ConnectionChanged) and not gone.is_open and gone.connection == came.connection
    *answered, refused = between
    assert isinstance(refused, Refused) and refused.code == "bad_request" and "lacks" in refused.reason
    asked = [(came.connection, 0), (came.connection, 1), ("kitchen 3", 7)]
    for number, (event, (session, query)) in enumerate(zip(answered, asked, strict=True)):
        assert isinstance(event, Answered) and (event.session, event.query) == (session, query)
        for key, value in observe(number).items():
            np.testing.assert_array_equal(event.observation[key], value)
        np.testing.assert_array_equal(event.actions, policy.act(observe(number), event.instruction))
        assert event.kept is not None and event.scores is not None and event.timing["total"] > 0


class Breaks(Policy):
    """A real policy, but for two words."""

    def act_batch(self, observations: Any, instructions: Any, *rest: Any, **named: Any) -> PolicyOutput:
        if "overflow" in instructions:
            raise FloatingPointError("NaN in the language model")
        if "break" in instructions:
            raise RuntimeError("secret of /home")
        return super().act_batch(observations, instructions, *rest, **named)


def test_a_policy_that_breaks_over_one_request_answers_the_others_of_its_batch(
    policy: Policy, observe: Observe
) -> None:
    """NaN never leaves, nor do the words of an exception that nobody foresaw."""
    breaks = Breaks(policy.checkpoint, policy.transform, policy.unnorm_key, policy.engine)
    sentences = ["overflow", SENTENCE, "break", SENTENCE]
    together = threading.Barrier(len(sentences))
    with served(breaks, batch_wait_ms=50.0) as server:

        def ask(number: int) -> Any:
            with closing(PolicyClient(server.url)) as client:
                together.wait(20)
                try:
                    return client.infer({**observe(number), "prompt": sentences[number]}).content["actions"]
                except PolicyServerError as error:
                    return str(error)

        with ThreadPoolExecutor(len(sentences)) as threads:
            overflow, one, broken, other = threads.map(ask, range(len(sentences)))
    assert "computed no usable actions: NaN in the language model" in overflow
    assert "the policy broke (RuntimeError); the server's log says more" in broken and "secret" not in broken
    np.testing.assert_allclose(one, policy.act(observe(1), SENTENCE), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other, policy.act(observe(3), SENTENCE), rtol=1e-5, atol=1e-5)


def _bytes(message: str | bytes) -> bytes:
    assert isinstance(message, bytes)
    return message
