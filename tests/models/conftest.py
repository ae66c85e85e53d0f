"""Fixtures of several tests of models."""

from pathlib import Path

import pytest

from lightvla.demo.small_model import SmallModelConfig, build


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Small checkpoints without queries, with one ViT and with two."""
    return {
        fused: build(
            SmallModelConfig(
                tmp_path_factory.mktemp("star") / "base", image_size=64, vision_dim=32, vision_depth=4, vision_heads=2,
                llm_dim=32, llm_layers=3, llm_heads=2, llm_mlp=48, fused=fused,
            )
        )
        for fused in (False, True)
    }  # fmt: skip
