"""An original OpenVLA checkpoint decodes its action tokens as stock transformers does, and nothing else."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_checkpoint import reference_sample, write_original_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.inspection import inspect_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.original import why_original
from prismatic.models.llama import decode_greedily
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.token_pruner import TokenPruner
from prismatic.policy import Policy
from prismatic.vla.images import prepare_image

SENTENCES = ("turn on the stove", "put the bowl on the plate", "open the top drawer and put the bowl inside", "lift it")
EMPTY = 29871


def observation(index: int) -> dict[str, np.ndarray]:
    return {"full_image": reference_sample(index)["images"][0]}


@pytest.fixture(scope="module")
def policy(original_directory: Path) -> Policy:
    return Policy.from_pretrained(original_directory, dtype=torch.float32)


@pytest.fixture(scope="module")
def stock(original_directory: Path) -> LlamaForCausalLM:
    """The language model alone, as transformers builds and fills it."""
    weights: dict[str, torch.Tensor] = {}
    for file in original_directory.glob("*.safetensors"):
        weights |= load_file(file)
    prefix = "language_model."
    text = json.loads((original_directory / "config.json").read_text())["text_config"]
    model = LlamaForCausalLM(LlamaConfig(**text)).float().eval()
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    return model


def expected_ids(policy: Policy, stock: LlamaForCausalLM, seen: dict[str, np.ndarray], sentence: str) -> list[int]:
    """BOS, 256 patches, the prompt and the empty piece, continued by `generate`."""
    prompt = policy.processor.tokenizer(f"In: What action should the robot take to {sentence}?\nOut:")["input_ids"]
    picture = prepare_image(seen["full_image"], 224, crop=True)
    pixels = policy.processor.image_processor(picture)["pixel_values"]
    with torch.no_grad():
        words = stock.get_input_embeddings()(torch.tensor([[*prompt, EMPTY]]))
        patches = policy.model.projector(policy.model.vision_backbone(pixels))
        assert patches.shape[1] == 256
        embeddings = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        ids = stock.generate(
            inputs_embeds=embeddings, attention_mask=mask, do_sample=False, max_new_tokens=7, eos_token_id=None,
            pad_token_id=32000,
        )  # fmt: skip
    return ids[0].tolist()


def expected_action(policy: Policy, ids: list[int]) -> np.ndarray:
    """Bin centres of 256 uniform edges, scaled by the first and last percentile; the gripper as it is."""
    edges = np.linspace(-1, 1, 256)
    normalized = ((edges[:-1] + edges[1:]) / 2)[np.clip(32000 - np.array(ids) - 1, 0, 254)]
    part = policy.norm_stats["libero_tiny_no_noops"]["action"]
    low, high = np.array(part["q01"]), np.array(part["q99"])
    return np.where(part["mask"], 0.5 * (normalized + 1) * (high - low) + low, normalized)


def decoded(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collects the ids that the policy decodes from now on."""
    found: list[torch.Tensor] = []

    def watched(*args):
        found.append((outcome := decode_greedily(*args))[0])
        return outcome

    monkeypatch.setattr("prismatic.extern.hf.modeling_prismatic.decode_greedily", watched)
    return found


def test_tokens_are_those_of_transformers_alone_and_in_ragged_batches(policy, stock, monkeypatch):
    seen = [observation(index) for index in range(len(SENTENCES))]
    expected = [expected_ids(policy, stock, *pair) for pair in zip(seen, SENTENCES, strict=True)]
    assert len({tuple(ids) for ids in expected}) == len(SENTENCES), "else the test says nothing"
    assert min(len(set(ids)) for ids in expected) > 2
    actions = [expected_action(policy, ids) for ids in expected]
    found = decoded(policy, monkeypatch)
    for index, sentence in enumerate(SENTENCES):
        action = policy.act(seen[index], sentence)
        assert action.shape == (1, 7) and found.pop().tolist() == [expected[index]]
        np.testing.assert_allclose(action[0], actions[index], atol=1e-6)
    for order in ([0, 1, 2, 3], [3, 2], [2, 0, 1]):
        together = policy.act_batch([seen[i] for i in order], [SENTENCES[i] for i in order])
        assert found.pop().tolist() == [expected[i] for i in order]
        assert together.actions.shape == (len(order), 1, 7) and together.selection.kept().all()
        np.testing.assert_allclose(together.actions[:, 0], [actions[i] for i in order], atol=1e-6)


