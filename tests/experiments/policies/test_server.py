"""Policies behind a server, as rollouts see them: real sockets, the real simulator, a real policy."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image
from policy_server import serving
from served_policy import served, serving_process

from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.evaluation.command import UNUSABLE, main
from experiments.robot.libero.policies.choice import make_agent
from experiments.robot.libero.policies.contract import PolicyQuery
from experiments.robot.libero.policies.local import PolicyAgent
from experiments.robot.libero.policies.server import (
    RemoteAgent,
    resize_with_padding,
    stage_milliseconds,
    to_policy_gripper,
)
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.rollouts.rollout import RolloutSettings, run_episode
from experiments.robot.libero.rollouts.start import Start
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.simulator.environment import LiberoEnvironment
from experiments.robot.libero.simulator.tasks import load_task
from prismatic.policy import Policy
from prismatic.serving.client import PolicyServerError, Reply
from prismatic.vla.robots import LIBERO

CHUNK = 10


class Scripted:
    """Notes what it is sent; returns chunks whose actions are known, with a gripper between -1 and 1, float32."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        rng = np.random.default_rng(3)
        self.actions = rng.uniform(-0.6, 0.6, (60, 7)).astype(np.float32)
        self.actions[:, 6] = rng.choice([-1, -0.3, -1e-20, 0, 1e-20, 0.02, 0.7, 1], 60).astype(np.float32)

    def __call__(self, observation: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(observation)
        # The first request is the agent's own; after that 5 actions of each chunk are executed.
        first = 5 * max(len(self.seen) - 2, 0)
        return {"actions": self.actions[first : first + CHUNK], "policy_timing": {"infer_ms": 1.0}}


@contextmanager
def remote(infer: Callable[[Any], Any], metadata: Any = None, **options: Any) -> Iterator[RemoteAgent]:
    with serving(infer, metadata) as url:
        agent = RemoteAgent(url, **options)
        try:
            yield agent
        finally:
            agent.close()


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(load_task("libero_goal", 1), resolution=64, renderer="fast", settle_steps=2) as environment:
        yield environment


@pytest.fixture
def start() -> Start:
    task = load_task("libero_goal", 1)
    return Start(task=task, instruction=task.language, initial_state=3, trial=0, seed=7)


def test_an_openpi_server_is_asked_as_openpi_s_example_asks(environment: LiberoEnvironment, start: Start) -> None:
    environment.reset(start.initial_state, seed=start.seed)
    first_observation = environment.observe()
    scripted = Scripted()
    with remote(scripted) as agent:
        assert (agent.robot.open_loop_steps, agent.robot.chunk_length) == (5, CHUNK)
        record = run_episode(environment, agent, start, RolloutSettings(max_steps=10, open_loop_steps=5))
    assert record.invalid is None and record.steps == 10 and len(scripted.seen) == 3
    keys = {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert all(set(seen) == keys for seen in scripted.seen)
    probe, query = scripted.seen[:2]
    assert query["prompt"] == "put the bowl on the stove"
    for name, camera in (("observation/image", "full_image"), ("observation/wrist_image", "wrist_image")):
        enlarged = Image.fromarray(first_observation[camera]).resize((224, 224), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(query[name], np.asarray(enlarged))
        assert query[name].dtype == np.uint8 and probe[name].shape == (224, 224, 3)
    assert query["observation/state"].dtype == np.float64
    np.testing.assert_array_equal(query["observation/state"], first_observation["state"])
    assert record.tokens_kept == [] and set(record.stage_ms) == {"total", "server"}
    for total, server in zip(record.stage_ms["total"], record.stage_ms["server"], strict=True):
        assert 0 < server < total
    assert record.policy_ms == record.stage_ms["server"]  # the network's time is no policy's


def test_the_simulator_does_what_the_server_s_own_numbers_would_make_it_do(
    environment: LiberoEnvironment, start: Start
) -> None:
    """As openpi's example does: the server's actions go to the simulator as they are. Every joint agrees to the bit."""
    scripted = Scripted()
    environment.reset(start.initial_state, seed=start.seed)
    for action in scripted.actions[:50]:
        environment.step(action.tolist())
    expected = environment.data.qpos.copy()
    with remote(scripted) as agent:
        record = run_episode(environment, agent, start, RolloutSettings(max_steps=50, open_loop_steps=5))
    assert record.invalid is None and record.steps == 50
    np.testing.assert_array_equal(environment.data.qpos, expected)


@pytest.mark.parametrize("gripper", [-1.0, -0.5, -1e-300, 0.0, 1e-300, 0.02, 1.0, 3.0])
def test_the_gripper_keeps_its_sign_on_the_way_through_the_policy_s_convention(gripper: float) -> None:
    action = to_policy_gripper(np.array([[0.1] * 6 + [gripper]]))[0]
    assert action[6] in (0.0, 0.5, 1.0)
    assert -np.sign(2.0 * action[6] - 1.0) == np.sign(gripper)  # what `step_policy` passes on
    np.testing.assert_array_equal(action[:6], [0.1] * 6)


@pytest.mark.parametrize(("shape", "inner"), [((100, 50), (224, 112)), ((48, 64), (168, 224)), ((7, 300), (5, 224))])
def test_pictures_are_padded_in_proportion(shape: tuple[int, int], inner: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    padded = resize_with_padding(image, 224)
    rows, columns = (np.flatnonzero(padded.any(axis=(2, axis))) for axis in (1, 0))
    assert padded.shape == (224, 224, 3) and (len(rows), len(columns)) == inner
    assert rows[0] == (224 - inner[0]) // 2 and columns[0] == (224 - inner[1]) // 2
    assert (padded[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 200).all()


def test_a_policy_behind_a_server_acts_as_it_does_here(
    environment: LiberoEnvironment, start: Start, untrained_checkpoint: Path
) -> None:
    policy = Policy.from_pretrained(untrained_checkpoint)
    settings = RolloutSettings(max_steps=16, open_loop_steps=4)
    local = PolicyAgent(policy)
    here = run_episode(environment, local, start, settings)
    with served(policy) as server, closing(RemoteAgent(server.url)) as agent:
        assert (agent.robot, agent.cameras, agent.center_crop) == (local.robot, local.cameras, local.center_crop)
        there = run_episode(environment, agent, start, settings)
        description = agent.description()
        query = PolicyQuery(environment.observe(), "go", seed=5)
        chunks = [*agent.query([query]), *local.query([query])]
    assert here.invalid is None and there.invalid is None
    assert here.actions_sha256 == there.actions_sha256 and len(there.latency_ms) == 4
    assert here.tokens_kept == there.tokens_kept and there.num_visual_tokens == 98
    np.testing.assert_array_equal(chunks[0].actions, chunks[1].actions)
    assert chunks[0].kept is not None and chunks[1].kept is not None
    np.testing.assert_array_equal(chunks[0].kept, chunks[1].kept)
    assert json.loads(json.dumps(description)) == description
    assert description["policy_convention"] == "lightvla" and description["policy_url"].startswith("ws://127.0.0.1:")
    assert description["pruner"] == policy.description()["pruner"]
    assert description["server_metadata"]["policy"]["unnorm_key"] == "libero_goal_no_noops"


@pytest.mark.slow
def test_an_evaluation_through_a_server_process_repeats_the_local_one(
    untrained_checkpoint: Path, tmp_path: Path
) -> None:
    flags = {"initial_states": "30", "wide_starts_m": 0.06, "task_ids": "1,8", "env_img_res": 64, "control": "none"}
    flags |= {"renderer": "fast", "num_open_loop_steps": 4}
    local = config(**flags, pretrained_checkpoint=str(untrained_checkpoint), output_dir=str(tmp_path / "local"))
    assert main(local, ["eval"]) == 0
    # Alone, as it is here: in a batch the last digits may be others.
    with serving_process(untrained_checkpoint, "--max_batch_size", "1") as (_, url):
        assert main(config(**flags, policy_url=url, output_dir=str(tmp_path / "remote")), ["eval"]) == 0
    here, there = (Results.load(tmp_path / name).episodes for name in ("local", "remote"))
    assert len(here) == len(there) == 2
    for one, other in zip(here, there, strict=True):
        assert one.actions_sha256 is not None and one.actions_sha256 == other.actions_sha256
        assert (one.success, one.steps, one.tokens_kept) == (other.success, other.steps, other.tokens_kept)


def test_several_queries_at_once_keep_their_order() -> None:
    def infer(observation: dict[str, Any]) -> dict[str, Any]:
        return {"actions": np.full((2, 7), float(observation["observation/state"][0]))}

    pictures = {key: np.zeros((64, 64, 3), np.uint8) for key in LIBERO.cameras}
    with remote(infer) as agent:
        chunks = agent.query([PolicyQuery({**pictures, "state": np.full(8, k)}, "go") for k in range(5)])
    assert [chunk.actions[0, 0] for chunk in chunks] == [0, 1, 2, 3, 4]


def standing_still(_: Any) -> dict[str, Any]:
    return {"actions": np.zeros((8, 7))}


@pytest.mark.parametrize(
    ("served", "asked", "expected", "words"),
    [
        ({}, None, "openpi", "names no convention: openpi's"),
        ({"convention": "lightvla"}, None, "lightvla", "names no robot"),
        ({"convention": "openpi"}, None, "openpi", "gripper"),
        ({"convention": "openpi"}, "lightvla", "lightvla", "although the server names 'openpi'"),
        ({"convention": "strange"}, "openpi", "openpi", "although the server names 'strange'"),
        ({"convention": ["openpi"]}, "openpi", "openpi", r"although the server names ['openpi']"),
    ],
)
def test_flag_and_metadata_choose_the_convention(
    served: dict[str, Any], asked: str | None, expected: str, words: str
) -> None:
    with remote(standing_still, served, convention=asked) as agent:
        description = agent.description()
    assert agent.convention == description["policy_convention"] == expected
    assert any(words in assumption for assumption in description["assumptions"])


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"convention": "strange"}, "names the convention 'strange'; known: openpi, lightvla"),
        ({"convention": "lightvla", "robot": {"colour": "red"}}, "unusable metadata: .*colour"),
        ({"convention": "lightvla", "robot": {"name": "bridge", "proprio_dim": 7}}, "drives robot 'bridge'"),
        ({"convention": "lightvla", "cameras": ["left_wrist_image"]}, "left_wrist_image"),
        ({"convention": ["lightvla"]}, r"names the convention \['lightvla'\]; known"),
        ({"convention": np.array(["lightvla", "openpi"])}, "names the convention array"),
        ({"convention": "lightvla", "cameras": [["full_image"]]}, r"cameras is \[\['full_image'\]\]; expected a list"),
        ({"convention": "lightvla", "cameras": []}, r"cameras is \[\]; expected a list of one or more"),
        ({"convention": "lightvla", "cameras": "full_image"}, "cameras is 'full_image'; expected a list"),
        ({"convention": "lightvla", "cameras": ["full_image"] * 2}, "each once"),
        ({"convention": "lightvla", "center_crop": "no"}, "center_crop is 'no'; expected true or false"),
        ({"convention": "lightvla", "robot": {"name": "x", "cameras": [["a"]]}}, r"cameras is \(\['a'\],\)"),
        ({"convention": "lightvla", "robot": {"name": "x", "control_rate_hz": np.nan}}, "control_rate_hz is nan"),
        ({"convention": "lightvla", "robot": {"name": "x", "open_loop_steps": "5"}}, "open_loop_steps is '5'"),
        ({"convention": "lightvla", "robot": {"name": "x", "open_loop_steps": 0}}, "expected 1 or more"),
        ({"convention": "lightvla", "robot": {"name": "x", "proprio_dim": np.arange(2)}}, "proprio_dim is array"),
        ({"convention": "lightvla", "robot": ["name"]}, "has unusable metadata"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "S0", b"shape": [10**13]}), "greeted with not a"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(metadata: Any, words: str) -> None:
    with pytest.raises(PolicyServerError, match=words), remote(standing_still, metadata):
        pass


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"action": np.zeros((8, 7))}, r"returned no actions but \['action', 'server_timing'\]"),
        ({"actions": np.zeros((8, 6))}, r"float64 \(8, 6\); expected numbers \(horizon, 7\)"),
        ({"actions": np.zeros((8, 14))}, r"float64 \(8, 14\); expected numbers \(horizon, 7\)"),
        ({"actions": np.zeros(7)}, r"float64 \(7,\); expected"),
        ({"actions": np.zeros((1, 8, 7))}, r"float64 \(1, 8, 7\); expected"),
        ({"actions": np.zeros((0, 7))}, "no action at all"),
        ({"actions": [[1.0] * 7, [1.0] * 6]}, "unusable actions"),
        ({"actions": "forward"}, "expected numbers"),
        ({"actions": np.where(np.arange(14) == 9, np.nan, 0.0).reshape(2, 7)}, r"NaN or infinity, first at \[1, 2\]"),
        ({"actions": np.zeros((8, 7)), "kept": np.zeros(98)}, r"kept as float64 \(98,\); expected bool"),
        ({"actions": np.zeros((8, 7)), "kept": np.ones(98, bool), "picks": np.ones(3)}, "picks of shape"),
        ({"actions": np.zeros((8, 7)), "kept": [[True], [True, False]]}, "unusable kept or picks"),
        ({"actions": np.zeros((8, 7)), "kept": np.ones(98, bool), "picks": "many"}, "unusable kept or picks"),
    ],
)
def test_replies_that_cannot_be_used_are_refused_before_the_first_rollout(reply: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyServerError, match=words), remote(lambda _: reply):
        pass


