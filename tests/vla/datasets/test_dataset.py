"""Frames and samples against what was written to the shards."""

import functools
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from fixtures_rlds import tiny_episodes

from prismatic.vla.augmentation import AugmentationParameters, augment
from prismatic.vla.datasets.collate import collate
from prismatic.vla.datasets.dataset import FrameDataset, split_episodes, train_and_val_episodes, training_episodes
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.sampler import GlobalBatchSampler, SampleRequest
from prismatic.vla.images import center_crop, decode_jpeg, resize_lanczos3
from prismatic.vla.transform import PolicyTransform


@pytest.fixture
def dataset(tiny_index: RldsIndex, transform: PolicyTransform) -> FrameDataset:
    return FrameDataset(tiny_index, tiny_index.spec, transform, augment=False, seed=5)


def test_chunks_are_whole_and_the_last_steps_are_only_targets(dataset: FrameDataset) -> None:
    written = {len(episode.actions): episode for episode in tiny_episodes()}
    frames = [dataset.frame(i) for i in range(len(dataset))]
    assert len(dataset) == (12 - 7) + (13 - 7) + (14 - 7)
    steps = {len(dataset.index.episodes[number].action): [] for number in range(3)}
    for frame in frames:
        length = len(dataset.index.episodes[frame.episode].action)
        steps[length].append(frame.step)
        source = written[length]
        expected = source.actions[frame.step : frame.step + 8].astype(np.float32)
        expected[:, 6] = source.actions[frame.step : frame.step + 8, 6] < 0
        np.testing.assert_array_equal(frame.actions, expected)
        np.testing.assert_array_equal(frame.state, source.states[frame.step].astype(np.float32))
        assert frame.instruction == source.language
        assert list(frame.images) == ["full_image", "wrist_image"]
        for stored, pictures in zip(frame.images.values(), (source.images, source.wrist_images), strict=True):
            assert np.abs(stored.astype(int) - pictures[frame.step]).mean() < 4  # JPEG
    assert steps == {12: list(range(5)), 13: list(range(6)), 14: list(range(7))}
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError, match="is not in 0 .. 17"):
            dataset.frame(outside)


@pytest.mark.parametrize("crop", [False, True])
def test_a_sample_is_what_inference_makes_of_its_frame(
    tiny_index: RldsIndex, transform: PolicyTransform, crop: bool
) -> None:
    transform = replace(transform, center_crop=crop)
    dataset = FrameDataset(tiny_index, tiny_index.spec, transform, augment=False, seed=5)
    sample, frame = dataset[SampleRequest(position=100, index=9)], dataset.frame(9)
    episode = dataset.index.episodes[frame.episode]

    def prepared(picture: np.ndarray) -> np.ndarray:
        resized = resize_lanczos3(picture, 48)
        return center_crop(resized) if crop else resized

    images = [
        prepared(decode_jpeg(episode.image_bytes(camera, frame.step))) for camera in ("full_image", "wrist_image")
    ]
    torch.testing.assert_close(sample["pixel_values"], transform.pixel_values(images), rtol=0, atol=0)
    assert sample["pixel_values"].shape == (12, 48, 48) and sample["pixel_values"].dtype == torch.float32
    np.testing.assert_array_equal(sample["input_ids"], transform.input_ids(frame.instruction))
    np.testing.assert_array_equal(sample["actions"], transform.actions(frame.actions))
    np.testing.assert_array_equal(sample["proprio"], transform.proprio(frame.state))
    assert (sample["position"], sample["dataset_name"]) == (100, "libero_tiny_no_noops")
    assert sample["actions"].shape == (8, 7) and np.abs(sample["actions"]).max() <= 1
    assert set(np.unique(sample["actions"][:, 6])) <= {0.0, 1.0}


