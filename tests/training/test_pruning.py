import numpy as np
import pytest
import torch

from prismatic.models.pruners.registry import PrunerSpec, resolve_pruner
from prismatic.training.pruning import NOISE_STREAM, score_noise


def draw(kind: str, positions: list[int], scale: float = 1.0, seed: int = 7, tokens: int = 6) -> torch.Tensor:
    noise = score_noise(kind, seed, torch.tensor(positions), tokens, scale)
    assert noise is not None
    return noise


def test_a_sample_gets_the_same_noise_wherever_it_stands_in_a_batch():
    together = draw("uniform", [40, 41, 42, 43])
    assert torch.equal(together[2:], draw("uniform", [42, 43]))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, draw("uniform", [40, 41, 42, 43], seed=8))


def test_uniform_noise_fills_zero_to_scale():
    noise = draw("uniform", list(range(8)), scale=0.25, tokens=64)
    assert noise.shape == (8, 64, 64) and noise.dtype == torch.float32
    assert 0 <= noise.min() < 1e-3 and 0.249 < noise.max() < 0.25
    assert noise.mean().item() == pytest.approx(0.125, abs=2e-3)


def test_gumbel_noise_has_the_moments_of_a_gumbel():
    noise = draw("gumbel", list(range(8)), tokens=128)
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)


def test_learnable_queries_get_their_own_number_of_rows_and_one_per_token_the_stream_it_always_had():
    positions = torch.tensor([40, 41])
    few = score_noise("uniform", 7, positions, 6, 1.0, num_queries=2)
    all_rows = draw("uniform", [40, 41])
    assert few is not None and few.shape == (2, 2, 6)
    assert torch.equal(few, all_rows[:, :2])
    expected = np.random.default_rng([7, 40, NOISE_STREAM]).random((6, 6), dtype=np.float32)
    assert np.array_equal(all_rows[0].numpy(), expected)


def test_the_recorded_pruner_says_everything():
    other = {"name": "lightvla", "multiplicity": "weighted", "min_tokens": 9}
    spec = resolve_pruner("lightvla_star:site=llama,layer=2", other, "training")
    assert spec.to_json() == {
        "name": "lightvla_star", "site": "llama", "layer": 2, "queries": 128, "min_tokens": 0, "noise": "uniform"
    }  # fmt: skip
    trained = PrunerSpec("lightvla_star", {**spec.options, "queries": 9, "noise": "gumbel"})
    assert resolve_pruner(None, trained.to_json(), "training") == trained
    moved = resolve_pruner("lightvla_star:site=projector,min_tokens=3", trained.to_json(), "training")
    assert moved.options == {"site": "projector", "queries": 9, "min_tokens": 3, "noise": "gumbel"}
    assert (moved.noise, moved.num_queries) == ("gumbel", 9)


def test_no_noise_is_none_and_an_unknown_kind_is_named():
    positions = torch.tensor([0])
    assert score_noise("none", 7, positions, 4, 1.0) is None
    assert score_noise("uniform", 7, positions, 4, 0.0) is None
    with pytest.raises(ValueError, match="'normal'.*uniform, gumbel or none"):
        score_noise("normal", 7, positions, 4, 1.0)
