"""Other robots than LIBERO's: chosen by flag or by the dataset, stored in the checkpoint, followed by the policy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fixtures_rlds import hand_made, write_by_hand, write_tiny_aloha

from prismatic.policy import Policy
from prismatic.training.loop import BadInput, finetune
from prismatic.training.preflight import preflight
from prismatic.vla.normalization import fit_statistics
from prismatic.vla.robots import ALOHA, RobotSpec

NAME = "two_arms_fold_towel"


@pytest.fixture(scope="module")
def aloha_root(tensorflow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 30 and 31 steps. Read only."""
    root = tmp_path_factory.mktemp("aloha")
    write_tiny_aloha(tensorflow, root, NAME)
    return root


def test_a_policy_of_two_arms_trains_and_acts(flags, aloha_root: Path):
    config = flags(
        data_root_dir=aloha_root, dataset_name=NAME, robot="aloha", num_images_in_input=3, batch_size=2, max_steps=2
    )
    folder = finetune(config)
    stored = json.loads((folder / "config.json").read_text())
    assert RobotSpec.from_json(stored["robot"]) == ALOHA and stored["num_images_in_input"] == 3
    policy = Policy.from_pretrained(folder, dtype="float32")
    assert policy.robot == ALOHA
    rng = np.random.default_rng(0)
    observation = {camera: rng.integers(0, 255, (64, 64, 3), np.uint8) for camera in ALOHA.cameras}
    actions = policy.act({**observation, "state": np.zeros(14)}, "fold the towel")
    assert actions.shape == (25, 14) and np.isfinite(actions).all()
    statistics = policy.norm_stats[NAME]
    np.testing.assert_allclose(
        policy.transform.actions(np.array([statistics["action"]["min"], statistics["action"]["max"]])),
        [[-1.0] * 14, [1.0] * 14],
        atol=1e-6,
    )
    assert all(fit_statistics(np.zeros((2, 14)), None, ALOHA.action_mask, 1)["action"]["mask"])


def test_a_robot_that_a_file_describes_trains_and_acts(flags, tmp_path: Path):
    episode = {
        {"steps/observation/image": "steps/rgb", "steps/action": "steps/command"}.get(name, name): value
        for name, value in hand_made(20, gripper=(0, 0.08), state_dim=5).items()
    }
    write_by_hand(tmp_path, "lab", train=[episode])
    file = tmp_path / "lab.yaml"
    file.write_text(
        "robot: {name: lab_arm, cameras: [front], proprio_dim: 5, action_dim: 7, chunk_length: 6,\n"
        "  action_mask: [true, true, true, true, true, true, false]}\n"
        "image_keys: {front: steps/rgb}\naction_key: steps/command\ngripper: width:0,0.08\n"
    )
    config = flags(
        data_root_dir=tmp_path, dataset_name="lab", dataset_spec=file, num_images_in_input=1, batch_size=2, max_steps=1
    )
    policy = Policy.from_pretrained(finetune(config), dtype="float32", engine="eager")
    assert (policy.robot.name, policy.robot.cameras, policy.robot.proprio_dim) == ("lab_arm", ("front",), 5)
    assert policy.norm_stats["lab"]["action"]["max"][6] == 1.0
    assert policy.act({"front": np.zeros((64, 64, 3), np.uint8), "state": np.zeros(5)}, "stack").shape == (6, 7)
    recorded = json.loads((config.run_dir / "run.json").read_text())["flags"]["dataset_spec"]
    assert recorded["robot"]["name"] == "lab_arm" and recorded["gripper"] == "width:0,0.08"


def test_a_chunk_of_one_action_is_measured(flags, tmp_path: Path):
    write_by_hand(tmp_path, "lab", train=[hand_made(20), hand_made(20)])
    file = tmp_path / "lab.yaml"
    file.write_text(
        "robot: {name: lab_arm, cameras: [front], proprio_dim: 8, action_dim: 7, chunk_length: 1,\n"
        "  action_mask: [true, true, true, true, true, true, false]}\n"
        "image_keys: {front: steps/observation/image}\nstate_key: steps/observation/state\ngripper: libero\n"
    )
    config = flags(
        data_root_dir=tmp_path, dataset_name="lab", dataset_spec=file, num_images_in_input=1, batch_size=2, max_steps=1,
        use_val_set=True, val_fraction=0.5, val_freq=1,
    )  # fmt: skip
    finetune(config)
    told = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["l1_next"]) for line in told if "l1_next" in line)
    [measured] = [line for line in told if "val_loss" in line]
    assert all(np.isfinite(value) for value in measured.values() if isinstance(value, float))


def test_a_head_made_for_another_robot_is_not_retrained(flags, aloha_root: Path, small_policy_directory: Path):
    config = flags(
        vla_path=str(small_policy_directory), data_root_dir=aloha_root, dataset_name=NAME, robot="aloha",
        num_images_in_input=2,
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"made for robot 'libero' \(cameras .* is of 'aloha'"):
        finetune(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"robot": "spot"}, "unknown robot 'spot'; known: aloha, bridge, libero"),
        ({"robot": "aloha", "dataset_name": "libero_10_no_noops"}, "is of robot 'libero'; leave the flag out"),
        ({"dataset_name": NAME}, "unknown dataset 'two_arms_fold_towel'.*Say --robot"),
        ({"robot": "bridge", "num_images_in_input": 2}, "cannot serve 2 images"),
    ],
)
def test_robots_that_do_not_fit_are_named(flags, overrides, message):
    with pytest.raises(ValueError, match=message):
        preflight(flags(**overrides))


def test_a_head_made_for_another_chunk_is_not_retrained(flags, small_policy_directory: Path, tmp_path: Path):
    folder = shutil.copytree(small_policy_directory, tmp_path / "other-chunk")
    config = json.loads((folder / "config.json").read_text())
    config["robot"]["chunk_length"] = 10
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"made for robot 'libero' \(chunk_length 10\).* \(chunk_length 8\)"):
        finetune(flags(vla_path=str(folder)))