def test_nan_logits_make_no_action(original_directory):
    """`argmax` of them would be a token like any other."""
    policy = Policy.from_pretrained(original_directory, dtype=torch.float32)
    policy.model.language_model.lm_head.weight.data[31900, 0] = torch.nan
    ids = torch.tensor([[1, 400, EMPTY]])
    with torch.no_grad():
        encoded = policy.model.encode(ids, torch.ones_like(ids), torch.zeros(1, 6, 224, 224))
        actions, _ = policy.action_head.predict(policy.model, encoded)
    assert actions.shape == (1, 1, 7) and actions.isnan().all()


def test_torchs_attention_decodes_the_same(policy, stock, monkeypatch):
    """What runs on a GPU; on a CPU it is asked for."""
    policy.model.language_model.set_attn_implementation("sdpa")
    found = decoded(policy, monkeypatch)
    policy.act_batch([observation(0), observation(3)], [SENTENCES[0], SENTENCES[3]])
    policy.model.language_model.set_attn_implementation("eager")
    expected = [expected_ids(policy, stock, observation(i), SENTENCES[i]) for i in (0, 3)]
    assert found.pop().tolist() == expected


@pytest.mark.parametrize("load", [OpenVLAForActionPrediction, AutoModelForImageTextToText], ids=["class", "auto"])
def test_predict_action_of_a_folder_gives_the_same_action(policy, original_directory, load):
    """As the original OpenVLA is called, by its processor and its model."""
    model = load.from_pretrained(original_directory, dtype=torch.float32).eval()
    obs, sentence = observation(1), SENTENCES[1]
    inputs = policy.processor(
        f"In: What action should the robot take to {sentence}?\nOut:", prepare_image(obs["full_image"], 224, crop=True)
    )
    actions, rows = model.predict_action(**inputs, unnorm_key="libero_tiny_no_noops", do_sample=False)
    np.testing.assert_allclose(actions, policy.act(obs, sentence), atol=1e-9)
    assert actions.shape == (1, 7) and rows.shape == (1, 7, 128)


