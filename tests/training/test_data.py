"""Data that people bring: one dataset or a mixture, checked before any weights are loaded."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_rlds import hand_made, write_by_hand

from prismatic.policy import Policy
from prismatic.training.build import build
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import TrainingData, dataset_specs
from prismatic.training.distributed import Ranks
from prismatic.training.loading import train_batches, val_batches
from prismatic.training.loop import BadInput, finetune, validate
from prismatic.training.preflight import preflight
from prismatic.vla.datasets.mixture import FrameMixture
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.statistics import dataset_statistics

SCRIPT = Path(__file__).resolve().parents[2] / "vla-scripts" / "finetune.py"
ALONE = Ranks(0, 1, torch.device("cpu"))
MIXTURE = "libero_one+franka:2"


@pytest.fixture(scope="module")
def own_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`libero_one` with 5 + 9 frames and 1 of a split `val`, `franka` with 2 x 8 and a gripper of widths. Read only."""
    root = tmp_path_factory.mktemp("own")
    write_by_hand(root, "libero_one", train=[hand_made(12), hand_made(16), hand_made(5)], val=[hand_made(8)])
    widths = [hand_made(15, seed, gripper=(0.08, 0), image_format="PNG") for seed in (1, 2)]
    write_by_hand(root, "franka", train=widths)
    return root


@pytest.fixture
def own_flags(flags, own_root: Path):
    def make(**overrides) -> FinetuneConfig:
        given = {"data_root_dir": own_root, "dataset_name": MIXTURE, "robot": "libero", "gripper": "width:0,0.08"}
        return flags(**{**given, **overrides})

    return make


@pytest.mark.parametrize("width", [0, 7, 10, 15])
def test_any_state_trains_where_none_is_used(flags, tmp_path: Path, width: int):
    episodes = [hand_made(12, seed, gripper=(1, 0), image_format="PNG", state_dim=width) for seed in range(2)]
    write_by_hand(tmp_path, "franka", train=episodes)
    own = {"data_root_dir": tmp_path, "dataset_name": "franka", "robot": "libero", "gripper": "open1"}
    folder = finetune(flags(**own, use_proprio=False, max_steps=1))
    statistics = json.loads((folder / "dataset_statistics.json").read_text())["franka"]
    assert sorted(statistics) == ["action", "num_trajectories", "num_transitions"]
    stored = np.concatenate([episode["steps/action"] for episode in episodes])
    np.testing.assert_allclose(statistics["action"]["mean"], stored.astype(np.float64).mean(0), atol=1e-6)
    with pytest.raises(BadInput, match="steps/observation/state.*or train with --use_proprio False"):
        finetune(flags(**own, run_id_override="other"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"gripper": None},
            "'franka', robot 'libero': nothing says how.* Pass --gripper width:0,0.08 where 0 is closed",
        ),
        ({"gripper": "open1"}, "'franka', robot 'libero': stored values run from 0 to 0.08; 'open1' means 0 to 1"),
        ({"dataset_name": "libero_one", "gripper": "open1"}, "'libero_one', .* run from -1 to 1; 'open1' means 0 to 1"),
        ({"num_images_in_input": 1, "robot": "bridge"}, "'steps/observation/state' .* has 8 values .*'bridge' needs 7"),
    ],
)
def test_what_does_not_fit_is_said_before_any_weights_are_loaded(own_flags, overrides, message):
    given = {"dataset_name": "franka", **overrides}
    with pytest.raises(ValueError, match=message):
        TrainingData(own_flags(**given))


