"""Against the real openpi-client 0.1.2, in an environment of its own."""

import ast
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openpi_environment import PEER, openpi_interpreter, own_environment
from served_policy import served

from experiments.robot.libero.evaluation.command import main
from experiments.robot.libero.policies.server import resize_with_padding
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.policy import Policy
from prismatic.serving.wire import pack, unpack

pytestmark = pytest.mark.slow

CAP = 300  # libero_goal's

Peer = Callable[..., str]


@pytest.fixture(scope="session")
def openpi_python(request: pytest.FixtureRequest) -> Path:
    return openpi_interpreter(request.config)


@pytest.fixture
def peer(openpi_python: Path) -> Peer:
    def run(*arguments: str | Path, stdin: str = "") -> str:
        command = [str(openpi_python), str(PEER), *map(str, arguments)]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, env=own_environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@contextmanager
def openpi_server(python: Path, actions: Path, log: Path) -> Iterator[str]:
    command = [str(python), str(PEER), "serve", str(actions), str(log)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own_environment()
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            url = process.stdout.readline().strip()
            assert url, "the server did not start; its output is above"
            yield url
        finally:
            process.stdin.close()
            process.wait(20)


def peers_messages() -> list[Any]:
    """What `openpi_peer.messages` draws, which cannot be imported here: it imports openpi_client."""
    tree = ast.parse(PEER.read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "messages"]
    scope: dict[str, Any] = {"np": np, "Any": Any}
    exec(compile(ast.Module([function], []), str(PEER), "exec"), scope)
    return list(scope["messages"]())


def assert_same(found: Any, expected: Any) -> None:
    # NumPy's float64 is a Python float to msgpack, on either side.
    assert type(found) is (float if isinstance(expected, np.float64) else type(expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_messages_are_the_same_bytes_both_ways(peer: Peer) -> None:
    ours = peers_messages()
    theirs = [bytes.fromhex(line) for line in peer("messages").split("\n")[: len(ours)]]
    assert len(theirs) == len(ours) == 6
    for message, packed in zip(ours, theirs, strict=True):
        assert pack(message) == packed
        assert_same(unpack(packed), message)
    again = peer("repack", stdin="\n".join(pack(message).hex() for message in ours)).split()
    assert [bytes.fromhex(line) for line in again] == theirs


def test_pictures_are_resized_alike(peer: Peer, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shapes = [(256, 256), (128, 128), (224, 224), (480, 640), (333, 100), (31, 57)]
    pictures = {f"{h}x{w}": rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in shapes}
    np.savez(tmp_path / "in.npz", **pictures)
    peer("resize", tmp_path / "in.npz")
    with np.load(tmp_path / "out.npz") as theirs:
        for name, picture in pictures.items():
            np.testing.assert_array_equal(resize_with_padding(picture, 224), theirs[name], err_msg=name)


def test_openpi_s_client_asks_our_server(peer: Peer, small_policy_directory: Path, tmp_path: Path) -> None:
    """In openpi's convention and in ours; the whole reply is what `Policy` answers here."""
    policy = Policy.from_pretrained(small_policy_directory, dtype=torch.float32)
    draw = np.random.default_rng(4)
    pictures = {camera: draw.integers(256, size=(224, 224, 3), dtype=np.uint8) for camera in policy.robot.cameras}
    own = {**pictures, "state": draw.uniform(-0.5, 0.5, 8)}
    theirs = {"observation/image": own["full_image"], "observation/wrist_image": own["wrist_image"]}
    theirs["observation/state"] = own["state"]
    expected = policy.act(own, "go left")
    for convention, request in (("openpi", theirs), ("lightvla", own)):
        np.savez(tmp_path / "query.npz", prompt="go left", **request)
        with served(policy, convention=convention) as server:
            answer = unpack(bytes.fromhex(peer("ask", server.url, tmp_path / "query.npz").strip()))
        assert answer["metadata"]["convention"] == convention
        actions = answer["reply"]["actions"]
        np.testing.assert_array_equal(actions[:, :6], expected[:, :6])
        gripper = 1 - 2 * expected[:, 6] if convention == "openpi" else expected[:, 6]
        np.testing.assert_array_equal(actions[:, 6], gripper)


def test_openpi_s_client_raises_where_our_server_refuses(
    openpi_python: Path, small_policy_directory: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "query.npz", prompt="go left", state=np.zeros(8))
    policy = Policy.from_pretrained(small_policy_directory, dtype=torch.float32)
    with served(policy) as server:
        done = subprocess.run(
            [str(openpi_python), str(PEER), "ask", server.url, str(tmp_path / "query.npz")],
            capture_output=True, text=True, timeout=120, env=own_environment(),
        )  # fmt: skip
    assert done.returncode == 1 and "Error in inference server" in done.stderr
    assert "the request lacks ['full_image', 'wrist_image']" in done.stderr


def test_a_server_of_openpi_s_parts_is_evaluated(openpi_python: Path, tmp_path: Path) -> None:
    """The whole command. What the simulator did is repeated as openpi's example does it, with the server's numbers."""
    rng = np.random.default_rng(2)
    actions = rng.uniform(-0.4, 0.4, (CAP + 10, 7)).astype(np.float32)
    actions[:, 6] = rng.choice([-1.0, -0.01, 0.0, 0.3, 1.0], CAP + 10)
    np.save(tmp_path / "actions.npy", actions)
    flags = {"task_suite_name": "libero_goal", "task_ids": "1", "initial_states": "30", "renderer": "fast"}
    with openpi_server(openpi_python, tmp_path / "actions.npy", tmp_path / "asked") as url:
        config = EvaluationConfig(policy_url=url, output_dir=str(tmp_path / "results"), env_img_res=128, **flags)
        assert main(config, ["eval"]) == 0
    results = Results.load(tmp_path / "results")
    (episode,) = results.episodes
    assert episode.invalid is None and episode.steps == CAP and len(episode.latency_ms) == CAP // 5
    assert episode.stage_ms["server"] == [1.5] * (CAP // 5)
    assert results.policy["server_metadata"] == {"served_by": "openpi_client"}
    assert results.policy["policy_convention"] == "openpi" and results.policy["robot"]["chunk_length"] == 10

    with LiberoEnvironment(load_task("libero_goal", 1), resolution=128, renderer="fast", seed=7) as environment:
        environment.reset(30, seed=7)
        for step in range(CAP):
            if step % 5 == 0:
                # Of the policy queries, the first is the agent's own.
                with np.load(tmp_path / f"asked-{step // 5 + 2}.npz") as asked:
                    np.testing.assert_array_equal(asked["observation/state"], environment.state(), err_msg=str(step))
                    if step % 100 == 0:
                        for name in ("image", "wrist_image"):
                            seen = environment.frame("full_image" if name == "image" else name)
                            assert np.array_equal(asked[f"observation/{name}"], resize_with_padding(seen, 224))
            environment.step(actions[step].tolist())
