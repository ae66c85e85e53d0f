"""`Policy` as an integrator uses it."""

import copy
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from reference_checkpoint import reference_sample

from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.pruners.registry import PrunerSpec
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
    np.testing.assert_allclose(policy.act(obs, instruction), actions, atol=1e-5)
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
    ("lists", "message"),
    [
        ({"seeds": ["a"]}, "seed 'a': expected a whole number"),
        ({"seeds": [None]}, "seed None: expected"),
        ({"seeds": [1.5]}, "seed 1.5: expected"),
        ({"seeds": [True]}, "seed True: expected"),
        ({"seeds": [2**64]}, "seed 18446744073709551616: expected a whole number of 64 bits"),
        ({"seeds": 3}, "seeds is 3, a int; act_batch takes a list of them"),
        ({"observations": None}, "observations is None, a NoneType"),
        ({"observations": []}, "0 observations came with 1 instructions"),
        ({"instructions": 5}, "instructions is 5, a int"),
    ],
)
def test_what_is_no_list_of_requests_is_named(small_policy, lists, message):
    with pytest.raises(ValueError, match=message):
        small_policy.act_batch(**{"observations": [observation(0)], "instructions": ["go"], "seeds": [3], **lists})


def test_requests_come_in_any_sequence(small_policy):
    seen, words = [observation(0), observation(1)], ["turn on the stove"] * 2
    expected = small_policy.act_batch(seen, words, seeds=[5, 6]).actions
    for kind in (iter, np.array, tuple):
        found = small_policy.act_batch(kind(seen), kind(words), seeds=kind([5, 6])).actions
        np.testing.assert_array_equal(found, expected)


def test_threads_that_spin_are_warned_of(small_policy_directory, caplog, monkeypatch):
    threads = torch.get_num_threads()
    try:
        for number, policy, said in ((2, "", True), (2, "passive", False), (1, "", False)):
            torch.set_num_threads(number)
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
            caplog.clear()
            Policy.from_pretrained(small_policy_directory)
            assert any("OMP_WAIT_POLICY=PASSIVE" in record.getMessage() for record in caplog.records) == said
    finally:
        torch.set_num_threads(threads)


def test_nothing_watches_the_model(small_policy):
    """Whoever counts hooks, compiles or copies the model finds it as it was built."""
    small_policy.act(observation(0), "turn on the stove")
    for name, module in small_policy.model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name


def test_threads_share_a_policy(small_policy):
    """Four threads, 100 calls each: every answer, what is random about it and every timing are the call's own."""
    small_policy.set_pruner("random:seed=3")
    requests = [(observation(i), f"turn on stove {i % 5}", i) for i in range(100)]

    def ask(request):
        seen, words, seed = request
        return small_policy.act_batch([seen], [words], seeds=[seed])

    alone = [ask(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, requests * 4))
    for number, output in enumerate(together):
        expected = alone[number % 100]
        np.testing.assert_array_equal(output.actions, expected.actions)
        assert torch.equal(output.selection.kept(), expected.selection.kept())
        stages = [output.timing[stage] for stage in ("preprocessing", "vision", "pruner", "llm")]
        assert min(stages) > 0 and sum(stages) <= output.timing["total"]


def test_arrays_tensors_pictures_and_lists_are_the_same_observation(small_policy):
    obs = observation(0)
    image, wrist, state = obs["full_image"], obs["wrist_image"], np.round(obs["state"], 2)
    expected = small_policy.act({**obs, "state": state}, "turn on the stove")
    forms = [
        (torch.from_numpy(image), Image.fromarray(wrist), torch.from_numpy(state)),
        (image.tolist(), torch.from_numpy(wrist), state.tolist()),
        (list(image), image[::-1][::-1] * 0 + wrist, [torch.tensor(value) for value in state]),
    ]
    for full, other, values in forms:
        given = {"full_image": full, "wrist_image": other, "state": values}
        np.testing.assert_array_equal(small_policy.act(given, "turn on the stove"), expected)
    whole = torch.tensor([1, 0, 0, -1, 0, 1, 0, 0])
    expected = small_policy.act({**obs, "state": whole.numpy().astype(float)}, "turn on the stove")
    for dtype in (torch.int64, torch.bfloat16, torch.float16, torch.int8):
        np.testing.assert_array_equal(
            small_policy.act({**obs, "state": whole.to(dtype)}, "turn on the stove"), expected
        )


def test_an_instruction_may_be_bytes(small_policy):
    expected = small_policy.act(observation(0), "turn on the stove")
    for words in (b"turn on the stove", np.bytes_(b"turn on the stove"), np.str_("Turn on the stove")):
        np.testing.assert_array_equal(small_policy.act(observation(0), words), expected)
    with pytest.raises(ValueError, match=r"the instruction is None, a NoneType; expected a sentence"):
        small_policy.act(observation(0), None)
    with pytest.raises(ValueError, match=r"the instruction 'go \\ud800' is no Unicode text"):
        small_policy.act(observation(0), "go \ud800")
    with pytest.raises(ValueError, match="takes a list of observations and one of instructions"):
        small_policy.act_batch([observation(0)], "turn on the stove")


def test_special_tokens_in_an_instruction_are_text(small_policy):
    tokenizer = small_policy.processor.tokenizer
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids("<action_3>")}
    for words in ("go </s> on", "<s>", "<pad> <action_3>"):
        ids = small_policy.transform.input_ids(words).tolist()
        assert special.isdisjoint(ids[1:-1]) and ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:-1]).endswith(f"robot take to {words}?\nOut:")
    plain = tokenizer("In: What action should the robot take to go on?\nOut:")["input_ids"]
    assert small_policy.transform.input_ids("go on").tolist()[:-1] == plain