def test_pictures_that_cannot_be_read_are_said_before_any_weights_are_loaded(flags, tmp_path: Path, caplog):
    caplog.set_level("INFO")
    episode = hand_made()
    episode["steps/observation/wrist_image"] = hand_made(image_format="GIF")["steps/observation/wrist_image"]
    write_by_hand(tmp_path, "libero_gif", train=[episode])
    with pytest.raises(BadInput, match="'steps/observation/wrist_image' holds GIF at step 0 .episode 0 of .*tfrecord"):
        finetune(flags(data_root_dir=tmp_path, dataset_name="libero_gif"))
    assert "action head" not in caplog.text
    finetune(flags(data_root_dir=tmp_path, dataset_name="libero_gif", num_images_in_input=1, max_steps=1))
    assert "action head: new" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dataset_name": "libero_one+"}, "'' is no dataset; expected a name, or several as name"),
        ({"dataset_name": "libero_one+missing"}, "no dataset folder .*missing; .* holds franka, libero_one"),
        ({"dataset_name": "libero_one+bridge_orig", "gripper": None, "robot": None}, "robots that differ in cameras"),
        ({"dataset_name": "libero_one+franka", "robot": None}, "unknown dataset 'franka'.*Say --robot"),
        (
            {"dataset_name": "libero_10_no_noops", "gripper": "open1"},
            "--gripper open1: dataset 'libero_10_no_noops' has",
        ),
        ({"gripper": "wide"}, "--gripper 'wide': expected libero"),
    ],
)
def test_bad_mixtures_and_grippers_are_named(own_flags, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        preflight(own_flags(**overrides))


def test_flags_speak_for_the_datasets_of_a_mixture_that_have_no_entry(own_flags):
    specs = dataset_specs(own_flags(dataset_name="libero_10_no_noops:3+libero_own+franka"))
    assert [(spec.name, getattr(spec.map_actions, "name", None), weight) for spec, weight in specs] == [
        ("libero_10_no_noops", "libero", 3.0),
        ("libero_own", "libero", 1.0),
        ("franka", "width:0,0.08", 1.0),
    ]


def test_a_file_speaks_for_the_dataset_that_it_names_or_for_those_without_an_entry(own_flags, tmp_path: Path):
    def grippers(text: str, names: str = "libero_10_no_noops+libero_own+franka", **others: object) -> list[str]:
        (file := tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml").write_text(f"robot: libero\n{text}")
        flags = {"robot": None, "gripper": None, **others}
        specs = dataset_specs(own_flags(dataset_name=names, dataset_spec=file, **flags))
        return [getattr(spec.map_actions, "name", "none") for spec, _ in specs]

    assert grippers("gripper: closed1") == ["libero", "libero", "closed1"]
    named = grippers("name: libero_own\ngripper: closed1", robot="libero", gripper="open1", names="libero_own+franka")
    assert named == ["closed1", "open1"]
    # A file that names the dataset and leaves the gripper open: the flag says it.
    assert grippers("name: libero_own", "libero_own", gripper="open1") == ["open1"]
    assert grippers("name: libero_own", "libero_own+franka", robot="libero", gripper="closed1") == ["closed1"] * 2
    with pytest.raises(ValueError, match=r"--gripper open1: --dataset_spec .* says it; leave one of both out"):
        grippers("name: libero_own\ngripper: closed1", "libero_own", gripper="open1")
    with pytest.raises(ValueError, match=r"--robot aloha: --dataset_spec .* says it; leave one of both out"):
        grippers("name: libero_own\ngripper: closed1", "libero_own", robot="aloha")
    with pytest.raises(ValueError, match="is of dataset 'kitchen', and --dataset_name is 'franka'"):
        grippers("name: kitchen", "franka")
    with pytest.raises(ValueError, match="'libero_10_no_noops' has an entry"):
        grippers("", "libero_10_no_noops")
    with pytest.raises(ValueError, match="unknown keys grippers; known are name, robot"):
        grippers("grippers: open1", "franka")


def test_held_out_episodes_without_a_sample_are_said_before_any_weights_are_loaded(flags, tmp_path: Path):
    write_by_hand(tmp_path, "libero_short", train=[hand_made(12)], validation=[hand_made(7)])
    short = {"data_root_dir": tmp_path, "dataset_name": "libero_short"}
    with pytest.raises(ValueError, match="'libero_short' .split validation. is as long as one chunk of 8 .* 1 has 7"):
        TrainingData(flags(**short, use_val_set=True))
    assert len(TrainingData(flags(**short)).statistics) == 1


def test_frames_without_a_sentence_are_said_before_any_weights_are_loaded(flags, tmp_path: Path):
    episode = {**hand_made(12), "steps/language_instruction": [b""] * 6 + [b"go"] * 6}
    write_by_hand(tmp_path, "libero_gap", train=[episode])
    with pytest.raises(
        ValueError, match="no frame of dataset 'libero_gap' .split train. that has a sentence has a chunk"
    ):
        TrainingData(flags(data_root_dir=tmp_path, dataset_name="libero_gap"))


def test_a_sentence_too_long_for_the_model_is_said_before_the_first_step(flags, tmp_path: Path):
    episode = {**hand_made(12), "steps/language_instruction": [b"go"] * 3 + [b"very long " * 2000] * 9}
    write_by_hand(tmp_path, "libero_long", train=[episode])
    config = flags(data_root_dir=tmp_path, dataset_name="libero_long")
    with pytest.raises(
        BadInput, match="dataset 'libero_long': the instruction takes .* tokens .*shorten it: 'very long"
    ):
        finetune(config)
    assert not (config.run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_is_broken_ends_the_run_in_one_sentence_and_loses_nothing(flags, tmp_path: Path, workers: int):
    good, bad = hand_made(32), hand_made(32)
    bad["steps/observation/image"][17] = bad["steps/observation/image"][17][:300]
    write_by_hand(tmp_path, "libero_cut", train=[bad])
    own = {"data_root_dir": tmp_path, "dataset_name": "libero_cut", "batch_size": 2, "max_steps": 12, "seed": 3}
    own["max_bad_samples"] = 0
    config = flags(**own, num_workers=workers)
    with pytest.raises(
        BadInput, match=r"^libero_cut episode 0 step 17: image of camera 'full_image' at byte \d+"
    ) as told:
        finetune(config)
    assert "\n" not in str(told.value) and "--resume True" in str(told.value)
    steps = len((config.run_dir / "metrics.jsonl").read_text().splitlines())
    assert 0 < steps < 12
    write_by_hand(tmp_path, "libero_cut", train=[good])
    config.resume = "True"
    whole = flags(**own, run_id_override="whole")
    assert losses(finetune(config)) == losses(finetune(whole))


def test_what_is_dropped_and_found_is_told(own_flags, caplog):
    caplog.set_level("INFO")
    TrainingData(own_flags(dataset_name="libero_one", gripper=None, robot=None))
    assert "libero_one: 1 of 4 episodes are shorter than one chunk of 8 actions and are left out" in caplog.text
    assert "gripper: stored -1 to 1, read as libero: 0 (closed) to 1 (open)" in caplog.text


def test_a_mixture_is_drawn_by_weight_and_each_part_scaled_by_its_own_statistics(own_flags, own_root, caplog):
    caplog.set_level("INFO")
    run = build(own_flags(batch_size=6, image_aug=False), ALONE)
    assert isinstance(run.train_data, FrameMixture) and [len(part) for part in run.train_data.parts] == [14, 16]
    batches = list(islice(train_batches(run), 23))
    assert "takes 46 samples: libero_one 14 (30.4%), franka 32 (69.6%)" in caplog.text
    names = [name for batch in batches for name in batch["dataset_names"]]
    for epoch in range(3):
        drawn = names[46 * epoch : 46 * (epoch + 1)]
        assert (drawn.count("libero_one"), drawn.count("franka")) == (14, 32)
    index = RldsIndex.open(own_root, "franka", run.train_data.parts[1].spec)
    assert run.data.statistics["franka"] == dataset_statistics(index)
    parts = run.train_data.parts
    every = {name: {tuple(part.transform.actions(part.frame(i).actions).ravel()) for i in range(len(part))}
             for name, part in zip(("libero_one", "franka"), parts, strict=True)}  # fmt: skip
    for batch in batches:
        for name, actions in zip(batch["dataset_names"], batch["actions"], strict=True):
            assert tuple(actions.numpy().ravel()) in every[name]


def test_validation_goes_over_the_held_out_frames_of_every_part(own_flags):
    run = build(own_flags(use_val_set=True, image_aug=False, val_fraction=0.5), ALONE)
    assert isinstance(run.val_data, FrameMixture) and [len(part) for part in run.val_data.parts] == [1, 8]
    batches = list(val_batches(run, run.val_data)[0])
    names = [name for batch in batches for name in batch["dataset_names"]]
    assert sorted(names) == ["franka"] * 8 + ["libero_one"]
    assert validate(run)[0]["frames"] == 9


def test_a_policy_of_a_mixture_answers_with_the_statistics_of_either(own_flags, own_root):
    folder = finetune(own_flags(max_steps=2))
    stored = json.loads((folder / "dataset_statistics.json").read_text())
    assert list(stored) == ["libero_one", "franka"]
    for name, gripper in (("libero_one", None), ("franka", "width:0,0.08")):
        alone = finetune(own_flags(dataset_name=name, gripper=gripper, max_steps=1, run_id_override=name))
        assert json.loads((alone / "dataset_statistics.json").read_text()) == {name: stored[name]}
    observation = {"full_image": np.zeros((64, 64, 3), np.uint8), "wrist_image": np.ones((64, 64, 3), np.uint8)}
    with pytest.raises(ValueError, match="known: franka, libero_one"):
        Policy.from_pretrained(folder)
    normalised = {}
    for name in stored:
        policy = Policy.from_pretrained(folder, unnorm_key=name)
        state = np.array(stored[name]["proprio"]["mean"])
        actions = policy.act({**observation, "state": state}, "stack the blocks")
        low, high = (np.array(stored[name]["action"][key])[:6] for key in ("q01", "q99"))
        assert actions.shape == (8, 7)
        normalised[name] = 2 * (actions[:, :6] - low) / (high - low + 1e-8) - 1
        assert np.allclose(policy.transform.actions(actions)[:, :6], normalised[name].clip(-1, 1), atol=1e-5)
    assert not np.array_equal(normalised["franka"], normalised["libero_one"]), "states are scaled by their own"


def test_a_resumed_mixture_ends_where_an_unbroken_one_does(own_flags):
    whole = losses(finetune(own_flags(run_id_override="whole")))
    config = own_flags(run_id_override="again", save_freq=2)
    folder = finetune(config)
    assert losses(folder) == whole and len(whole) == 4
    config.resume = "2"  # drops what was told behind step 2, and learns it anew
    assert losses(finetune(config)) == whole
    with pytest.raises(BadInput, match="--dataset_name libero_one: the run in .* had libero_one.franka:2"):
        finetune(own_flags(run_id_override="again", dataset_name="libero_one", gripper=None, resume=True, max_steps=9))
    with pytest.raises(BadInput, match="--gripper width:0.08,0: the run in .* had width:0,0.08"):
        finetune(own_flags(run_id_override="again", gripper="width:0.08,0", resume=True, max_steps=9))


def losses(folder: Path) -> list[float]:
    run = folder.parents[1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_learn_from_a_mixture_what_one_learns(own_flags):
    def launch(processes: int, **overrides) -> list[dict]:
        config = own_flags(run_id_override=f"of{processes}", max_steps=3, use_val_set=True, val_freq=3, **overrides)
        words = [
            word for name, value in vars(config).items() if value is not None for word in (f"--{name}", str(value))
        ]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]

    one, two = launch(1, batch_size=4, val_fraction=0.5), launch(2, batch_size=2, val_fraction=0.5)
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        for name in {"loss", "val_loss", "tokens_kept", "val_frames"} & set(a):
            assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)