def strict(value: Any) -> Any:
    """Through JSON as it is defined, which has neither NaN nor infinity."""
    return json.loads(json.dumps(value, allow_nan=False))


def test_times_that_are_no_finite_numbers_are_left_out() -> None:
    times = {"a": np.nan, "b": np.inf, "c": "5", "d": True, "e": np.bool_(True), "f": None, "g": [1.0], "h": 10**400}
    times |= {"infer_ms": np.float32(1.5), "vision_ms": np.int64(2), "llm_ms": 3, "prev_total_ms": 4.0, "total": 5.0}
    stages = stage_milliseconds(Reply({"server_timing": times}, 0.006))
    assert strict(stages) == stages == {"total": 6.0, "server": 1.5, "vision": 2.0, "llm": 3.0}
    for nothing in (None, "fast", [1.0]):
        assert stage_milliseconds(Reply({"server_timing": nothing}, 0.006)) == {"total": 6.0}


def test_metadata_becomes_json_whatever_it_holds() -> None:
    odd = {
        "loss": np.nan,
        "best": np.array([1.0, -np.inf]),
        "size": np.float32(0.5),
        "raw": b"x",
        b"7": [np.int8(3), np.nan],
    }
    with remote(standing_still, {"policy": odd, "fine": True}) as agent:
        description = agent.description()
    expected = {"loss": "nan", "best": [1.0, "-inf"], "size": 0.5, "raw": "b'x'", "b'7'": [3, "nan"]}
    assert strict(description)["server_metadata"] == {"policy": expected, "fine": True}
    assert description["loss"] == "nan"


