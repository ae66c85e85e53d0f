"""A run on a LeRobot dataset is the run on the RLDS that it was made of."""

import json
from pathlib import Path

import pytest
from fixtures_lerobot import LOSSLESS, write_lerobot

from prismatic.training.loop import BadInput, finetune
from prismatic.vla.datasets.rlds import RldsIndex

DATASET = "libero_tiny_no_noops"


@pytest.mark.parametrize("codec", [None, LOSSLESS])
def test_a_lerobot_dataset_trains_as_the_rlds_that_it_was_made_of(flags, data_root: Path, tmp_path: Path, codec):
    index = RldsIndex.open(data_root, DATASET)
    write_lerobot(tmp_path / "data" / DATASET, index.episodes, "v3.0", codec)
    losses = []
    for number, root in enumerate((data_root, tmp_path / "data")):
        config = flags(data_root_dir=root, run_root_dir=tmp_path / f"runs{number}", max_steps=2, num_workers=number)
        finetune(config)
        losses.append(
            [row["loss"] for row in map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())]
        )
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_another_version_is_refused_before_any_weights_are_read(flags, data_root: Path, tmp_path: Path):
    index = RldsIndex.open(data_root, DATASET)
    write_lerobot(tmp_path / DATASET, index.episodes, changed=lambda info: info | {"codebase_version": "v1.6"})
    with pytest.raises(BadInput, match="version 'v1.6', and v2.0, v2.1, v3.0 are read"):
        finetune(flags(data_root_dir=tmp_path, vla_path="nowhere"))
