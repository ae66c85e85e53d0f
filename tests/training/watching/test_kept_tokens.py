"""Pictures of what the pruner keeps while it is trained: of which frames, that they are true, and what becomes of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prismatic.policy import Policy
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import TrainingData
from prismatic.training.loop import finetune
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
