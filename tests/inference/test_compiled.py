"""The engine `compiled` against the eager one and the recorded numbers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference_checkpoint import reference_sample
from torch.utils.flop_counter import FlopCounterMode

from prismatic.inference import compiled
from prismatic.inference.compiled import CompiledEngine
from prismatic.inference.engine import Parts
from prismatic.inference.layers import attend_plainly
from prismatic.inference.self_check import compare_picks
from prismatic.models.batch import Call
from prismatic.models.film import apply_film
from prismatic.models.flops import count_flops
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.policy import Policy

SENTENCES = ("turn on the stove", "put the bowl on the plate", "pick up the milk and place it in the basket, please")


def observation(index: int) -> dict:
    sample = reference_sample(index % 6)
    return {"full_image": sample["images"][0], "wrist_image": sample["images"][1], "state": sample["state"]}


def asked(size: int) -> tuple[list[dict], list[str]]:
    return [observation(index) for index in range(size)], [SENTENCES[index % 3] for index in range(size)]


@pytest.fixture(scope="module")
def eager(reference_directory) -> Policy:
    return Policy.from_pretrained(reference_directory, dtype="float32", engine="eager", pruner="lightvla")


def run_by(policy: Policy, padded: bool) -> Policy:
    """The same weights, run by the compiled engine; padded: with the shapes that graphs on a GPU have."""
    parts = Parts(policy.model, policy.action_head, policy.proprio_projector)
    engine = CompiledEngine(parts, padded=padded)
    return Policy(policy.checkpoint, policy.transform, policy.unnorm_key, engine)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "pruner",
    [
        "lightvla", "lightvla:multiplicity=set", "lightvla:min_tokens=40", "none", "random:seed=3",
        "random:draw=added,seed=3", "random:draw=dropped,seed=3",
    ],
)  # fmt: skip
def test_answers_are_the_eager_ones(eager, pruner, padded):
    eager.set_pruner(pruner)
    policy = run_by(eager, padded)
    for size in (1, 3):
        wanted, found = (p.act_batch(*asked(size), seeds=range(size)) for p in (eager, policy))
        np.testing.assert_allclose(found.actions, wanted.actions, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.selection.kept(), wanted.selection.kept())
        valid = found.selection.valid
        assert torch.equal(found.selection.index * valid, wanted.selection.index * wanted.selection.valid)
        assert torch.equal(found.selection.count * valid, wanted.selection.count * wanted.selection.valid)
        if wanted.selection.scores is not None:
            torch.testing.assert_close(found.selection.scores, wanted.selection.scores, atol=1e-5, rtol=1e-5)
    described = policy.description()["engine"]
    assert described["name"] == "compiled" and "instead_of_compiled" not in described


@pytest.mark.parametrize("readout", ["aligned", "tail"])
def test_both_read_outs_are_read(reference_directory, readout):
    policy = Policy.from_pretrained(
        reference_directory, dtype="float32", engine="compiled", pruner="lightvla:multiplicity=set",
        action_readout=readout,
    )  # fmt: skip
    eager = Policy(policy.checkpoint, policy.transform, policy.unnorm_key, "eager")
    for index in range(3):
        found, wanted = (p.act(observation(index), SENTENCES[index]) for p in (policy, eager))
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)
    assert policy.description()["engine"]["name"] == "compiled"


def test_bfloat16_stays_within_its_own_spread(reference_directory):
    """Mean distance from float32's actions, of the compiled engine and of the eager one."""
    exact = Policy.from_pretrained(reference_directory, dtype="float32", engine="eager")
    rough = Policy.from_pretrained(reference_directory, dtype="bfloat16", engine="compiled")
    by_eager = Policy(rough.checkpoint, rough.transform, rough.unnorm_key, "eager")
    wanted = exact.act_batch(*asked(6)).actions
    ours, theirs = (np.abs(p.act_batch(*asked(6)).actions - wanted).mean() for p in (rough, by_eager))
    assert rough.description()["engine"]["name"] == "compiled"
    assert 0 < ours <= 1.25 * theirs


def test_threads_do_not_mix_their_answers(eager):
    eager.set_pruner("lightvla")
    policy = run_by(eager, True)
    observations, sentences = asked(6)
    wanted = [policy.act(o, s) for o, s in zip(observations, sentences, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(policy.act, observations * 4, sentences * 4))
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted * 4, strict=True))


def test_what_was_answered_stays(eager):
    """Places are used again, what was handed out is not."""
    eager.set_pruner("lightvla")
    policy = run_by(eager, True)
    first = policy.act_batch([observation(0)], [SENTENCES[0]])
    before = first.selection.tokens.clone(), first.selection.scores.clone(), first.actions.copy()
    policy.act_batch([observation(1)], [SENTENCES[0]])
    assert torch.equal(before[0], first.selection.tokens) and torch.equal(before[1], first.selection.scores)
    assert np.array_equal(before[2], first.actions)


def test_an_engine_that_errs_is_given_up_at_the_first_observation(eager, monkeypatch, caplog):
    eager.set_pruner("lightvla")
    right = compiled.llama_layer

    def wrong(*arguments: object) -> torch.Tensor:
        return right(*arguments) * 1.01

    policy = run_by(eager, False)
    policy.engine._how = compiled.How(compiled.Kernels(), wrong)
    policy.warm_up()
    assert "instead_of_compiled" not in policy.description()["engine"], "nothing was really seen yet"
    found = policy.act(observation(0), SENTENCES[0])
    assert np.array_equal(found, eager.act(observation(0), SENTENCES[0]))
    assert "given up for eager: the first observation: normalised actions differ by" in caplog.text
    assert "normalised actions differ" in policy.description()["engine"]["instead_of_compiled"]


