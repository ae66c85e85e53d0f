"""Fixtures that many tests share: real small models and checkpoints, built once per session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, as our commands do: its idle threads must not take the cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import tensorflow_process
import torch
from reference_checkpoint import write_original_checkpoint, write_reference_checkpoint

from lightvla.demo.small_model import SmallModelConfig, build
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.vla.normalization import fit_statistics


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in the published layout on which the reference's numbers were recorded. Read only."""
    return write_reference_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint")


@pytest.fixture(scope="session")
def original_directory(reference_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as the original OpenVLA publishes one, which decodes token by token. Read only."""
    return write_original_checkpoint(reference_directory, tmp_path_factory.mktemp("original") / "checkpoint")


@pytest.fixture(scope="session")
def reference_numbers() -> dict[str, np.ndarray]:
    """Numbers recorded from the reference on `reference_directory`."""
    with np.load(Path(__file__).parent / "data" / "reference.npz") as data:
        return dict(data)


@pytest.fixture
def reference_checkpoint(reference_directory: Path) -> Checkpoint:
    """A fresh copy in float32 with the LightVLA pruner over a set, as the reference infers."""
    spec = PrunerSpec("lightvla", {"multiplicity": "set"})
    return load_checkpoint(reference_directory, LoadOptions(dtype=torch.float32, pruner=spec))


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint as `scripts/build_small_model.py` writes it, even smaller. Read only."""
    sizes = SmallModelConfig(
        output_dir=tmp_path_factory.mktemp("small") / "base", image_size=64, vision_dim=32, vision_depth=2, llm_dim=32,
        llm_layers=2, llm_heads=2, llm_mlp=64, vision_heads=2,
    )  # fmt: skip
    return build(sizes)


@pytest.fixture(scope="session")
def small_policy_directory(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint with a random head, proprio projector and statistics, for `Policy`. Read only."""
    torch.manual_seed(1)
    checkpoint = load_checkpoint(small_base)
    checkpoint.action_head = L1RegressionActionHead(32, 7, 8)
    checkpoint.proprio_projector = ProprioProjector(32, 8)
    rng = np.random.default_rng(0)
    statistics = fit_statistics(
        rng.uniform(-1, 1, (50, 7)), rng.uniform(-1, 1, (50, 8)), checkpoint.model.robot.action_mask, 2
    )
    checkpoint.dataset_statistics = {"libero_test_no_noops": statistics}
    checkpoint.model.config.center_crop = True
    return save_checkpoint(tmp_path_factory.mktemp("policy") / "small--0_chkpt", checkpoint, 0)


@pytest.fixture(scope="session")
def tensorflow() -> Iterator[tensorflow_process.TensorFlow]:
    """Calls functions of `tensorflow_process`, all in one process beside this one."""
    if not tensorflow_process.INSTALLED:
        pytest.skip("TensorFlow or tensorflow-datasets is not installed")
    with tensorflow_process.started() as call:
        yield call


def pytest_collection_finish() -> None:
    _refuse_tensorflow("collecting the tests")


def pytest_runtest_logfinish(nodeid: str) -> None:
    _refuse_tensorflow(nodeid)


def _refuse_tensorflow(where: str) -> None:
    """Ends the session by name of the culprit, before a crash in some later test ends it without a word."""
    if "tensorflow" in sys.modules:
        pytest.exit(
            f"TensorFlow was imported into the process of the tests ({where}), where Mesa's renderer then crashes: "
            "call it through the fixture `tensorflow`",
            returncode=1,
        )
