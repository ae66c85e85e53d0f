"""Pruners inside the language model, FastV and reuse over time, against attention and layers computed by hand."""

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.models.batch import Call, Session
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.policy import Policy

TOKENS, LENGTHS = 32, (9, 14, 11)


@pytest.fixture(scope="module")
def model(bases):
    options = LoadOptions(dtype=torch.float32, pruner=PrunerSpec("none"))
    return load_checkpoint(bases[False], options).model.eval()


def ragged_batch(model, size=3):
    return {
        "input_ids": torch.randint(10, 200, (size, max(LENGTHS))),
        "attention_mask": torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS[:size])[:, None],
        "pixel_values": torch.randn(size, 2 * model.vision_backbone.channels_per_image, 64, 64),
    }


def sample(batch, row):
    one = {name: value[row : row + 1] for name, value in batch.items()}
    length = int(one["attention_mask"].sum())
    return {**one, "input_ids": one["input_ids"][:, :length], "attention_mask": one["attention_mask"][:, :length]}


def goes_into(model, block, one):
    """Hidden rows that an unpruned run gives to a layer, with mask and rotary factors."""
    seen = []
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    model.set_pruner(PrunerSpec("none"))
    model.action_hidden(**one)
    hook.remove()
    return seen[0]


def attention_by_hand(model, one, layer):
    """(V,) of one sample: the layer runs over the whole sequence, all heads and rows, as the stock eager layer does."""
    block = model.language_model.model.layers[layer]
    hidden, kwargs = goes_into(model, block, one)
    hidden, attention = block.input_layernorm(hidden), block.self_attn
    queries, keys = (
        projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *kwargs["position_embeddings"])
    weights = (queries @ keys.transpose(2, 3) / attention.head_dim**0.5 + kwargs["attention_mask"]).softmax(-1)
    return weights[0, :, 1 + TOKENS :, 1 : 1 + TOKENS].mean((0, 1))


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_fastv_keeps_what_the_layer_before_attends_to(model, layer):
    batch = ragged_batch(model)
    by_hand = [attention_by_hand(model, sample(batch, row), layer - 1) for row in range(3)]
    model.set_pruner(PrunerSpec.parse(f"fastv:layer={layer},tokens=7"))
    together = model.action_hidden(**batch)
    for row, received in enumerate(by_hand):
        torch.testing.assert_close(together.selection.scores[row], received, atol=1e-5, rtol=1e-4)
        assert together.selection.index[row].tolist() == sorted(received.topk(7).indices.tolist())
        alone = model.action_hidden(**sample(batch, row))
        torch.testing.assert_close(alone.rows[0], together.rows[row], atol=1e-5, rtol=1e-5)
    model.set_pruner(PrunerSpec.parse(f"fastv:layer={layer},keep=1"))
    everything = model.action_hidden(**batch).rows
    model.set_pruner(PrunerSpec("none"))
    torch.testing.assert_close(everything, model.action_hidden(**batch).rows, atol=1e-5, rtol=1e-5)


def run(model, batch, sessions):
    encoded = model.encode(
        batch["input_ids"], batch["attention_mask"], batch["pixel_values"], call=Call(None, None, None, sessions)
    )
    return model.run(encoded)


def moved(batch, patches):
    """The batch with other pixels in some patches of the first image."""
    pixels = batch["pixel_values"].clone()
    for patch in patches:
        top, left = patch // 4 * 16, patch % 4 * 16
        pixels[:, :3, top : top + 16, left : left + 16] = torch.randn(len(pixels), 3, 16, 16)
    return {**batch, "pixel_values": pixels}


