"""Training and inference compute the same thing on the same frame."""

import dataclasses

import numpy as np
import pytest
import torch
from fixtures_rlds import tiny_episodes, write_tiny_rlds

from prismatic.policy import Policy
from prismatic.vla.datasets.catalog import get_dataset_spec
from prismatic.vla.datasets.collate import collate
from prismatic.vla.datasets.dataset import FrameDataset
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.sampler import SampleRequest
from prismatic.vla.images import center_crop

NAME = "libero_tiny_no_noops"


@pytest.fixture(scope="module")
def rlds_root(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("rlds")
    write_tiny_rlds(root, NAME, episodes=2, steps=12, size=64)
    return root


@pytest.mark.parametrize("center_crop", [False, True])
def test_a_sample_that_is_not_augmented_equals_an_inference_call(small_policy_directory, rlds_root, center_crop):
    policy = Policy.from_pretrained(small_policy_directory, center_crop=center_crop)
    spec = get_dataset_spec(NAME)
    data = FrameDataset(RldsIndex.open(rlds_root, NAME), spec, policy.transform, augment=False, seed=0)
    episode = tiny_episodes(2, 12, 64)[1]
    step = 2
    index = next(i for i in range(len(data)) if (data.frame(i).episode, data.frame(i).step) == (1, step))
    sample = data[SampleRequest(position=0, index=index)]
    observation = {
        "full_image": episode.images[step],
        "wrist_image": episode.wrist_images[step],
        "state": np.asarray(episode.states[step], np.float32),
    }
    inputs = policy.model_inputs(observation, episode.language)
    assert np.array_equal(sample["input_ids"], inputs["input_ids"])
    assert torch.equal(torch.as_tensor(sample["pixel_values"]), inputs["pixel_values"])
    assert np.array_equal(sample["proprio"], inputs["proprio"])

    picks = {}
    for training in (True, False):
        policy.model.train(training)
        batch = collate([sample if training else inputs], policy.transform.pad_token_id)
        parts = (batch["input_ids"], batch["attention_mask"], batch["pixel_values"], batch["proprio"])
        picks[training] = policy.model.action_hidden(*parts, policy.proprio_projector)
    assert torch.equal(picks[True].selection.index, picks[False].selection.index)
    assert torch.equal(picks[True].selection.count, picks[False].selection.count)
    torch.testing.assert_close(picks[True].rows, picks[False].rows, atol=1e-5, rtol=1e-5)


def test_inference_crops_the_centre_of_the_resized_picture(small_policy_directory):
    policy = Policy.from_pretrained(small_policy_directory)
    plain = dataclasses.replace(policy.transform, center_crop=False)
    episode = tiny_episodes(1, 12, 64)[0]
    observation = {"full_image": episode.images[0], "wrist_image": episode.wrist_images[0]}
    cropped, whole = policy.transform.prepare_images(observation), plain.prepare_images(observation)
    assert np.array_equal(cropped, np.stack([center_crop(image) for image in whole]))
    assert not np.array_equal(cropped, whole)
