"""POST /act by a plain HTTP client in OpenVLA-OFT's payload, and the routes that say how the server is."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from served_policy import served

from prismatic.policy import Policy
from prismatic.serving.server.events import Answered, Event
from prismatic.serving.server.run import PolicyServer

Observe = Callable[[int], dict[str, Any]]
SENTENCE = "put the bowl on the plate"


@pytest.fixture(scope="module")
def server(policy: Policy) -> Iterator[PolicyServer]:
    with served(policy, out_of_bounds="allow") as server:
        yield server


def act(server: PolicyServer, request: Any) -> requests.Response:
    return requests.post(f"{server.http_url}/act", data=json_numpy.dumps(request))


def test_actions_are_the_policy_s_own(server: PolicyServer, policy: Policy, observe: Observe) -> None:
    expected = policy.act(observe(0), SENTENCE)
    request = {**observe(0), "instruction": SENTENCE}
    answer = act(server, request)
    assert answer.status_code == 200 and answer.headers["X-Request-ID"]
    actions = json_numpy.loads(answer.text)
    assert isinstance(actions, list) and len(actions) == policy.robot.chunk_length
    np.testing.assert_array_equal(np.stack(actions), expected)
    # For clients that cannot patch json: the request is text, and the answer too.
    twice = act(server, {"encoded": json_numpy.dumps(request)})
    assert twice.status_code == 200 and isinstance(twice.json(), str)
    np.testing.assert_array_equal(np.stack(json_numpy.loads(twice.json())), expected)
    # Plain lists do as well.
    plain = {key: value.tolist() for key, value in observe(0).items()}
    lists = requests.post(f"{server.http_url}/act", json={**plain, "instruction": SENTENCE})
    np.testing.assert_array_equal(np.stack(json_numpy.loads(lists.text)), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wrist_image": None}, "'wrist_image'.*expected uint8"),
        ({"full_image": np.zeros((8, 8, 4), np.uint8)}, "without the alpha channel"),
        ({"state": np.zeros(3)}, r"has shape \(3,\); expected \(8,\)"),
        ({"state": [1.0] * 7 + ["x"]}, "'state'"),
        ({"instruction": 5}, "instruction is 5; expected a sentence"),
        ({"encoded": "{}"}, "stands alone"),
    ],
)
def test_requests_that_cannot_be_answered_are_4xx_with_the_field_s_name(
    server: PolicyServer, observe: Observe, change: dict[str, Any], words: str
) -> None:
    answer = act(server, {**observe(0), "instruction": SENTENCE, **change})
    assert answer.status_code == 400 and set(answer.json()) == {"error", "request_id"}
    assert answer.headers["X-Request-ID"] == answer.json()["request_id"]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(answer.json()["error"])


ARRAY = {"__numpy__": "AAAA", "dtype": "|u1", "shape": [3]}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[1]", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b'{"encoded": 3}',
        b'{"encoded": "["}', b"[" + b"[]," * 300_000 + b"0]", b"[" + b"0," * 1_100_000 + b"0]",
        *(json.dumps({"full_image": {**ARRAY, **change}}).encode() for change in (
            {"__numpy__": "A"}, {"__numpy__": 3}, {"dtype": "O"}, {"dtype": [["a", "<f8"]]}, {"shape": [2**40]},
            {"shape": [-1]}, {"shape": "3"}, {"shape": [1.5]}, {"shape": [1] * 70}, {"dtype": "<M8[s]"},
        )),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(server: PolicyServer, body: bytes) -> None:
    answer = requests.post(f"{server.http_url}/act", data=body)
    assert answer.status_code == 400 and "Traceback" not in answer.text and len(answer.text) < 1000
    assert requests.get(f"{server.http_url}/healthz").text == "OK\n"


def test_other_paths_and_methods_are_refused_in_the_same_form(server: PolicyServer) -> None:
    for method, path, status in (("GET", "/act", 405), ("GET", "/docs", 404), ("POST", "/info", 405)):
        answer = requests.request(method, server.http_url + path)
        assert answer.status_code == status and "error" in answer.json()
        assert status == 404 or answer.headers["Allow"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_info_and_metrics_tell_what_is_served(policy: Policy, observe: Observe) -> None:
    with served(policy, out_of_bounds="allow") as server:
        act(server, {**observe(0), "instruction": SENTENCE})
        act(server, {})
        info = requests.get(f"{server.http_url}/info").json()
        counted = requests.get(f"{server.http_url}/metrics").text
    statistics = policy.transform.statistics["action"]
    bounds = info["action_bounds"]
    assert (bounds["low"], bounds["high"]) == (statistics["min"], statistics["max"]) and min(bounds["slack"]) > 0
    assert info["policy"]["pruner"] == str(policy.model.config.pruner_spec)
    assert info["requests"]["http"] == {
        "cameras": ["full_image", "wrist_image"], "state": "state", "instruction": "instruction",
    }  # fmt: skip
    for line in (
        'lightvla_requests_total{outcome="ok",protocol="http"} 1.0',
        'lightvla_requests_total{outcome="bad_request",protocol="http"} 1.0',
        'lightvla_stage_seconds_count{stage="llm"} 1.0',
        'lightvla_batch_size_bucket{le="1.0"} 1.0',
        "lightvla_kept_tokens_count 1.0",
        "lightvla_queue_length 0.0",
        "lightvla_dropped_events 0.0",
    ):
        assert f"\n{line}\n" in counted


def test_actions_out_of_bounds_are_flagged_or_clipped(policy: Policy, observe: Observe) -> None:
    class Notes:
        def __init__(self) -> None:
            self.answers: list[Answered] = []

        def tell(self, event: Event) -> None:
            if isinstance(event, Answered):
                self.answers.append(event)

        def close(self) -> None:
            pass

    low, high = (np.array(policy.transform.statistics["action"][name]) for name in ("min", "max"))
    notes, found = Notes(), {}
    own = policy.act(observe(1), SENTENCE)
    for choice in ("flag", "clip"):
        with served(policy, [notes], out_of_bounds=choice) as server:
            answer = act(server, {**observe(1), "instruction": SENTENCE})
            found[choice] = np.stack(json_numpy.loads(answer.text))
    np.testing.assert_array_equal(found["flag"], own)
    np.testing.assert_array_equal(found["clip"], np.clip(own, low, high))
    for event, actions in zip(notes.answers, found.values(), strict=True):
        np.testing.assert_array_equal(event.actions, actions)
        beyond = (own > high + 0.05 * (high - low)) | (own < low - 0.05 * (high - low))
        assert len(event.warnings) == beyond.any(axis=0).sum() > 0
        assert event.warnings[0].startswith(f"action dimension {np.flatnonzero(beyond.any(axis=0))[0]} is ")


@pytest.mark.slow
def test_the_server_keeps_what_its_description_promises(server: PolicyServer) -> None:
    """By schemathesis, which makes up requests. That a body follows the schema says nothing about its base64."""
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.http_url}/openapi.json",
            "--checks", "all", "--exclude-checks", "positive_data_acceptance",
            "--max-examples", "30", "--seed", "1", "--no-color",
        ],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