@torch.no_grad()
def reused_by_hand(model, first, second, computed):
    """Rows of one sample's second query: layers one by one, with the first query's keys in the place of reused ones."""
    llama = model.language_model.model
    old, kwargs = goes_into(model, llama.layers[0], first)
    new, _ = goes_into(model, llama.layers[0], second)
    is_new = torch.ones(new.shape[1], dtype=torch.bool)
    is_new[1 : 1 + TOKENS] = computed
    rotary = kwargs["position_embeddings"]
    for block in llama.layers:
        # All rows are computed, from keys and values of which the reused ones belong to the first query.
        attention, normed = (
            block.self_attn,
            torch.where(is_new[:, None], *(block.input_layernorm(x) for x in (new, old))),
        )
        q, k, v = (
            project(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project, x in (
                (attention.q_proj, block.input_layernorm(new)),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        weights = (q @ k.transpose(2, 3) / attention.head_dim**0.5).softmax(-1)
        new = new + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        new = new + block.mlp(block.post_attention_layernorm(new))
        old = block(old, attention_mask=kwargs["attention_mask"], position_embeddings=rotary)
    return llama.norm(new)


@torch.no_grad()
def test_reused_tokens_keep_their_keys(model):
    batch = ragged_batch(model)
    later = moved(batch, [5])
    by_hand = [attention_by_hand(model, sample(batch, row), 1) for row in range(3)]
    tokens = [model.encode_images(b["pixel_values"]) for b in (batch, later)]
    similarity = torch.cosine_similarity(*tokens, dim=-1)
    threshold = round(similarity.flatten().sort().values[40].item(), 6)
    spec = PrunerSpec("static_reuse", {"tokens": 3, "similarity": threshold})
    model.set_pruner(PrunerSpec("none"))
    unpruned = model.action_hidden(**batch).rows
    model.set_pruner(spec)
    sessions = [Session() for _ in range(3)]
    first = run(model, batch, sessions)
    assert first.selection.kept().all()
    torch.testing.assert_close(first.rows, unpruned, atol=1e-5, rtol=1e-5)
    second = run(model, later, sessions)
    kept = second.selection.kept()
    counts = kept.sum(1).tolist()
    assert len(set(counts)) > 1 and max(counts) < TOKENS, "the samples should reuse different numbers of tokens"
    for row in range(3):
        important = set(by_hand[row].topk(3).indices.tolist())
        expected = [v for v in range(TOKENS) if similarity[row, v] < threshold or v in important]
        assert kept[row].nonzero().flatten().tolist() == expected
    for row in range(3):
        hidden = reused_by_hand(model, sample(batch, row), sample(later, row), kept[row])
        start = 1 + TOKENS + LENGTHS[row] - 1  # BOS, visual tokens, the prompt without BOS
        torch.testing.assert_close(second.rows[row], hidden[0, start - 1 : start + 55], atol=1e-4, rtol=1e-4)
    model.set_pruner(spec)
    for row in range(3):
        alone = [Session()]
        run(model, sample(batch, row), alone)
        again = run(model, sample(later, row), alone)
        assert torch.equal(again.selection.kept()[0], kept[row])
        torch.testing.assert_close(again.rows[0], second.rows[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_with_everything_computed_anew_a_memory_changes_nothing(model):
    batch = ragged_batch(model)
    model.set_pruner(PrunerSpec("static_reuse", {"keep": 1}))
    sessions = [Session() for _ in range(3)]
    run(model, moved(batch, range(16)), sessions)
    rows = run(model, batch, sessions).rows
    model.set_pruner(PrunerSpec("none"))
    torch.testing.assert_close(rows, model.action_hidden(**batch).rows, atol=1e-5, rtol=1e-5)


def observation(seed):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("full_image", "wrist_image")}
    return {**images, "state": np.zeros(8)}


def test_sessions_of_two_episodes_do_not_mix(small_policy_directory):
    policy = Policy.from_pretrained(
        small_policy_directory, dtype="float32", pruner="static_reuse:tokens=2,similarity=0.9"
    )
    words = ["turn on the stove", "open the drawer"]
    seen = [[observation(10 * episode + step) for step in range(3)] for episode in range(2)]
    alone = []
    for episode in range(2):
        session = policy.new_session()
        alone.append([policy.act(seen[episode][step], words[episode], session) for step in range(3)])
    sessions = [policy.new_session() for _ in range(2)]
    for step in range(3):
        together = policy.act_batch([seen[0][step], seen[1][step]], words, sessions)
        np.testing.assert_allclose(together.actions, [alone[0][step], alone[1][step]], atol=1e-5)
    assert (together.selection.distinct() < TOKENS).any(), "something should have been reused"
    without = policy.act_batch([seen[0][2]], words[:1])
    assert without.selection.kept().all() and np.abs(without.actions[0] - alone[0][2]).max() > 1e-6
    assert policy.act_batch([seen[0][2]], ["another task"], [sessions[0]]).selection.kept().all(), "begins anew"
    with pytest.raises(ValueError, match="one session stands twice in a batch"):
        policy.act_batch([seen[0][0]] * 2, words, [sessions[0]] * 2)
    with pytest.raises(ValueError, match="2 observations came with 1 sessions; give one each"):
        policy.act_batch([seen[0][0]] * 2, words, [sessions[0]])


def test_a_query_that_failed_is_not_remembered(small_policy_directory):
    policy = Policy.from_pretrained(
        small_policy_directory, dtype="float32", pruner="static_reuse:tokens=2,similarity=0.5"
    )
    session = policy.new_session()
    expected = policy.act(observation(0), "turn on the stove")
    weight = policy.model.projector.fc2.weight.data
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        policy.act(observation(1), "turn on the stove", session)
    weight.copy_(kept)
    np.testing.assert_allclose(policy.act(observation(0), "turn on the stove", session), expected, atol=1e-6)