def test_augmentation_depends_on_seed_and_position_alone(tiny_index: RldsIndex, transform: PolicyTransform) -> None:
    dataset = FrameDataset(tiny_index, tiny_index.spec, transform, augment=True, seed=5)
    first = dataset[SampleRequest(7, 3)]["pixel_values"]
    images = np.stack([resize_lanczos3(image, 48) for image in dataset.frame(3).images.values()])
    expected = augment(images, AugmentationParameters.draw(np.random.default_rng([5, 7]), 2)).numpy()
    torch.testing.assert_close(first, transform.pixel_values(expected), rtol=0, atol=0)
    torch.testing.assert_close(first, dataset[SampleRequest(7, 3)]["pixel_values"], rtol=0, atol=0)
    assert not torch.equal(first, dataset[SampleRequest(8, 3)]["pixel_values"])
    dataset.seed = 6
    assert not torch.equal(first, dataset[SampleRequest(7, 3)]["pixel_values"])


def test_one_camera_no_state_and_a_subset_of_episodes(tiny_index: RldsIndex, one_camera: PolicyTransform) -> None:
    dataset = FrameDataset(
        tiny_index, tiny_index.spec, replace(one_camera, use_proprio=False), augment=False, episodes=[2]
    )
    assert len(dataset) == tiny_index.episodes[2].num_frames - 7
    assert dataset.frame(len(dataset) - 1).episode == 2
    sample = dataset[SampleRequest(0, 0)]
    assert sample["pixel_values"].shape == (6, 48, 48) and "proprio" not in sample
    assert "proprio" not in collate([sample], 0)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # Python 3.12 and newer
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_do_not_change_the_batches(
    tiny_index: RldsIndex, transform: PolicyTransform, workers: int
) -> None:
    dataset = FrameDataset(tiny_index, tiny_index.spec, transform, augment=True, seed=5)
    sampler = GlobalBatchSampler(len(dataset), 4, seed=5)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=functools.partial(collate, pad_token_id=0)
    )
    for batch, requests in zip(islice(loader, 3), sampler, strict=False):
        expected = collate([dataset[request] for request in requests], 0)
        assert batch.keys() == expected.keys() and batch["dataset_names"] == expected["dataset_names"]
        for key in set(batch) - {"dataset_names"}:
            torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)


def test_collate_pads_on_the_right(dataset: FrameDataset, transform: PolicyTransform) -> None:
    wanted = {dataset.frame(i).instruction: i for i in range(len(dataset))}
    samples = [dataset[SampleRequest(k, index)] for k, index in enumerate(wanted.values())]
    batch = collate(samples, pad_token_id=-5)
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert len(set(lengths)) == 2 and batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, mask, sample in zip(batch["input_ids"], batch["attention_mask"], samples, strict=True):
        assert row[mask].tolist() == sample["input_ids"].tolist() and set(row[~mask].tolist()) <= {-5}
        assert mask[: len(sample["input_ids"])].all()
    assert batch["actions"].shape == (2, 8, 7) and batch["proprio"].shape == (2, 8)
    assert batch["positions"].tolist() == [0, 1]


def test_held_out_episodes(tiny_index: RldsIndex) -> None:
    train, validation = split_episodes(40, 0.1, seed=3)
    assert len(validation) == 4 and sorted(train + validation) == list(range(40))
    assert (train, validation) == split_episodes(40, 0.1, seed=3) != split_episodes(40, 0.1, seed=4)
    assert [len(part) for part in split_episodes(2, 0.01)] == [1, 1]
    for episodes, fraction in ((1, 0.5), (10, 0.0), (10, 1.0)):
        with pytest.raises(ValueError, match="cannot hold out"):
            split_episodes(episodes, fraction)
    assert train_and_val_episodes(tiny_index, 0.4) == split_episodes(3, 0.4)


def of_splits(index: RldsIndex, *splits: str) -> RldsIndex:
    """An index of as many episodes as splits are given."""
    pairs = zip(splits, index.episodes * 3, strict=False)
    return replace(index, episodes=[replace(episode, split=split) for split, episode in pairs])


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        ("train train val", [0, 1], [2]),
        ("train validation train", [0, 2], [1]),
        ("val train validation test", [1], [0, 2]),
        ("mine test val other", [0, 3], [2]),
    ],
)
def test_named_splits_are_held_out_and_test_is_left_alone(
    tiny_index: RldsIndex, splits: str, train: list[int], val: list[int]
) -> None:
    index = of_splits(tiny_index, *splits.split())
    assert train_and_val_episodes(index) == (train, val)
    assert training_episodes(index) == train


