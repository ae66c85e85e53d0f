"""Pictures of what the pruner keeps while it is trained: that they are true, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.checkpoints.saving import load_training_state
from prismatic.policy import Policy
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import BadInput, finetune
from prismatic.vla.datasets.entries.spec_file import find_dataset_spec
from prismatic.vla.datasets.rlds import RldsIndex


def looks(config: FinetuneConfig) -> list[dict[str, Any]]:
    return json.loads((config.run_dir / "pictures" / "pictures.json").read_text())


def masks(look: dict[str, Any]) -> np.ndarray:
    rows = [np.frombuffer(bytes.fromhex(text), np.uint8) for text in look["kept"]]
    return np.array([np.unpackbits(row, count=look["visual_tokens"]) for row in rows], dtype=bool)


@pytest.mark.parametrize("overrides", [{}, {"use_lora": True, "lora_rank": 4, "ema_decay": 0.5}], ids=["full", "lora"])
def test_pictures_show_what_the_saved_policy_keeps(flags, data_root: Path, overrides):
    config = flags(max_steps=4, picture_freq=2, save_freq=2, use_val_set=True, batch_size=3, **overrides)
    finetune(config)
    found = looks(config)
    assert [look["step"] for look in found] == [0, 2, 4]
    index = RldsIndex.open(data_root, config.dataset_name, find_dataset_spec(config.dataset_name), True)
    for look in found[1:]:
        policy = Policy.from_pretrained(config.checkpoint_dir(look["step"]), dtype="float32", engine="eager")
        observations = []
        for frame in look["frames"]:
            episode = index.episodes[frame["episode"]]
            observation = {camera: episode.image(camera, frame["step"]) for camera in policy.robot.cameras[:2]}
            observations.append({**observation, "state": episode.state[frame["step"]]})
        instructions = [frame["instruction"] for frame in look["frames"]]
        kept = policy.act_batch(observations, instructions, seeds=range(len(observations))).selection.kept().numpy()
        assert np.array_equal(masks(look), kept)
        assert look["tokens_kept"] == kept.reshape(len(kept), 2, -1).sum(-1).tolist()


def test_a_run_is_the_same_with_pictures_and_a_resumed_one_draws_the_later_ones_again(flags):
    with_pictures = flags(run_id_override="seen", max_steps=4, picture_freq=1, picture_frames=2, save_freq=2)
    without = flags(run_id_override="unseen", max_steps=4, picture_freq=0)
    states = [load_training_state(finetune(config)) for config in (with_pictures, without)]
    trained = [state["parameters"] for state in states]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[1])
    assert not (without.run_dir / "pictures").exists()
    before = looks(with_pictures)
    assert [look["step"] for look in before] == [0, 1, 2, 3, 4]
    (with_pictures.run_dir / "pictures" / "kept" / "step_00000009.webp").touch()  # of a run that went further
    finetune(flags(run_id_override="seen", max_steps=4, picture_freq=2, picture_frames=2, resume="2"))
    folder = with_pictures.run_dir / "pictures"
    assert looks(with_pictures) == [look for look in before if look["step"] != 3]
    files = sorted(str(file.relative_to(folder)) for file in (folder / "kept").iterdir())
    assert files == [look["file"] for look in looks(with_pictures)]
    with Image.open(folder / "strip.webp") as strip, Image.open(folder / files[0]) as picture:
        assert strip.width > 4 * 176 and picture.height > 2 * 224
    assert (folder / "kept.mp4").stat().st_size > 1000


def test_a_picture_that_cannot_be_written_costs_no_checkpoint(flags, caplog):
    config = flags(max_steps=2, picture_freq=1)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "pictures").write_text("in the way, as a full disk is")
    assert finetune(config).is_dir()
    assert "pictures of what is kept are missing or old" in caplog.text


@pytest.mark.parametrize("overrides", [{"pruner": "none", "picture_freq": 1}, {"picture_freq": 3}])
def test_where_there_is_nothing_to_see_nothing_is_drawn(flags, overrides):
    config = flags(max_steps=1, **overrides)
    finetune(config)
    assert not (config.run_dir / "pictures").exists()


@pytest.mark.parametrize("flag", ["picture_freq", "picture_frames"])
def test_numbers_that_mean_nothing_are_refused(flags, flag):
    with pytest.raises(BadInput, match=f"--{flag} -1: expected"):
        finetune(flags(**{flag: -1}))
