"""The arm `reference`: eager's actions, with the work of the research code."""

from typing import Any

import numpy as np
import pytest
import torch

from prismatic.benchmark.accounting import Prompted, agree, counted_flops, needed_flops, reference_flops
from prismatic.benchmark.random_policy import PROMPT_TOKENS, SIZES, instruction_of, meta_parts
from prismatic.benchmark.reference import ReferenceModel, ReferencePolicy, sharing_copy
from prismatic.benchmark.subject import made_up_observations, with_pruner
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.sequence import Sequence
from prismatic.models.token_pruner import score_tokens
from prismatic.policy import Policy

TERA = {512: 9.03, 78: 3.12}
"""Of an action at 7B as the research code computes it, by tokens kept; both from an independent count."""


@pytest.mark.parametrize(("pruner", "tokens"), [("none", 0), ("lightvla", 77), ("lightvla:multiplicity=set", 0)])
def test_actions_are_those_of_eager(tiny_policy, pruner, tokens):
    policy = with_pruner(tiny_policy, pruner, tokens)
    looks, sentences = made_up_observations(policy, 2, 64), [instruction_of(PROMPT_TOKENS)] * 2
    eager, ours = policy.act_batch(looks, sentences), ReferencePolicy(policy).act_batch(looks, sentences)
    assert torch.equal(eager.selection.kept(), ours.selection.kept())
    np.testing.assert_allclose(ours.actions, eager.actions, atol=1e-5)
    assert {"preprocessing", "vision", "pruner", "llm", "total"} <= set(ours.timing)
    if tokens:
        assert ours.selection.distinct().tolist() == [tokens] * 2


@pytest.mark.parametrize(("pruner", "kept"), [("none", None), ("lightvla", 77)])
def test_the_formula_is_what_the_counter_sees(tiny_policy, pruner, kept):
    policy = with_pruner(tiny_policy, pruner, kept or 0)
    look, sentence = made_up_observations(policy, 1, 64), [instruction_of(PROMPT_TOKENS)]
    asked = Prompted(policy.model, policy.action_head, policy.proprio_projector, kept, PROMPT_TOKENS)
    reference = ReferencePolicy(policy)
    assert counted_flops(lambda: reference.act_batch(look, sentence)) == sum(reference_flops(asked).values())


@pytest.fixture(scope="module")
def published() -> tuple[Any, Any, Any]:
    """Model, head and projector of the published sizes, without values."""
    return meta_parts(SIZES["7b"])


@pytest.mark.parametrize("kept", TERA)
def test_work_at_7b(published, kept):
    """What is published of the research code, from the formula and from torch's counter over its own pass."""
    model, head, projector = published
    asked = Prompted(model, head, projector, None if kept == 512 else kept, PROMPT_TOKENS)
    formula = sum(reference_flops(asked).values())
    assert formula / 1e12 == pytest.approx(TERA[kept], abs=0.005)
    counted = counted_flops(lambda: pass_without_values(model, head, projector, kept, asked.sequence_length))
    assert agree(formula, counted)


def test_the_least_work_at_7b(published):
    least = needed_flops(Prompted(*published, 78, PROMPT_TOKENS))
    assert 3.0 < sum(least.values()) / 1e12 < 3.01


@torch.no_grad()
def pass_without_values(model: Any, head: Any, projector: Any, kept: int, length: int) -> None:
    """The reference's pass on the meta device, where no token can be picked: the first `kept` ones stay."""
    reference, meta = ReferenceModel.of(model), torch.device("meta")
    pixels = torch.empty(1, 12, 224, 224, device=meta)
    patches = reference.patches(pixels)
    state = projector(torch.empty(1, 8, device=meta))
    context = torch.cat([state, torch.empty(1, length - kept - 2, state.shape[-1], device=meta)], dim=1)
    if kept < 512:
        score_tokens(patches, context)
    rows = torch.cat([context[:, :1], patches[:, :kept], context], dim=1)
    assert rows.shape[1] == length
    places = torch.arange(length, device=meta)[None]
    hidden = reference.hidden(Sequence(rows, places, torch.zeros(1, length, device=meta), places[:, 0], kept))
    head.predict_action(hidden[:, -56:])


def test_a_copy_shares_its_tensors_alone(tiny_policy):
    model = tiny_policy.model
    copied = sharing_copy(model)
    assert [id(p) for p in copied.parameters()] == [id(p) for p in model.parameters()]
    copied.language_model.set_attn_implementation("sdpa")
    assert model.language_model.config._attn_implementation == "eager"


def test_what_it_does_not_compute_is_refused(tiny_policy, reference_checkpoint):
    model = reference_checkpoint.model
    model.enable_film()
    with pytest.raises(ValueError, match="no FiLM"):
        ReferenceModel.of(model)
    copied = with_pruner(tiny_policy, "none", 0)
    other = Policy(copied.checkpoint, copied.transform, copied.unnorm_key)
    other.action_head = DiffusionActionHead(64, 7, 8)
    with pytest.raises(ValueError, match="the L1 head, not 'diffusion'"):
        ReferencePolicy(other)
