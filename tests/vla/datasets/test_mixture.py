"""Shares are exact over an epoch, every frame comes before any comes again, and ranks and restarts change nothing."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from prismatic.vla.datasets.dataset import FrameDataset
from prismatic.vla.datasets.mixture import FrameMixture, MixtureOrder, parse_mixture
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.sampler import GlobalBatchSampler, SampleRequest
from prismatic.vla.transform import PolicyTransform

FRAMES, WEIGHTS, DRAWS = [10, 7, 3], [1.0, 0.5, 2.0], [10, 4, 6]


def test_names_and_weights() -> None:
    suites = {f"libero_{suite}_no_noops": 1.0 for suite in ("spatial", "object", "goal", "10")}
    assert parse_mixture("libero_4_task_suites_no_noops") == suites
    assert parse_mixture("kitchen") == {"kitchen": 1.0}
    assert parse_mixture("a+b:0.5+c:2") == {"a": 1.0, "b": 0.5, "c": 2.0}
    assert parse_mixture("libero_4_task_suites_no_noops:3+a") == dict.fromkeys(suites, 3.0) | {"a": 1.0}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a+", "'' is no dataset"),
        ("a+b:", "'b:' is no dataset"),
        ("a+b:0", "'b:0' is no dataset.*name\\+name:weight with positive weights"),
        ("a+b:-1", "'b:-1'"),
        ("a+b:many", "'b:many'"),
        ("a+b:nan", "'b:nan'"),
        ("a+b:inf", "'b:inf'"),
        ("a, b", "'a, b' is no dataset"),
        ("a+b+a:2", "names 'a' twice"),
        ("libero_4_task_suites_no_noops+libero_10_no_noops", "names 'libero_10_no_noops' twice"),
    ],
)
def test_other_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_mixture(name)


def test_every_epoch_takes_exactly_the_shares_that_the_weights_say() -> None:
    order = MixtureOrder(FRAMES, WEIGHTS, seed=3)
    assert order.draws == DRAWS and len(order) == 20
    epochs = [[order.dataset_and_frame(epoch * 20 + k)[0] for k in range(20)] for epoch in range(5)]
    for epoch in epochs:
        assert Counter(epoch) == dict(enumerate(DRAWS))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert MixtureOrder([1000, 3], [1.0, 0.01]).draws == [1000, 1], "no dataset is left out"


def test_a_dataset_goes_through_all_its_frames_before_any_comes_again() -> None:
    order = MixtureOrder(FRAMES, WEIGHTS, seed=3)
    taken: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for position in range(7 * 20):
        dataset, frame = order.dataset_and_frame(position)
        taken[dataset].append(frame)
    for dataset, count in enumerate(FRAMES):
        assert len(taken[dataset]) == 7 * DRAWS[dataset]
        rounds = [taken[dataset][first : first + count] for first in range(0, len(taken[dataset]), count)]
        for whole in rounds[: len(taken[dataset]) // count]:
            assert sorted(whole) == list(range(count))
        assert len(set(rounds[-1])) == len(rounds[-1]) and rounds[0] != rounds[1]


def test_the_order_is_a_function_of_seed_and_position() -> None:
    whole = [MixtureOrder(FRAMES, WEIGHTS, seed=3)(position) for position in range(60)]
    assert len(set(whole)) == sum(FRAMES)
    order = MixtureOrder(FRAMES, WEIGHTS, seed=3)
    backwards = [order(position) for position in reversed(range(60))]
    assert backwards[::-1] == whole
    assert [MixtureOrder(FRAMES, WEIGHTS, seed=4)(position) for position in range(60)] != whole


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_and_restarts_see_what_one_rank_sees(world_size: int) -> None:
    def sampler(batch_size: int, rank: int = 0, ranks: int = 1, start: int = 0) -> GlobalBatchSampler:
        order = MixtureOrder(FRAMES, WEIGHTS, seed=7)
        return GlobalBatchSampler(sum(FRAMES), batch_size, rank, ranks, 7, start, frame_at=order)

    whole = list(islice(sampler(4 * world_size), 12))
    parts = zip(*(islice(sampler(4, rank, world_size), 12) for rank in range(world_size)), strict=True)
    assert [[request for part in step for request in part] for step in parts] == whole
    resumed = islice(sampler(2 * world_size, start=5 * 4 * world_size), 14)
    assert [request for batch in resumed for request in batch] == [r for batch in whole[5:] for r in batch]


def test_samples_are_their_own_datasets(tiny_index: RldsIndex, transform: PolicyTransform) -> None:
    other_index = replace(
        tiny_index,
        spec=replace(tiny_index.spec, name="libero_other"),
        episodes=[replace(episode, action=episode.action * 3) for episode in tiny_index.episodes[:2]],
    )
    statistics = {**transform.statistics, "action": {**transform.statistics["action"]}}
    for key in ("q01", "q99", "min", "max"):
        statistics["action"][key] = [3 * value for value in statistics["action"][key]]
    parts = [
        FrameDataset(tiny_index, tiny_index.spec, transform, augment=True, seed=5),
        FrameDataset(other_index, other_index.spec, replace(transform, statistics=statistics), augment=True, seed=5),
    ]
    mixture = FrameMixture(parts)
    assert len(mixture) == 18 + 11 and mixture.pad_token_id == transform.pad_token_id
    for index, part, own in ((0, 0, 0), (17, 0, 17), (18, 1, 0), (28, 1, 10)):
        sample, expected = mixture[SampleRequest(41, index)], parts[part][SampleRequest(41, own)]
        assert sample["dataset_name"] == expected["dataset_name"] == parts[part].spec.name
        for key in ("pixel_values", "actions", "proprio"):
            np.testing.assert_array_equal(sample[key], expected[key])
    first, second = mixture[SampleRequest(0, 0)], mixture[SampleRequest(0, 18)]
    np.testing.assert_allclose(first["actions"][:, :6], second["actions"][:, :6], atol=1e-5)
