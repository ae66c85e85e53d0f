"""A small server of openpi's websocket protocol, for tests of its clients: it answers, or misbehaves, as it is told.

The real one is in `prismatic/serving/server/`; `served_policy.py` starts it.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from prismatic.serving.wire import pack, unpack

Infer = Callable[[dict[str, Any]], dict[str, Any] | None]


@contextmanager
def serving(infer: Infer, metadata: Any = None, port: int = 0, **options: Any) -> Iterator[str]:
    """Serve `infer` from threads of this process, one per connection; gives the address.

    Options are those of `websockets.sync.server.serve`.

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

    with serve(handle, "127.0.0.1", port, compression=None, max_size=None, **options) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"{'wss' if 'ssl' in options else 'ws'}://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            for connection in connections:
                connection.close(1001)  # older websockets leave them open
            thread.join()