def test_an_error_during_a_rollout_is_invalid_and_the_next_rollout_goes_on(
    environment: LiberoEnvironment, start: Start
) -> None:
    chunks = iter([8, 8, 0, 3, 8, 8])

    def infer(_: Any) -> dict[str, Any]:
        if not (length := next(chunks)):
            raise RuntimeError("out of memory")
        return {"actions": np.zeros((length, 7))}

    settings = RolloutSettings(max_steps=10, open_loop_steps=5)
    with remote(infer) as agent:
        broken, short, good = (run_episode(environment, agent, start, settings) for _ in range(3))
    assert broken.invalid is not None and broken.success is None and broken.steps == 5
    assert broken.invalid.strip().endswith("answered with an error: RuntimeError: out of memory")
    assert short.invalid is not None and short.invalid.strip().endswith("returned 3 actions; expected 8, as at first")
    assert good.invalid is None and good.success is False and good.steps == 10


def config(**flags: Any) -> EvaluationConfig:
    return EvaluationConfig(**{"task_suite_name": "libero_goal", "control": "blank_images", **flags})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pretrained_checkpoint": "x", "pruner": "none"}, "--pretrained_checkpoint, --pruner: for a checkpoint"),
        ({"use_film": True}, "--use_film"),
        ({"load_in_8bit": True}, "--load_in_8bit"),
        ({"use_l1_regression": False}, "--use_l1_regression"),
        ({"device": "cpu"}, "--device"),
        ({"control": "random_tokens"}, "needs the policy in this process"),
        ({"control": "added_tokens"}, "--control added_tokens needs the policy in this process"),
        ({"control": "dropped_tokens"}, "--control dropped_tokens needs the policy in this process"),
        ({"policy_timeout_s": 0.0}, "--policy_timeout_s 0.0: expected seconds"),
        (
            {"policy_timeout_s": float("inf")},
            "--policy_timeout_s inf: expected seconds, more",
        ),
        ({"policy_url": None, "pretrained_checkpoint": "x", "policy_convention": "openpi"}, "--policy_convention is"),
        (
            {"policy_url": None, "pretrained_checkpoint": "x", "policy_timeout_s": 0.0},
            "--policy_timeout_s 0.0: expected",
        ),
        ({"policy_url": None}, "--pretrained_checkpoint is missing"),
    ],
)
def test_flags_of_checkpoints_and_servers_do_not_mix(flags: dict[str, Any], words: str) -> None:
    check_flags(config(policy_url="ws://localhost:8000", model_family="pi0", num_open_loop_steps=5))
    with pytest.raises(ValueError, match=words):
        check_flags(config(**{"policy_url": "ws://localhost:8000", **flags}))


def test_unknown_conventions_and_chunks_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown --policy_convention 'pi'; known: openpi, lightvla"):
        make_agent(config(policy_url="ws://localhost:1", policy_convention="pi"))
    with serving(lambda _: {"actions": np.zeros((4, 7))}) as url:
        with pytest.raises(ValueError, match="5 actions of each chunk .* returns 4; give --num_open_loop_steps 4"):
            make_agent(config(policy_url=url))
        agent = make_agent(config(policy_url=url, num_open_loop_steps=4))
        assert isinstance(agent, RemoteAgent) and agent.robot.chunk_length == 4
        agent.close()


def test_the_command_says_in_one_line_that_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}"
    assert main(config(policy_url=url, task_ids="1"), ["eval"]) == UNUSABLE
    output = " ".join(capsys.readouterr().err.split())
    assert f"error: no policy server at {url}" in output and "start the server" in output
    assert "Traceback" not in output
