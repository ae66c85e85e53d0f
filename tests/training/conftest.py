"""A tiny dataset and the flags of a short run on it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures_rlds import write_tiny_rlds

from prismatic.training.config import FinetuneConfig

DATASET = "libero_tiny_no_noops"


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one tiny RLDS dataset: 4 episodes, 38 frames with a whole chunk ahead. Read only."""
    root = tmp_path_factory.mktemp("rlds")
    write_tiny_rlds(root, DATASET, episodes=4, steps=15, size=64)
    return root


@pytest.fixture
def flags(small_base: Path, data_root: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    """Makes the configuration of a short, exact CPU run; keyword arguments override flags."""

    def make(**overrides: Any) -> FinetuneConfig:
        defaults: dict[str, Any] = {
            "vla_path": str(small_base), "data_root_dir": data_root, "dataset_name": DATASET,
            "run_root_dir": tmp_path / "runs", "run_id_override": "run", "num_images_in_input": 2, "use_proprio": True,
            "batch_size": 4, "learning_rate": 1e-3, "max_steps": 4, "save_freq": 100, "log_freq": 1, "use_lora": False,
            "device": "cpu", "precision": "fp32", "num_workers": 0, "report_minutes": 0.0,
        }  # fmt: skip
        return FinetuneConfig(**{**defaults, **overrides})

    return make
