"""A small policy server that speaks openpi's websocket protocol, for tests; as a program it serves a checkpoint.

    python tests/policy_server.py CHECKPOINT [UNNORM_KEY]

It prints its address and serves until its standard input ends.
"""

import argparse
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from prismatic.models.batch import Session
from prismatic.policy import Policy
from prismatic.serving.wire import pack, unpack

Infer = Callable[[dict[str, Any]], dict[str, Any] | None]


@contextmanager
def serving(infer: Infer, metadata: Any = None, port: int = 0) -> Iterator[str]:
    """Serve `infer` from threads of this process, one per connection; gives the address.

    What `infer` raises goes to the client as a traceback, and ends the connection; None ends it without a word. Bytes
    and text in place of metadata are sent as they are.
    """
    greeting = metadata if isinstance(metadata, bytes | str) else pack({} if metadata is None else metadata)

    connections: list[ServerConnection] = []

    def handle(connection: ServerConnection) -> None:
        connections.append(connection)
        try:
            connection.send(greeting)
            for message in connection:
                began = time.perf_counter()
                try:
                    reply = infer(unpack(message))
                except Exception:
                    connection.send(traceback.format_exc())
                    connection.close(1011)
                    return
                if reply is None:
                    return
                timing = {"infer_ms": 1000 * (time.perf_counter() - began), "prev_total_ms": 1.0}
                connection.send(pack({"server_timing": timing, **reply}))
        except ConnectionClosed:
            return

    with serve(handle, "127.0.0.1", port, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            for connection in connections:
                connection.close(1001)  # older websockets leave them open
            thread.join()


def policy_metadata(policy: Policy) -> dict[str, Any]:
    """What a server of this project says about itself."""
    return {
        "convention": "lightvla",
        "robot": policy.robot.to_json(),
        "cameras": list(policy.robot.cameras[: policy.transform.num_images]),
        "center_crop": policy.transform.center_crop,
        "policy": policy.description(),
    }


def policy_infer(policy: Policy) -> Infer:
    """One policy query of the convention `lightvla` at a time."""
    lock = threading.Lock()
    sessions: dict[str, Session] = {}

    def infer(message: dict[str, Any]) -> dict[str, Any]:
        instruction, seed, asker = message.pop("prompt"), message.pop("seed"), message.pop("session")
        if message.pop("query") == 0 or asker not in sessions:
            sessions[asker] = policy.new_session()
        with lock:
            output = policy.act_batch([message], [instruction], [sessions[asker]], seeds=[seed])
        return {"actions": output.actions[0], "kept": output.selection.kept().cpu().numpy()[0]}

    return infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("unnorm_key", nargs="?")
    arguments = parser.parse_args()
    policy = Policy.from_pretrained(arguments.checkpoint, unnorm_key=arguments.unnorm_key)
    with serving(policy_infer(policy), policy_metadata(policy)) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
