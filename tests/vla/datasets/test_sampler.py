"""The order: a permutation per epoch, the same for any number of ranks, workers and restarts."""

from collections import Counter
from itertools import islice

import pytest

from prismatic.vla.datasets.sampler import GlobalBatchSampler, index_at


def positions(batches: list) -> list[int]:
    return [request.position for batch in batches for request in batch]


def test_every_epoch_visits_every_frame_once_in_a_new_order() -> None:
    epochs = [[index_at(3, epoch * 101 + k, 101) for k in range(101)] for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(101))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(101))
    assert epochs[0] == [index_at(3, k, 101) for k in range(101)]
    assert epochs[0] != [index_at(4, k, 101) for k in range(101)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_together_see_what_one_rank_with_the_whole_batch_sees(world_size: int) -> None:
    ranks = [islice(GlobalBatchSampler(50, 4, rank, world_size, seed=7), 30) for rank in range(world_size)]
    single = islice(GlobalBatchSampler(50, 4 * world_size, seed=7), 30)
    for whole, *parts in zip(single, *ranks, strict=True):
        assert [request for part in parts for request in part] == whole


def test_positions_follow_step_rank_and_place() -> None:
    sampler = GlobalBatchSampler(50, 4, rank=1, world_size=3, seed=7)
    assert positions(list(islice(sampler, 3))) == [s * 12 + 4 + k for s in range(3) for k in range(4)]


def test_a_restart_continues_even_with_another_number_of_ranks() -> None:
    whole = list(islice(GlobalBatchSampler(10, 6, seed=1), 9))
    resumed = list(islice(GlobalBatchSampler(10, 6, seed=1, start_position=24), 5))
    assert resumed == whole[4:]
    two = [list(islice(GlobalBatchSampler(10, 3, rank, 2, seed=1, start_position=24), 5)) for rank in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == whole[4:]


def test_batches_larger_than_the_dataset_cross_epochs() -> None:
    (batch,) = islice(GlobalBatchSampler(5, 15, seed=2), 1)
    assert Counter(request.index for request in batch) == dict.fromkeys(range(5), 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 0, "batch_size": 1}, "num_frames"),
        ({"num_frames": 1, "batch_size": 0}, "batch_size"),
        ({"num_frames": 1, "batch_size": 1, "rank": 2, "world_size": 2}, "rank must be in 0 .. 1"),
        ({"num_frames": 1, "batch_size": 1, "seed": -1}, "seed"),
        ({"num_frames": 1, "batch_size": 1, "start_position": -1}, "start_position"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GlobalBatchSampler(**arguments)
