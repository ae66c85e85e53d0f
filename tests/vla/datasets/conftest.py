"""A tiny dataset that these tests share; read only."""

from dataclasses import replace
from pathlib import Path

import pytest
from fixtures_rlds import write_tiny_rlds

from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.statistics import dataset_statistics
from prismatic.vla.prompt import TokenIds
from prismatic.vla.robots import LIBERO
from prismatic.vla.transform import PixelSpec, PolicyTransform

NAME = "libero_tiny_no_noops"


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes of 12, 13 and 14 steps."""
    root = tmp_path_factory.mktemp("rlds")
    write_tiny_rlds(root, NAME)
    return root


@pytest.fixture
def tiny_index(tiny_root: Path) -> RldsIndex:
    return RldsIndex.open(tiny_root, NAME)


@pytest.fixture
def transform(tiny_index: RldsIndex) -> PolicyTransform:
    """Two cameras at 48 px for two ViTs; one token per character."""
    pixels = PixelSpec(48, ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6)), ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4)))
    return PolicyTransform(LIBERO, pixels, _characters, TokenIds(), dataset_statistics(tiny_index))


@pytest.fixture
def one_camera(transform: PolicyTransform) -> PolicyTransform:
    return replace(transform, num_images=1)


def _characters(text: str) -> list[int]:
    return [ord(character) for character in text]
