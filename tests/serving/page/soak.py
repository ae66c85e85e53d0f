"""A long watch: a robot asks a server at 10 Hz while its page is open; memory of both, line by line.

    lightvla serve --pretrained_checkpoint demo/runs/small &
    PYTHONPATH=.:tests python tests/serving/page/soak.py http://127.0.0.1:8000 $! --minutes 30

Of the page: Chromium's JavaScript heap behind a collection, its documents and nodes, by the DevTools protocol. Of the
server: its resident memory.
"""

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from browser import Visit, chromium

from prismatic.serving.client import PolicyClient

RATE_HZ = 10.0


def ask(url: str, stopped: threading.Event, counts: dict[str, int]) -> None:
    """Requests with other pictures each time, episodes of 100."""
    client, draw = PolicyClient(url), np.random.default_rng(0)
    ramp = np.linspace(20, 230, 256)
    due = time.monotonic()
    while not stopped.is_set():
        number = counts["answers"]
        view = np.stack(np.broadcast_arrays(np.roll(ramp, number)[:, None], ramp[None], 128), axis=2).astype(np.uint8)
        view[:: draw.integers(3, 9)] //= 2
        request = {
            "full_image": view,
            "wrist_image": view[::-1].copy(),
            "state": np.zeros(8),
            "prompt": "turn on the stove",
        }
        client.infer({**request, "session": f"episode {number // 100}", "query": number % 100, "seed": number})
        counts["answers"] += 1
        due = max(due + 1 / RATE_HZ, time.monotonic() - 1.0)
        stopped.wait(max(0.0, due - time.monotonic()))
    client.close()


def resident_mb(process: int) -> float:
    """Resident memory of a process on Linux."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def heap(session: Any) -> tuple[float, int]:
    """JavaScript's heap in MB and DOM nodes, behind a collection."""
    session.send("HeapProfiler.collectGarbage")
    numbers = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
    return numbers["JSHeapUsedSize"] / 2**20, int(numbers["Nodes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="http://host:port of the server")
    parser.add_argument("process", type=int, help="its process id")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every_s", type=float, default=60.0)
    flags = parser.parse_args()
    stopped, counts = threading.Event(), {"answers": 0}
    robot = threading.Thread(target=ask, args=(flags.url.replace("http", "ws", 1), stopped, counts))
    robot.start()
    try:
        with chromium() as browser:
            visit = Visit(browser, flags.url, viewport={"width": 1200, "height": 1000})
            session = visit.page.context.new_cdp_session(visit.page)
            session.send("Performance.enable")
            began = time.monotonic()
            while (passed := time.monotonic() - began) < 60 * flags.minutes:
                visit.page.wait_for_timeout(1000 * flags.every_s)
                used, nodes = heap(session)
                line = f"{passed / 60:5.1f} min: {counts['answers']} answers, page {used:.1f} MB, {nodes} nodes, "
                print(
                    f"{line}server {resident_mb(flags.process):.0f} MB, {visit.page.inner_text('#which')}", flush=True
                )
            print("complaints:", visit.complaints, flush=True)
    finally:
        stopped.set()
        robot.join()


if __name__ == "__main__":
    main()