def test_only_near_ties_excuse_other_picks():
    eager_scores = torch.tensor([[[5.0, 1.0, 4.9999999], [1.0, 7.0, 2.0]]])
    ours = eager_scores.clone()
    ours[0, 0] = torch.tensor([4.0, 1.0, 5.0])
    assert compare_picks(ours, eager_scores, torch.float32) == (1, 0)
    ours[0, 1] = torch.tensor([9.0, 7.0, 2.0])
    assert compare_picks(ours, eager_scores, torch.float32) == (2, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p.set_pruner("lightvla_star:queries=4,site=llama,layer=1"), "drops tokens inside the model"),
        (lambda p: apply_film(p.model.vision_backbone, 32), "FiLM"),
        (lambda p: setattr(p, "action_head", p.model.autoregressive_head()), "several passes"),
    ],
)
def test_what_it_cannot_run_is_run_eagerly_and_says_why(small_policy_directory, change: Callable, reason: str):
    policy = Policy.from_pretrained(small_policy_directory, engine="compiled")
    if reason == "drops tokens inside the model":
        policy.model.set_pruner(PrunerSpec.parse("lightvla_star:queries=4,site=llama,layer=1"))
    else:
        change(policy)
    assert reason in policy.description()["engine"]["instead_of_compiled"]
    if reason != "several passes":
        policy.act(observation(0), SENTENCES[0])


def test_a_new_pruner_or_head_is_run(small_policy_directory):
    """Nothing that was prepared for the old one is used."""
    policy = Policy.from_pretrained(small_policy_directory, engine="compiled", pruner="none", dtype="float32")
    before = policy.act(observation(0), SENTENCES[0])
    policy.set_pruner("lightvla")
    eager = Policy(policy.checkpoint, policy.transform, policy.unnorm_key, "eager")
    assert policy.act_batch(*asked(1)).selection.index.shape[1] < policy.model.num_visual_tokens
    np.testing.assert_allclose(policy.act(*(x[0] for x in asked(1))), eager.act(*(x[0] for x in asked(1))), atol=1e-5)
    policy.set_pruner("none")
    policy.action_head = policy.model.discrete_head()
    assert not np.array_equal(policy.act(observation(0), SENTENCES[0]), before)


@pytest.mark.gpu
@pytest.mark.parametrize("pruner", ["lightvla", "none"])
def test_on_a_gpu_graphs_answer_as_eager_does(reference_directory, pruner):
    policy = Policy.from_pretrained(reference_directory, device="cuda", dtype="float32", pruner=pruner)
    eager = Policy(policy.checkpoint, policy.transform, policy.unnorm_key, "eager")
    policy.warm_up(SENTENCES[0])
    for size in (1, 3):
        wanted, found = (p.act_batch(*asked(size)) for p in (eager, policy))
        np.testing.assert_allclose(found.actions, wanted.actions, atol=1e-4)
        assert torch.equal(found.selection.kept(), wanted.selection.kept())
    described = policy.description()["engine"]
    assert described["name"] == "compiled" and described["cuda_graphs"] > 2


@pytest.mark.parametrize("pruner", ["lightvla", "none"])
def test_the_count_of_operations_is_torchs(eager, pruner):
    """The last layer computes nothing for rows that nobody reads."""
    eager.set_pruner(pruner)
    model, inputs = eager.model, eager.model_inputs(observation(0), SENTENCES[0])
    batch = {name: torch.as_tensor(value)[None] for name, value in inputs.items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    engine = CompiledEngine(Parts(model, eager.action_head, eager.proprio_projector))
    engine._how = compiled.How(compiled.Kernels(attend_plainly, attend_plainly))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter, engine.warming_up():
        kept = int(engine.answer(batch, Call()).selection.distinct()[0])
    parts = (model, eager.action_head, eager.proprio_projector)
    given = None if pruner == "none" else kept
    formula = count_flops(*parts, given, batch["input_ids"].shape[1], only_read_rows=True)
    assert counter.get_total_flops() == pytest.approx(formula.total, rel=0.002)
    assert formula.total < 0.99 * count_flops(*parts, given, batch["input_ids"].shape[1]).total


def test_an_interrupted_filling_is_not_taken_for_filled(eager):
    """Ctrl-C or want of memory while the text of another instruction is put into its place."""
    eager.set_pruner("lightvla")
    policy = run_by(eager, False)
    wanted = policy.act(observation(0), SENTENCES[0])
    (plan,) = policy.engine._plans.values()
    other = policy.model_inputs(observation(0), "turn off the stove")
    prompt = policy.engine._prompts(torch.as_tensor(other["input_ids"]))
    broken = replace(prompt, embeddings=prompt.embeddings[:, :1].expand(-1, 3))
    with pytest.raises(RuntimeError):
        plan._fill(torch.zeros(1), None, [broken])
    assert np.array_equal(policy.act(observation(0), SENTENCES[0]), wanted)


def test_what_was_found_out_about_one_pruner_is_not_held_against_another(eager):
    eager.set_pruner("lightvla")
    policy = run_by(eager, False)
    policy.act(observation(0), SENTENCES[0])
    policy.engine._give_up("a test")
    policy.act(observation(0), SENTENCES[0])
    assert policy.description()["engine"]["instead_of_compiled"] == "a test"
    policy.set_pruner("none")
    policy.act(observation(0), SENTENCES[0])
    assert policy.description()["engine"]["name"] == "compiled"
