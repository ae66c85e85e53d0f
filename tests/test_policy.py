"""`Policy` as an integrator uses it."""

import json
import shutil

import numpy as np
import pytest
import torch
from reference_checkpoint import reference_sample

from prismatic.policy import Policy
from prismatic.vla.images import prepare_image


def observation(index: int) -> dict:
    sample, images = reference_sample(index % 6), reference_sample((index + index // 6) % 6)["images"]
    return {"full_image": images[0], "wrist_image": images[1], "state": sample["state"]}


@pytest.fixture
def policy(reference_directory) -> Policy:
    return Policy.from_pretrained(reference_directory, dtype="float32", pruner="lightvla:multiplicity=set")


@pytest.fixture
def small_policy(small_policy_directory) -> Policy:
    return Policy.from_pretrained(small_policy_directory)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_batch_gives_what_each_sample_gives_alone(policy, size):
    sentences = ["turn on the stove", "put the bowl on the plate", "pick up the milk and place it in the basket"]
    instructions = [f"{sentences[i % 3]} {'now ' * (i // 3)}".strip() for i in range(size)]
    observations = [observation(i) for i in range(size)]
    together = policy.act_batch(observations, instructions)
    assert together.actions.shape == (size, 8, 7)
    for index in range(size):
        alone = policy.act_batch([observations[index]], [instructions[index]])
        assert torch.equal(alone.selection.kept()[0], together.selection.kept()[index])
        np.testing.assert_allclose(alone.actions[0], together.actions[index], atol=1e-5)
    np.testing.assert_allclose(policy.act(observations[-1], instructions[-1]), together.actions[-1], atol=1e-5)


def test_act_equals_the_published_way_of_calling(policy):
    """Processor and `predict_action` by hand, as existing scripts do, against `Policy.act`."""
    obs, instruction = observation(0), "turn on the stove"
    prompt = f"In: What action should the robot take to {instruction}?\nOut:"
    images = [prepare_image(obs[key], 224, crop=True) for key in ("full_image", "wrist_image")]
    inputs = policy.processor(prompt, images[0])
    wrist = policy.processor(prompt, images[1])["pixel_values"]
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], wrist], dim=1)
    state = policy.transform.proprio(obs["state"])
    actions, rows = policy.model.predict_action(
        **inputs,
        proprio=state,
        proprio_projector=policy.proprio_projector,
        action_head=policy.action_head,
        unnorm_key="libero_tiny_no_noops",
    )
    np.testing.assert_allclose(policy.act(obs, instruction), actions, atol=1e-6)
    assert rows.shape == (1, 56, 128)


def test_the_observation_is_left_alone(small_policy):
    obs = observation(2)
    before = {key: value.copy() for key, value in obs.items()}
    small_policy.act(obs, "turn on the stove")
    assert all(np.array_equal(obs[key], before[key]) for key in obs)


def test_timing_and_description(small_policy):
    timing = small_policy.act_batch([observation(0)], ["turn on the stove"]).timing
    assert set(timing) == {"preprocessing", "vision", "pruner", "llm", "total"}
    assert all(value > 0 for value in timing.values())
    assert sum(timing[stage] for stage in ("preprocessing", "vision", "pruner", "llm")) <= timing["total"]
    description = small_policy.description()
    assert description["pruner"] == "lightvla:multiplicity=weighted" and description["assumptions"] == []


def test_pruners_can_be_exchanged(small_policy):
    pruned = small_policy.act_batch([observation(0)], ["turn on the stove"])
    small_policy.set_pruner("none")
    everything = small_policy.act_batch([observation(0)], ["turn on the stove"])
    assert everything.selection.kept().all() and not pruned.selection.kept().all()
    small_policy.set_pruner("random:seed=3")
    random = small_policy.act_batch([observation(0)], ["turn on the stove"])
    assert random.selection.distinct().equal(pruned.selection.distinct())
    assert small_policy.model.pruner.multiplicity == "weighted", "as the checkpoint was trained, whatever ran between"
    small_policy.set_pruner("random:seed=3,min_tokens=20")
    assert small_policy.act_batch([observation(0)], ["turn on the stove"]).selection.distinct().item() == 20
    hooks = len(small_policy.model.vision_backbone._forward_pre_hooks)
    small_policy.set_pruner("none")
    assert len(small_policy.model.vision_backbone._forward_pre_hooks) == hooks


