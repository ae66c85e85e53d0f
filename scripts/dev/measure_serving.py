"""Load on a policy server of this machine: rates, p50 and p99, what batches bring, memory; every answer is checked.

    python scripts/dev/measure_serving.py --checkpoint demo/runs/small --output serving.json

Every client asks about observations of its own, and compares each answer with what the policy says when it is called
directly. Clients are threads of one process, which shares the processors with the server: rates say what both took, and
`server's ms` how much processor time the server alone took for an answer. Batches of one and of several are compared
between two servers, asked in turn. Ends with 1 where an answer was wrong, mixed up or missing.
"""

import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from websockets.sync.client import connect

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `scripts` is no installed package

from prismatic.command_line import parse_or_exit
from prismatic.command_status import UNWANTED
from prismatic.policy import Policy
from prismatic.serving import json_arrays
from prismatic.serving.client import PolicyClient
from prismatic.serving.wire import pack, unpack

START_S, ANSWER_S = 300.0, 120.0
Asking = Callable[[dict[str, Any]], NDArray[Any]]


@dataclass
class MeasureConfig:
    """What to measure."""

    checkpoint: Path  # folder of a policy
    output: Path | None = None  # JSON of all figures; None: none
    clients: str = "1,8,64"  # how many ask at once, one row each
    requests: int = 1920  # of a row, by all its clients together
    rounds: int = 4  # of batches of one against several, by 8 clients
    max_batch_size: int = 8  # of the server that answers several at once
    memory_requests: int = 4000  # asked while the server's memory is watched; 0: none
    dtype: str = "float32"  # what the policy computes in
    tolerance: float = 1e-5  # by which an answer may differ from the direct call's


