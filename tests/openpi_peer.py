"""The other end of the wire, made of openpi-client itself: runs in an environment of its own (it needs numpy < 2).

    python openpi_peer.py messages        messages packed by openpi_client, one per line, in hexadecimal
    python openpi_peer.py repack          reads such lines, unpacks and packs each with openpi_client
    python openpi_peer.py resize FILE     enlarges the pictures of an .npz to 224 px by openpi_client, into OUT.npz
    python openpi_peer.py ask URL FILE    asks a policy server by openpi_client about FILE.npz, prints the packed reply
    python openpi_peer.py relay URL       asks by one client about each .npz whose path comes on a line, prints likewise
    python openpi_peer.py serve FILE LOG  serves the actions of FILE.npy, chunk after chunk, noting what it is sent

Not a test module: those with `openpi_environment.py` start it.
"""

import asyncio
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import websockets.asyncio.server
from openpi_client import image_tools, msgpack_numpy, websocket_client_policy

CHUNK, EXECUTED = 10, 5


def messages() -> list[Any]:
    """The same values, drawn alike, on either side."""
    rng = np.random.default_rng(0)
    return [
        {"observation/image": rng.integers(0, 256, (224, 224, 3)).astype(np.uint8), "prompt": "put the bowl away"},
        {"actions": rng.normal(size=(50, 7)).astype(np.float32), "server_timing": {"infer_ms": 12.5}},
        {"state": rng.normal(size=8), "turned": np.arange(12, dtype=np.int16).reshape(3, 4).T, "none": None},
        {"scalars": [np.float32(0.1), np.int64(-3), np.bool_(True), np.float64(2.5)], "empty": np.zeros((0, 7))},
        {"words": np.array(["bowl", "plate"]), "bytes": b"\x00\xff", "nested": {"a": [1, 2.5, "three", True]}},
        {},
    ]


def repack(line: str) -> str:
    return msgpack_numpy.packb(msgpack_numpy.unpackb(bytes.fromhex(line))).hex()


def resize(source: Path) -> None:
    with np.load(source) as pictures:
        made = {name: image_tools.resize_with_pad(pictures[name], 224, 224) for name in pictures.files}
    np.savez(source.with_name("out.npz"), **made)


def ask(url: str, source: Path) -> str:
    policy = websocket_client_policy.WebsocketClientPolicy(url)
    reply = policy.infer(read_request(source))
    return msgpack_numpy.packb({"metadata": policy.get_server_metadata(), "reply": reply}).hex()


def read_request(source: Path) -> dict[str, Any]:
    """Arrays as they are; what has no dimensions as the text or number that it was."""
    with np.load(source) as content:
        found = {name: content[name] for name in content.files}
    return {name: value if value.ndim else value.item() for name, value in found.items()}


def relay(url: str) -> None:
    policy = websocket_client_policy.WebsocketClientPolicy(url)
    for line in sys.stdin:
        print(msgpack_numpy.packb(policy.infer(read_request(Path(line.strip())))).hex(), flush=True)


def serve(source: Path, log: Path) -> None:
    actions = np.load(source)
    asked: list[dict[str, Any]] = []

    def infer(observation: dict[str, Any]) -> dict[str, Any]:
        asked.append(observation)
        first = EXECUTED * max(len(asked) - 2, 0)
        np.savez(log.with_name(f"{log.name}-{len(asked)}.npz"), **observation)
        return {"actions": actions[first : first + CHUNK], "server_timing": {"infer_ms": 1.5}}

    async def handle(connection: websockets.asyncio.server.ServerConnection) -> None:
        packer = msgpack_numpy.Packer()
        await connection.send(packer.pack({"served_by": "openpi_client"}))
        while True:
            try:
                await connection.send(packer.pack(infer(msgpack_numpy.unpackb(await connection.recv()))))
            except websockets.exceptions.ConnectionClosed:
                return
            except Exception:
                await connection.send(traceback.format_exc())
                await connection.close(1011)
                return

    async def run() -> None:
        async with websockets.asyncio.server.serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
            print(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    asyncio.run(run())


def main(command: str, *arguments: str) -> None:
    if command == "messages":
        print("\n".join(msgpack_numpy.packb(message).hex() for message in messages()))
    elif command == "repack":
        print("\n".join(repack(line) for line in sys.stdin.read().split()))
    elif command == "resize":
        resize(Path(arguments[0]))
    elif command == "ask":
        print(ask(arguments[0], Path(arguments[1])))
    elif command == "relay":
        relay(arguments[0])
    else:
        serve(Path(arguments[0]), Path(arguments[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