def test_what_was_assumed_and_why_is_said(reference_directory, original_directory, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    policy = Policy.from_pretrained(original_directory, dtype=torch.float32)
    description = policy.description()
    assert [description[key] for key in ("action_head", "pruner", "num_images")] == ["autoregressive", "none", 1]
    assert not description["use_proprio"] and description["robot"]["open_loop_steps"] == 1
    told, cropped = description["assumptions"]
    assert told.startswith(
        "no *--*_checkpoint.pt file and no record of how it acts: assumed an original OpenVLA checkpoint. It "
    )
    assert "head='discrete' (--action_head discrete)" in told and "center_crop" in cropped and told in caplog.text
    fine_tuned = write_original_checkpoint(reference_directory, tmp_path / "fine_tuned", fine_tuned=True)
    assert "a discrete parallel one" in Policy.from_pretrained(fine_tuned).description()["assumptions"][0]
    parallel = Policy.from_pretrained(fine_tuned, head="discrete", pruner="none", num_images_in_input=1)
    assert parallel.act(observation(0), SENTENCES[0]).shape == (8, 7)
    asked = Policy.from_pretrained(fine_tuned, head="autoregressive")
    assert [line for line in asked.description()["assumptions"] if "original" in line] == []
    np.testing.assert_array_equal(asked.act(observation(0), SENTENCES[0]), policy.act(observation(0), SENTENCES[0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pruner": "lightvla"}, "over all visual tokens, but the pruner is 'lightvla'; set pruner to none"),
        ({"action_readout": "tail"}, "action_readout 'tail' means nothing; leave it out"),
        ({"head": "l1"}, "has no action_head--"),
        (
            {"num_images_in_input": 2},
            "original reads one image, but num_images_in_input=2 was asked for; .*action_head",
        ),
        ({"head": "tokens"}, "unknown kind of action head 'tokens'; known: l1, diffusion, discrete, autoregressive"),
    ],
)
def test_what_it_cannot_do_is_refused(original_directory, options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Policy.from_pretrained(original_directory, **options)


def test_pruners_and_the_state_are_refused_later_too(policy, reference_directory):
    with pytest.raises(ValueError, match="the pruner is 'random'"):
        policy.set_pruner("random:seed=3")
    with pytest.raises(ValueError, match="holds a head of kind 'l1', but 'autoregressive' was asked for"):
        Policy.from_pretrained(reference_directory, head="autoregressive")
    with pytest.raises(RuntimeError, match="is for inference; fine-tune with"):
        policy.action_head.loss(policy.model, None, {})


def change_config(folder: Path, **values) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


def test_only_folders_without_any_trace_of_another_head_are_recognised(original_directory, tmp_path):
    traces = {
        "proprio": lambda folder: torch.save({}, folder / "proprio_projector--1_checkpoint.pt"),
        "film": lambda folder: torch.save({}, folder / "vision_backbone--1_checkpoint.pt"),
        "adapter": lambda folder: (folder / "lora_adapter").mkdir(),
        "pruner": lambda folder: change_config(folder, pruner={"name": "none"}),
        "head": lambda folder: change_config(folder, action_head="l1"),
        "untrained": lambda folder: change_config(folder, norm_stats=None),
    }
    for name, leave in traces.items():
        folder = Path(shutil.copytree(original_directory, tmp_path / name))
        leave(folder)
        assert why_original(folder, json.loads((folder / "config.json").read_text())) is None, name
    folder = Path(shutil.copytree(original_directory, tmp_path / "settings"))
    torch.save({}, folder / "training_args.pt")
    assert why_original(folder, json.loads((folder / "config.json").read_text())) is not None
    with pytest.raises(FileNotFoundError, match="fetch its .pt files, or say what it is"):
        Policy.from_pretrained(tmp_path / "pruner")
    with pytest.raises(FileNotFoundError, match="has no action_head--"):
        Policy.from_pretrained(tmp_path / "head", head="autoregressive")


def test_inspection_says_what_it_is(original_directory):
    found = inspect_checkpoint(original_directory)
    assert not found.problems
    assert found.kind.startswith("original OpenVLA: action tokens one after another, one action per policy query")
    assert found.facts["images per sample"].startswith("1 ") and found.facts["pruner"].startswith("none")
    assert any("assumed an original OpenVLA checkpoint" in note for note in found.notes)


def test_saved_again_it_records_what_it_is(original_directory, policy, tmp_path):
    saved = save_checkpoint(tmp_path / "saved", policy.checkpoint, 0)
    again = Policy.from_pretrained(saved, center_crop=True)
    assert again.description()["assumptions"] == [] and again.action_head.kind == "autoregressive"
    assert inspect_checkpoint(saved).kind == "OpenVLA: action tokens one after another, one action per policy query"
    np.testing.assert_array_equal(again.act(observation(2), SENTENCES[2]), policy.act(observation(2), SENTENCES[2]))


def test_as_a_base_to_fine_tune_it_is_what_it_was(original_directory):
    checkpoint = load_checkpoint(original_directory, LoadOptions(num_images_in_input=2, pruner=PrunerSpec("lightvla")))
    assert checkpoint.action_head is None and checkpoint.model.robot.chunk_length == 8
    assert isinstance(checkpoint.model.pruner, TokenPruner)