def test_with_seeds_a_random_choice_depends_on_its_own_request_alone(small_policy):
    small_policy.set_pruner("random:seed=3")
    seen, words = [observation(0), observation(1)], ["turn on the stove"] * 2
    together = small_policy.act_batch(seen, words, seeds=[5, 6]).selection.kept()
    small_policy.act_batch(seen, words)
    for row, seed in enumerate((5, 6)):
        alone = small_policy.act_batch([seen[row]], ["turn on the stove"], seeds=[seed]).selection.kept()[0]
        assert torch.equal(alone, together[row])
    other = small_policy.act_batch(seen, words, seeds=[7, 8]).selection.kept()
    assert not torch.equal(other, together)
    with pytest.raises(ValueError, match="came with 1 seeds"):
        small_policy.act_batch(seen, words, seeds=[5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_image": np.zeros((224, 224, 3), np.float32)}, "full_image.*float32.*expected uint8"),
        ({"wrist_image": np.zeros((224, 224), np.uint8)}, r"wrist_image.*\(224, 224\).*expected uint8 \(H, W, 3\)"),
        ({"state": np.zeros(7)}, r"state.*shape \(7,\); expected \(8,\)"),
        ({"state": np.array([0, 0, np.nan, 0, 0, 0, 0, 0])}, "state.*NaN"),
    ],
)
def test_bad_observations_are_named(small_policy, change, message):
    with pytest.raises(ValueError, match=message):
        small_policy.act({**observation(0), **change}, "turn on the stove")


def test_missing_keys_are_named(small_policy):
    obs = observation(0)
    del obs["wrist_image"]
    with pytest.raises(ValueError, match=r"lacks \['wrist_image'\]"):
        small_policy.act(obs, "turn on the stove")


def test_a_noisy_action_projector_needs_a_diffusion_head(small_policy):
    ids, pixels = torch.ones(1, 4, dtype=torch.long), torch.zeros(1, 6, 64, 64)
    with pytest.raises(ValueError, match="belongs to a diffusion head, but action_head is of kind 'l1'"):
        small_policy.model.predict_action(
            ids, None, pixels, action_head=small_policy.action_head, noisy_action_projector=torch.nn.Identity(),
            unnorm_key="libero_test_no_noops",
        )  # fmt: skip


def test_wrong_unnorm_key_lists_the_known(small_policy_directory):
    with pytest.raises(ValueError, match="'bridge' names no dataset.*known: libero_test_no_noops"):
        Policy.from_pretrained(small_policy_directory, unnorm_key="bridge")


def test_a_checkpoint_without_a_head_says_so(small_policy_directory, tmp_path):
    directory = shutil.copytree(small_policy_directory, tmp_path / "headless")
    next(directory.glob("action_head--*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"records an L1 head, but has no action_head--\*_checkpoint.pt"):
        Policy.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    del config["action_head"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"has no action_head--\*_checkpoint.pt; fine-tune it first"):
        Policy.from_pretrained(directory)


def test_a_checkpoint_without_statistics_says_so(small_base):
    with pytest.raises(ValueError, match="known: none: the checkpoint has no dataset_statistics.json"):
        Policy.from_pretrained(small_base)


def test_too_many_images(small_policy_directory):
    with pytest.raises(ValueError, match="num_images_in_input=3: robot 'libero' has 2 cameras"):
        Policy.from_pretrained(small_policy_directory, num_images_in_input=3)