def test_without_a_split_to_hold_out_some_of_train_is_and_none_of_test(tiny_index: RldsIndex) -> None:
    index = of_splits(tiny_index, "test", "train", "train", "test", "train", "extra")
    train, val = train_and_val_episodes(index, 0.4, seed=3)
    assert sorted(train + val) == [1, 2, 4] and len(val) == 1
    with pytest.raises(ValueError, match=f"{index.name!r}: cannot hold out .* of 1 episodes"):
        train_and_val_episodes(of_splits(tiny_index, "train", "test"), 0.4)
    with pytest.raises(ValueError, match="has only the splits test, validation, which are not trained on; name"):
        training_episodes(of_splits(tiny_index, "test", "validation"))


def test_frames_without_a_sentence_are_skipped_and_each_has_its_own(
    tiny_index: RldsIndex, transform: PolicyTransform
) -> None:
    first, second, _ = tiny_index.episodes
    told = replace(first, instructions=("reach", "", "", "lift") + ("lift",) * 8)
    index = replace(tiny_index, episodes=[told, second])
    dataset = FrameDataset(index, index.spec, transform, augment=False)
    frames = [dataset.frame(i) for i in range(len(dataset))]
    assert [(frame.step, frame.instruction) for frame in frames[:3]] == [(0, "reach"), (3, "lift"), (4, "lift")]
    assert [(frame.episode, frame.step) for frame in frames[3:]] == [(1, step) for step in range(6)]
    np.testing.assert_array_equal(frames[1].actions, index.spec.map_actions(first.action)[3:11])


def test_what_cannot_be_served_is_said_at_once(tiny_index: RldsIndex, transform: PolicyTransform) -> None:
    spec = tiny_index.spec
    with pytest.raises(ValueError, match="cannot serve 3 images"):
        FrameDataset(tiny_index, spec, replace(transform, num_images=3), augment=False)
    unread = replace(tiny_index, episodes=[replace(episode, state=None) for episode in tiny_index.episodes])
    with pytest.raises(ValueError, match="has no state"):
        FrameDataset(unread, spec, transform, augment=False)
    assert len(FrameDataset(unread, spec, replace(transform, use_proprio=False), augment=False)) == 18
    long = replace(transform, robot=replace(transform.robot, chunk_length=20))
    with pytest.raises(ValueError, match="as long as one chunk of 20 actions: the longest of 3 has 14"):
        FrameDataset(tiny_index, spec, long, augment=False)


def test_a_broken_image_is_named_with_shard_and_byte(tiny_index: RldsIndex, transform: PolicyTransform) -> None:
    episode = tiny_index.episodes[0]
    ranges = {camera: np.array(frames) for camera, frames in episode.image_ranges.items()}
    ranges["wrist_image"][2] = [1000, 1200]
    index = replace(tiny_index, episodes=[replace(episode, image_ranges=ranges)])
    with pytest.raises(ValueError, match="'wrist_image' at byte 1000 of shard .*tfrecord.*step 2.*no encoded picture"):
        FrameDataset(index, index.spec, transform, augment=False).frame(2)


def test_state_noise_is_a_function_of_the_position(tiny_index: RldsIndex, transform: PolicyTransform) -> None:
    plain = FrameDataset(tiny_index, tiny_index.spec, transform, augment=False, seed=5)
    noisy = FrameDataset(tiny_index, tiny_index.spec, transform, augment=False, seed=5, state_noise=0.1)
    requests = [SampleRequest(position, 3) for position in range(200)]
    added = np.stack([noisy[request]["proprio"] - plain[request]["proprio"] for request in requests])
    assert 0.09 < added.std() < 0.11 and len(np.unique(added[:, 0])) == len(requests)
    np.testing.assert_array_equal(noisy[requests[7]]["proprio"], noisy[requests[7]]["proprio"])