class ServerProcess:
    """`vla-scripts/deploy.py` in a process of its own, listening.

    Attributes:
        port: on this machine.
        log: file of what it said.
    """

    def __init__(self, checkpoint: Path, flags: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        command = [sys.executable, str(ROOT / "vla-scripts" / "deploy.py"), "--pretrained_checkpoint", str(checkpoint)]
        with log.open("w") as said:
            self._process = subprocess.Popen(
                [*command, "--port", "0", *flags], stderr=said, stdout=said, env={**os.environ, **environment}
            )
        until = time.monotonic() + START_S
        while not (found := re.search(r"ws://127\.0\.0\.1:(\d+) for WebSockets", log.read_text())):
            if self._process.poll() is not None or time.monotonic() > until:
                self.end()
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.port = int(found[1])

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def memory(self) -> int:
        """Bytes that it holds."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def processor_s(self) -> float:
        """Seconds that it has computed."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> int:
        """Tell it to end, as a service manager does; its exit status."""
        self._process.terminate()
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise


class Samples:
    """Observations of many clients, and what the policy says to each when it is called directly.

    Args:
        policy: the one that is served.
        clients, each: how many clients, and how many observations each of them has.
        tolerance: by which answers may differ; those to any two observations differ by a hundred times as much, so
            that no answer passes for another one's.
    """

    def __init__(self, policy: Policy, clients: int, each: int, tolerance: float) -> None:
        draw = np.random.default_rng(0)
        side, robot = 96, policy.robot
        self.tolerance, self.each = tolerance, each
        self.observations: list[dict[str, Any]] = []
        for _ in range(clients * each):
            # Grey with a coloured square somewhere: noise alone looks alike to a policy, wherever it is from.
            pictures = {}
            for camera in robot.cameras[: policy.transform.num_images]:
                picture = draw.integers(256, size=3, dtype=np.uint8) + np.zeros((side, side, 3), np.uint8)
                top, left = draw.integers(0, side // 2, 2)
                picture[top : top + side // 2, left : left + side // 2] = draw.integers(256, size=3, dtype=np.uint8)
                pictures[camera] = picture
            self.observations.append({**pictures, robot.state_key: draw.uniform(-0.5, 0.5, robot.proprio_dim)})
        self.instruction = "put the bowl on the plate"
        self.expected = [policy.act_batch([one], [self.instruction]).actions[0] for one in self.observations]
        nearest = min(
            float(np.abs(one - other).max())
            for number, one in enumerate(self.expected)
            for other in self.expected[:number]
        )
        if nearest < 100 * tolerance:
            raise ValueError(
                f"two observations have actions within {nearest:.2g}; mixed-up answers would not be noticed"
            )

    def check(self, number: int, actions: NDArray[Any]) -> bool:
        """Whether these are the actions for an observation."""
        expected = self.expected[number]
        return actions.shape == expected.shape and bool(np.abs(actions - expected).max() <= self.tolerance)


@dataclass
class Load:
    """What many clients saw.

    Attributes:
        way: how they asked.
        clients: how many at once.
        seconds: (answers,) of each, in the order of the clients.
        took_s: from the first request to the last answer.
        wrong: answers that were not the policy's, or not to that request.
        failed: what was raised instead of an answer.
        processor_s: the server's.
        memory: bytes that the server holds afterwards.
    """

    way: str
    clients: int
    seconds: list[float] = field(default_factory=list)
    took_s: float = 0.0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    processor_s: float = 0.0
    memory: int = 0

    def figures(self) -> dict[str, Any]:
        """For a table and for JSON."""
        p50, p99 = np.percentile(self.seconds, [50, 99]) * 1000 if self.seconds else (np.nan, np.nan)
        answers = max(len(self.seconds), 1)
        return {
            "way": self.way,
            "clients": self.clients,
            "answers": len(self.seconds),
            "wrong": self.wrong,
            "failed": len(self.failed),
            "per_s": round(len(self.seconds) / self.took_s, 1),
            "p50_ms": round(float(p50), 2),
            "p99_ms": round(float(p99), 2),
            "server_ms": round(1000 * self.processor_s / answers, 2),
            "memory_mb": round(self.memory / 2**20, 1),
        }


@contextmanager
def policy_client(port: int) -> Iterator[Asking]:
    """By our own client."""
    with closing(PolicyClient(f"ws://127.0.0.1:{port}", timeout_s=ANSWER_S)) as client:
        yield lambda request: client.infer(request).content["actions"]


@contextmanager
def raw_websocket(port: int) -> Iterator[Asking]:
    """By messages as they are."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
        connection.recv(ANSWER_S)

        def ask(request: dict[str, Any]) -> NDArray[Any]:
            name = f"{threading.get_ident()}-{time.perf_counter_ns()}"
            connection.send(pack({**request, "id": name}))
            answer = unpack(connection.recv(ANSWER_S, decode=False))
            if answer["id"] != name:
                raise ValueError(f"the answer is {answer['id']}'s, not {name}'s")
            return np.asarray(answer["actions"])

        yield ask


@contextmanager
def http_client(port: int) -> Iterator[Asking]:
    """By POST /act on a connection that stays open."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)) as connection:

        def ask(request: dict[str, Any]) -> NDArray[Any]:
            body = dict(request)
            body["instruction"] = body.pop("prompt")
            connection.request("POST", "/act", json_arrays.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise ValueError(f"answered {answer.status}: {content[:200]!r}")
            return np.stack(json_arrays.loads(content))

        yield ask


WAYS = {"PolicyClient": policy_client, "websocket": raw_websocket, "http": http_client}


def load(server: ServerProcess, samples: Samples, way: str, clients: int, requests: int) -> Load:
    """Let many clients ask at once, `requests` in all."""
    seen = Load(way, clients)
    ready, lock = threading.Barrier(clients + 1), threading.Lock()

    def work(client: int) -> None:
        seconds, wrong, failed = [], 0, []
        try:
            with WAYS[way](server.port) as ask:
                ready.wait()
                for turn in range(requests // clients):
                    number = client * samples.each + turn % samples.each
                    request = {**samples.observations[number], "prompt": samples.instruction}
                    began = time.perf_counter()
                    actions = ask(request)
                    seconds.append(time.perf_counter() - began)
                    wrong += not samples.check(number, actions)
        except Exception as error:  # whatever it was, it is no answer
            failed.append(f"{type(error).__name__}: {error}")
            ready.abort()
        with lock:
            seen.seconds += seconds
            seen.wrong += wrong
            seen.failed += failed

    threads = [threading.Thread(target=work, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    with suppress(threading.BrokenBarrierError):  # somebody could not connect, which is among `failed`
        ready.wait()
    began, computed = time.perf_counter(), server.processor_s()
    for thread in threads:
        thread.join()
    seen.took_s, seen.processor_s = time.perf_counter() - began, server.processor_s() - computed
    seen.memory = server.memory()
    return seen


def compare_batches(one: ServerProcess, several: ServerProcess, samples: Samples, config: MeasureConfig) -> Any:
    """Both servers in turn; figures of all rounds, and several's ratio to one's: [median, lowest, highest]."""
    rounds = []
    for number in range(config.rounds):
        pair = {
            name: load(server, samples, "PolicyClient", 8, config.requests // 2).figures()
            for name, server in sorted({"one": one, "several": several}.items(), reverse=bool(number % 2))
        }
        rounds.append(pair)
    ratios = {
        key: [round(f(pair["several"][key] / pair["one"][key] for pair in rounds), 3) for f in (median, min, max)]
        for key in ("per_s", "p50_ms", "p99_ms", "server_ms")
    }
    return {"rounds": rounds, "ratios": ratios}


def watch_memory(server: ServerProcess, samples: Samples, requests: int) -> list[dict[str, float]]:
    """The server's memory over ten shares of the requests, by eight clients in all ways."""
    found = [{"answers": 0.0, "mb": round(server.memory() / 2**20, 1)}]
    for share in range(10):
        seen = load(server, samples, list(WAYS)[share % len(WAYS)], 8, requests // 10)
        found.append({"answers": found[-1]["answers"] + len(seen.seconds), "mb": round(seen.memory / 2**20, 1)})
    return found


def measure(config: MeasureConfig, console: Console) -> dict[str, Any]:
    """All figures."""
    numbers = [int(word) for word in config.clients.split(",")]
    policy = Policy.from_pretrained(config.checkpoint, device="cpu", dtype=config.dtype)
    samples = Samples(policy, max([*numbers, 8]), 2, config.tolerance)
    flags = ["--device", "cpu", "--dtype", config.dtype, "--max_rate", "1000000"]
    with TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {}
        for size in (1, config.max_batch_size):
            log = Path(folder) / f"{size}.log"
            servers[size] = ServerProcess(config.checkpoint, [*flags, "--max_batch_size", str(size)], log)
            stack.callback(servers[size].end)
        several = servers[config.max_batch_size]
        rows = []
        for clients in numbers:
            for way in WAYS:
                rows.append(load(several, samples, way, clients, config.requests))
                for failure in rows[-1].failed:
                    console.print(failure)
        found: dict[str, Any] = {"loads": [row.figures() for row in rows]}
        found["batches"] = compare_batches(servers[1], several, samples, config)
        if config.memory_requests:
            found["memory"] = watch_memory(several, samples, config.memory_requests)
    return {"config": {**asdict(config), "checkpoint": config.checkpoint.name, "output": None}, **found}


def show(found: dict[str, Any], console: Console) -> None:
    """As a table and lines."""
    pairs = [{**pair[name], "way": f"{name} at once"} for pair in found["batches"]["rounds"] for name in pair]
    table = Table("way", "clients", "answers", "wrong", "failed", "per s", "p50 ms", "p99 ms", "server's ms", "MB")
    for row in [*found["loads"], *pairs]:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    for key, (middle, low, high) in found["batches"]["ratios"].items():
        console.print(f"several at once against one, {key}: {middle} ({low} to {high})")
    if "memory" in found:
        console.print("memory: " + ", ".join(f"{m['mb']:g} MB after {m['answers']:g}" for m in found["memory"]))


def main(config: MeasureConfig) -> int:
    """Measure, show and write; the exit status."""
    console = Console(width=160)
    found = measure(config, console)
    show(found, console)
    if config.output is not None:
        config.output.write_text(json.dumps(found, indent=1))
    rows = [*found["loads"], *(row for pair in found["batches"]["rounds"] for row in pair.values())]
    return UNWANTED if any(row["wrong"] or row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(parse_or_exit(MeasureConfig)))
