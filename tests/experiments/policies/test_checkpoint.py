"""What `Policy.from_pretrained` accepts, and what it refuses before it loads anything."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismatic.models.precision import computes_in_bf16
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.policy import Policy
from prismatic.vla.robots import ALOHA, LIBERO

KEY = "libero_test_no_noops"


def observation() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("full_image", "wrist_image")}
    return {**images, "state": np.zeros(8)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"action_readout": "Aligned"}, ValueError, "action_readout 'Aligned' is unknown; known: aligned, tail"),
        ({"center_crop": "yes"}, ValueError, "center_crop 'yes' should be True or False"),
        ({"center_crop": 1}, ValueError, "center_crop 1 should be True or False"),
        ({"dtype": "bf16"}, ValueError, "dtype 'bf16' is unknown; known: auto, bfloat16, float16, float32"),
        ({"dtype": "float32", "torch_dtype": "float32"}, TypeError, "mean the same"),
        ({"robot": "panda"}, ValueError, "unknown robot 'panda'; known: aloha, bridge, libero"),
        ({"robot": {"name": "libero"}}, ValueError, "neither a RobotSpec nor the name of one"),
        ({"device": "gpu"}, ValueError, "device 'gpu' is unknown; known: auto, cpu, cuda, cuda:0"),
        ({"device": "cuda:99"}, ValueError, r"device 'cuda:99': torch sees \d+ GPUs"),
        ({"engine": "fast"}, ValueError, "engine 'fast' is unknown; known: auto, eager, compiled"),
        ({"pruner": 5}, ValueError, "pruner 5: expected a name with options, such as 'lightvla:multiplicity=set'"),
        ({"head": "l2"}, ValueError, "'l2'; known: l1, diffusion, discrete"),
        ({"use_proprio": "no"}, ValueError, "use_proprio 'no' should be True or False"),
        ({"use_film": "no"}, ValueError, "use_film 'no' should be True or False"),
        ({"num_images_in_input": "2"}, ValueError, "num_images_in_input '2' should be a number of images"),
        *(
            ({"num_diffusion_steps_train": steps}, ValueError, f"num_diffusion_steps_train {steps!r}: expected a whole")
            for steps in (-1, 0, "10", 5.5, True)
        ),
        ({"attention": "flash"}, ValueError, "attention 'flash' is unknown; known: sdpa, eager"),
        ({"quantization": "2bit"}, ValueError, "'2bit'; known: 8bit, 4bit"),
        ({"readout": "tail"}, TypeError, "unknown options .'readout'. .*known: device, dtype, .*, robot, .*revision"),
        ({"revision": "main"}, ValueError, "revision='main': .* is a directory, which has none"),
    ],
)
def test_options_that_mean_nothing_are_refused(small_policy_directory, options: dict[str, Any], error: type, message):
    with pytest.raises(error, match=message):
        Policy.from_pretrained(small_policy_directory, **options)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_this_folder(name: str):
    with pytest.raises(ValueError, match="the checkpoint's name is empty; give a directory"):
        Policy.from_pretrained(name)


def test_options_that_are_obvious_are_accepted(small_policy_directory):
    policy = Policy.from_pretrained(
        str(small_policy_directory), torch_dtype="bfloat16", robot="libero", token=None, revision=None,
        center_crop=np.bool_(False), pruner=PrunerSpec("none"), use_proprio=np.bool_(True),
    )  # fmt: skip
    described = policy.description()
    assert policy.robot == LIBERO and described["dtype"] == "bfloat16" and described["pruner"] == "none"
    assert described["center_crop"] is False and policy.act(observation(), "turn on the stove").shape == (8, 7)


def test_a_cpu_computes_in_what_training_would_choose(small_policy_directory, caplog):
    with caplog.at_level("INFO"):
        policies = [Policy.from_pretrained(small_policy_directory, dtype=dtype) for dtype in (None, "auto", "float32")]
    auto = "bfloat16" if computes_in_bf16("cpu") else "float32"
    assert [policy.description()["dtype"] for policy in policies] == [auto, auto, "float32"]
    told = [record.getMessage() for record in caplog.records if "running in" in record.getMessage()]
    reasons = [policy.description()["dtype_reason"] for policy in policies]
    assert "times the speed of float32" in reasons[0] and reasons[2] == "asked for"
    chosen = zip((auto, auto, "float32"), reasons, strict=True)
    assert told == [f"running in {dtype} on cpu ({reason}); dtype chooses another" for dtype, reason in chosen]


def test_bfloat16_and_float32_act_alike(small_policy_directory):
    first, second = (
        Policy.from_pretrained(small_policy_directory, dtype=dtype, pruner="none").act(
            observation(), "turn on the stove"
        )
        for dtype in ("float32", torch.bfloat16)
    )
    np.testing.assert_allclose(first, second, atol=0.1)
    assert not np.array_equal(first, second)


def statistics(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        file = folder / "dataset_statistics.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps(change(content) or content))

    return write


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no state": (
        statistics(lambda s: s[KEY].pop("proprio") and None),
        "statistics of 'libero_test_no_noops' have no part 'proprio'; recompute them",
    ),
    "another length": (
        statistics(lambda s: s[KEY]["action"].update({name: v * 2 for name, v in s[KEY]["action"].items()})),
        "action: min has 14 values, robot 'libero' has 7",
    ),
    "one list longer": (statistics(lambda s: s[KEY]["proprio"]["q99"].append(1.0)), "proprio: q99 has 9 values"),
    "a mask of another length": (statistics(lambda s: s[KEY]["action"]["mask"].pop()), "action: mask has 6 values"),
    "NaN": (
        statistics(lambda s: s[KEY]["action"]["q01"].__setitem__(2, float("nan"))),
        "action: q01 holds NaN or infinity",
    ),
    "reversed": (
        statistics(lambda s: s[KEY]["proprio"].update(min=s[KEY]["proprio"]["max"], max=s[KEY]["proprio"]["min"])),
        "proprio: min lies above max",
    ),
    "words": (statistics(lambda s: s[KEY]["action"].update(q01="low")), "action: q01 is no list of numbers"),
    "no quantiles": (statistics(lambda s: s[KEY]["action"].pop("q99") and None), "q99 missing, which bounds_q99 needs"),
    "not below a name": (statistics(lambda s: s[KEY]), "do not stand below their dataset's name"),
    "a list": (lambda folder: (folder / "dataset_statistics.json").write_text("[]"), "holds a list, expected a JSON"),
    "not text": (lambda folder: (folder / "dataset_statistics.json").write_bytes(b"\xff\x00"), "is no JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_statistics_that_do_not_fit_are_refused_with_the_files_name(small_policy_directory, tmp_path: Path, name: str):
    change, message = BROKEN[name]
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    change(folder)
    for file in folder.glob("model*.safetensors"):
        file.unlink()
        file.touch()
    with pytest.raises(ValueError, match=f"dataset_statistics.json.* {message}"):
        Policy.from_pretrained(folder)


def test_statistics_of_the_state_are_needed_only_where_it_is_read(small_policy_directory, tmp_path: Path):
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    statistics(lambda s: s[KEY].pop("proprio") and None)(folder)
    assert Policy.from_pretrained(folder, use_proprio=False).act(observation(), "turn on the stove").shape == (8, 7)


def test_statistics_in_config_json_are_checked_too(small_policy_directory, tmp_path: Path):
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    (folder / "dataset_statistics.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["norm_stats"][KEY]["action"]["max"][0] = float("inf")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: statistics of .* max holds NaN or infinity"):
        Policy.from_pretrained(folder)


def test_other_datasets_of_a_checkpoint_may_be_of_other_robots(small_policy_directory, tmp_path: Path):
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    statistics(lambda s: s.update(other={"action": {"q01": [0.0] * 14, "q99": [1.0] * 14}}))(folder)
    assert Policy.from_pretrained(folder, unnorm_key=KEY).unnorm_key == KEY
    with pytest.raises(ValueError, match="statistics of 'other', action: min, max missing"):
        Policy.from_pretrained(folder, unnorm_key="other")


def test_a_robot_that_the_statistics_are_not_of_is_refused(small_policy_directory):
    with pytest.raises(ValueError, match="min has 7 values, robot 'aloha' has 14"):
        Policy.from_pretrained(small_policy_directory, robot=ALOHA)


def test_a_recorded_state_without_its_projector_is_refused(small_policy_directory, tmp_path: Path):
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    next(folder.glob("proprio_projector--*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"no proprio_projector--.*, which config.json \(use_proprio\) needs"):
        Policy.from_pretrained(folder)
    assert not Policy.from_pretrained(folder, use_proprio=False).transform.use_proprio


@pytest.mark.parametrize(
    "name", ["config.json", "dataset_statistics.json", "tokenizer.json", "preprocessor_config.json"]
)
def test_a_byte_order_mark_changes_nothing(small_policy_directory, tmp_path: Path, name: str):
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    expected = Policy.from_pretrained(small_policy_directory).act(observation(), "turn on the stove")
    assert np.array_equal(Policy.from_pretrained(folder).act(observation(), "turn on the stove"), expected)


def test_diffusion_steps_of_another_head_are_said_to_be_unused(small_policy_directory, caplog):
    Policy.from_pretrained(small_policy_directory, num_diffusion_steps_train=20)
    said = "num_diffusion_steps_train is of diffusion heads, and .* has a head of kind l1: it is not used"
    assert [bool(re.fullmatch(said, record.getMessage())) for record in caplog.records].count(True) == 1


def test_an_empty_statistics_file_is_said_to_be_in_the_way(small_policy_directory, tmp_path: Path):
    folder = Path(shutil.copytree(small_policy_directory, tmp_path / "policy"))
    (folder / "dataset_statistics.json").write_text("{}")
    with pytest.raises(
        ValueError, match="known: none: dataset_statistics.json, which goes before norm_stats .* is empty"
    ):
        Policy.from_pretrained(folder)