def test_an_instruction_longer_than_the_models_context_is_refused(small_policy):
    """Exactly what fits is taken: positions count from BOS to the stop token."""
    transform, model = small_policy.transform, small_policy.model
    words = "go " * 100
    length = len(transform.input_ids(words))
    small_policy.model.config.text_config.max_position_embeddings = length + model.num_visual_tokens + 56 + 3
    assert model.max_prompt_tokens == length
    again = small_policy.checkpoint.transform(small_policy.unnorm_key, True)
    ids = again.input_ids(words)
    mask = torch.ones(1, length, dtype=torch.bool)
    pixels, state = torch.zeros(1, 3 * 2 * len(model.vision_backbone.vits), 64, 64), torch.zeros(1, 8)
    model.set_pruner(PrunerSpec("none"))
    with torch.inference_mode():
        hidden = model.action_hidden(torch.from_numpy(ids)[None], mask, pixels, state, small_policy.proprio_projector)
    assert hidden.position_ids.max() + 1 + 1 == model.config.text_config.max_position_embeddings  # 1: the time step
    with pytest.raises(ValueError, match=rf"takes \d+ tokens .* room for {length} .*shorten it: 'go go"):
        again.input_ids(words + "!")


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        ("vision", lambda policy: policy.model.projector.fc1.weight),
        ("state", lambda policy: policy.proprio_projector.fc1.weight),
        ("llm", lambda policy: policy.model.language_model.model.embed_tokens.weight),
        ("pruner", lambda policy: policy.model.pruner.queries),
        ("llm", lambda policy: policy.model.language_model.model.layers[1].mlp.up_proj.weight),
        ("head", lambda policy: policy.action_head.model.fc2.weight),
        ("un-normalisation", None),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_never_leaves_the_policy(small_policy, stage, damage, value):
    if stage == "pruner":
        small_policy.model.set_pruner(PrunerSpec.parse("lightvla_star:queries=4"))
    if damage is None:
        small_policy.transform.statistics["action"]["q99"][2] = value
    else:
        with torch.no_grad():
            damage(small_policy).fill_(value)
    with pytest.raises(FloatingPointError, match=f"NaN or infinity; it begins in stage '{stage}'"):
        small_policy.act(observation(0), "turn on the stove")


@pytest.mark.parametrize(
    ("kind", "stage", "name"),
    [
        ("diffusion", "head", "noise_predictor.mlp_resnet.fc2.weight"),
        ("diffusion", "llm", "norm.weight"),
        ("discrete", "head", "lm_head"),
        ("discrete", "llm", "norm.weight"),
    ],
)
def test_nan_never_leaves_other_heads(small_policy, kind, stage, name):
    """Action tokens above all: the most likely of NaN logits would be a believable action."""
    small_policy.action_head = small_policy.model.discrete_head()
    if kind == "diffusion":
        small_policy.action_head = DiffusionActionHead(32, 7, 8, num_train_steps=3).eval()
    language_model = small_policy.model.language_model
    parts = {"norm.weight": language_model.model.norm.weight, "lm_head": language_model.lm_head.weight}
    weight = parts[name] if name in parts else small_policy.action_head.get_parameter(name)
    assert np.isfinite(small_policy.act(observation(0), "turn on the stove")).all()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=f"begins in stage '{stage}'"):
        small_policy.act(observation(0), "turn on the stove")


def test_what_is_doubtful_is_said_once_per_policy(small_policy_directory, caplog):
    policy = Policy.from_pretrained(small_policy_directory)
    caplog.clear()
    policy.act(observation(0), "turn on the stove")
    assert not caplog.records
    black = np.zeros((64, 64, 3), np.uint8)
    doubtful = {"full_image": black, "wrist_image": black, "state": 1000 * observation(0)["state"]}
    for _ in range(3):
        policy.act(doubtful, "turn on the stove")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "'full_image'] shows nothing" in said[0] and "are the same picture" in said[1]
    assert "'state'] lies far outside the training data" in said[2]
    huge = {**doubtful, "state": np.full(8, -1e308)}
    Policy.from_pretrained(small_policy_directory).act(huge, "turn on the stove")
    assert len(caplog.records) == 6, "another policy has its own"


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
    with pytest.raises(ValueError, match="known: none: dataset_statistics.json, which .* is empty"):
        Policy.from_pretrained(small_base)


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("attempt", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda function: function.__name__)
def test_a_policy_is_neither_copied_nor_pickled(small_policy_directory, engine, attempt):
    policy = Policy.from_pretrained(small_policy_directory, engine=engine)
    with pytest.raises(TypeError, match=f"neither copied nor pickled; load it once more .*{small_policy_directory}"):
        attempt(policy)


@pytest.mark.parametrize(
    ("device", "said"), [("meta", "holds no values"), ("mps", "is not there"), ("gpu", "is unknown")]
)
def test_a_device_that_computes_nothing_is_refused(small_policy_directory, device, said):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"device '{device}' {said}"):
        Policy.from_pretrained(small_policy_directory, device=device)


def test_too_many_images(small_policy_directory):
    with pytest.raises(ValueError, match="num_images_in_input=3: robot 'libero' has 2 cameras"):
        Policy.from_pretrained(small_policy_directory, num_images_in_input=3)
