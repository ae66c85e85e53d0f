"""Diffusion, discrete tokens and FiLM equal the reference, pruned and not, and train."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_checkpoint import (
    EMPTY,
    diffusion_weights,
    film_weights,
    noisy_action_weights,
    reference_gauss,
    reference_sample,
    reference_training_targets,
    write_variant,
)

from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.options import LoadOptions
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner
from prismatic.policy import Policy
from prismatic.vla.normalization import normalize, unnormalize

KEY = "libero_tiny_no_noops"
PRUNERS = pytest.mark.parametrize("pruner", ["lightvla", "oft"])


@pytest.fixture(scope="module")
def numbers() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parents[1] / "data" / "reference_heads.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def diffusion_directory(reference_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    components = {"action_head": diffusion_weights(), "noisy_action_projector": noisy_action_weights()}
    return write_variant(reference_directory, tmp_path_factory.mktemp("diffusion") / "checkpoint", components)


@pytest.fixture(scope="module")
def film_directory(reference_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    components = {"vision_backbone": film_weights()}
    return write_variant(reference_directory, tmp_path_factory.mktemp("film") / "checkpoint", components)


def load(folder: Path, pruner: str, **options) -> Checkpoint:
    spec = PrunerSpec("lightvla", {"multiplicity": "set"}) if pruner == "lightvla" else PrunerSpec("none")
    readout = "tail" if pruner == "lightvla" else "aligned"
    options = {"action_readout": readout, **options}
    return load_checkpoint(folder, LoadOptions(dtype=torch.float32, pruner=spec, **options))


def encoded(checkpoint: Checkpoint, samples: list[dict], states: np.ndarray | None = None):
    rows = [torch.tensor([*s["input_ids"], *([] if s["input_ids"][-1] == EMPTY else [EMPTY])]) for s in samples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=32000)
    images = checkpoint.processor.image_processor([image for s in samples for image in s["images"]])["pixel_values"]
    if states is None:
        proprio = checkpoint.dataset_statistics[KEY]["proprio"]
        states = np.stack([normalize(s["state"], proprio) for s in samples])
    return checkpoint.model.encode(
        ids,
        ids != 32000,
        images.reshape(len(samples), -1, *images.shape[2:]),
        torch.from_numpy(states),
        checkpoint.proprio_projector,
    )


def watch_kept(model) -> list[np.ndarray]:
    kept: list[np.ndarray] = []
    model.pruner.register_forward_hook(lambda module, args, out: kept.append(out.kept()[0].numpy()))
    return kept


@PRUNERS
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_ten_steps_of_diffusion(diffusion_directory, numbers, pruner, index):
    checkpoint = load(diffusion_directory, pruner)
    model, head = checkpoint.model.eval(), checkpoint.action_head
    head.num_inference_steps = 10
    kept = watch_kept(model)
    start = torch.from_numpy(numbers[f"{pruner}/diffusion/{index}/start_noise"])
    actions, _ = head.predict(model, encoded(checkpoint, [reference_sample(index)]), start_noise=start)
    np.testing.assert_array_equal(head.scheduler.timesteps, numbers[f"{pruner}/timesteps"])
    statistics = checkpoint.dataset_statistics[KEY]["action"]
    expected = numbers[f"{pruner}/diffusion/{index}/actions"]
    np.testing.assert_allclose(
        unnormalize(actions[0].numpy(), statistics), expected, atol=0.1 if pruner == "lightvla" else 1e-3
    )
    if pruner == "lightvla":
        masks = np.unpackbits(numbers[f"lightvla/diffusion/{index}/kept"], axis=1).astype(bool)
        np.testing.assert_array_equal(np.stack(kept), masks)


@PRUNERS
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_film(film_directory, numbers, pruner, index):
    checkpoint = load(film_directory, pruner)
    model = checkpoint.model.eval()
    kept = watch_kept(model)
    batch = encoded(checkpoint, [reference_sample(index)])
    np.testing.assert_allclose(
        batch.visual.tokens[0].mean(-1), numbers[f"{pruner}/film/{index}/patches_rowmean"], atol=1e-4
    )
    actions, _ = checkpoint.action_head.predict(model, batch)
    actions = unnormalize(actions[0].numpy(), checkpoint.dataset_statistics[KEY]["action"])
    np.testing.assert_allclose(actions, numbers[f"{pruner}/film/{index}/actions"], atol=1e-3)
    if pruner == "lightvla":
        mask = np.unpackbits(numbers[f"lightvla/film/{index}/kept"]).astype(bool)
        np.testing.assert_array_equal(kept[0], mask)


def training(checkpoint: Checkpoint, pruner: str):
    """The reference's training batch, encoded, with the pruner in its training form and padding let into the scores."""
    model = checkpoint.model.train()
    model.pruner = TokenPruner("weighted").train() if pruner == "lightvla" else KeepAllTokens()
    model.config.action_readout = "aligned"
    plain_run = model.run
    model.run = lambda batch, **options: plain_run(batch, mask_padding=False, **options)
    actions, states = reference_training_targets(4)
    return model, encoded(checkpoint, [reference_sample(i) for i in range(4)], states), torch.from_numpy(actions)


@PRUNERS
@torch.no_grad()
def test_cross_entropy_of_action_tokens(reference_directory, numbers, pruner):
    checkpoint = load(reference_directory, pruner)
    model, batch, actions = training(checkpoint, pruner)
    loss = model.discrete_head().loss(model, batch, {"actions": actions}).loss
    assert loss.item() == pytest.approx(float(numbers[f"{pruner}/discrete_loss"]), abs=1e-4)


@PRUNERS
def test_diffusion_loss_and_gradients(diffusion_directory, numbers, pruner):
    checkpoint = load(diffusion_directory, pruner)
    model, batch, actions = training(checkpoint, pruner)
    draws = {
        "actions": actions,
        "diffusion_noise": torch.from_numpy(reference_gauss((4, 8, 7), 21)),
        "diffusion_timesteps": torch.tensor([0, 7, 31, 49]),
    }
    head = checkpoint.action_head
    outcome = head.loss(model, batch, draws)
    assert outcome.loss.item() == pytest.approx(float(numbers[f"{pruner}/diffusion_loss"]), abs=1e-4)
    outcome.loss.backward()
    gradients = {
        "noisy_fc1": head.noisy_action_projector.fc1.weight.grad,
        "projector_fc3": model.projector.fc3.weight.grad[::4],
    }
    for name, gradient in gradients.items():
        expected = numbers[f"{pruner}/diffusion_grad_{name}"]
        assert np.linalg.norm(gradient.numpy() - expected) / np.linalg.norm(expected) < 1e-3, name


@pytest.mark.parametrize("kind", ["diffusion", "film"])
def test_round_trip(request, tmp_path, kind):
    """Saved and loaded again: the same files with the same tensors, and the same actions."""
    source = request.getfixturevalue(f"{kind}_directory")
    first = load_checkpoint(source, LoadOptions(pruner=PrunerSpec("lightvla")))
    saved = save_checkpoint(tmp_path / "a", first, 100)
    again = load_checkpoint(saved, LoadOptions())
    twice = save_checkpoint(tmp_path / "b", again, 100)
    assert {f.name for f in saved.iterdir()} == {f.name for f in twice.iterdir()}
    for file in saved.glob("*.pt"):
        ours, theirs = (torch.load(folder / file.name, weights_only=True) for folder in (saved, twice))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), file.name
        published = torch.load(source / file.name, weights_only=True)
        names = {name.removeprefix("module."): value for name, value in published.items()}
        assert names.keys() == ours.keys(), file.name
        assert all(names[name].shape == ours[name].shape for name in names)
    for name in ("config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (twice / name).read_bytes()
    batches = [encoded(c, [reference_sample(0), reference_sample(1)]) for c in (first, again)]
    assert torch.equal(batches[0].visual.tokens, batches[1].visual.tokens)


@PRUNERS
def test_samples_of_a_diffusion_batch_do_not_see_each_other(diffusion_directory, pruner):
    checkpoint = load(diffusion_directory, pruner, action_readout="aligned")
    model, head = checkpoint.model.eval(), checkpoint.action_head
    head.num_inference_steps = 2
    samples = [reference_sample(i) for i in range(3)]
    noise = torch.from_numpy(reference_gauss((3, 8, 7), 1))
    with torch.no_grad():
        together, _ = head.predict(model, encoded(checkpoint, samples), start_noise=noise)
        for row, sample in enumerate(samples):
            alone, _ = head.predict(model, encoded(checkpoint, [sample]), start_noise=noise[row : row + 1])
            torch.testing.assert_close(alone[0], together[row], atol=2e-4, rtol=1e-3)
        seeded, _ = head.predict(model, encoded(checkpoint, samples), seeds=[1, 2, 3])
        for row, sample in enumerate(samples):
            alone, _ = head.predict(model, encoded(checkpoint, [sample]), seeds=[row + 1])
            torch.testing.assert_close(alone[0], seeded[row], atol=2e-4, rtol=1e-3)
        assert not torch.allclose(seeded, together, atol=0.05)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("diffusion", {"head": "l1"}, "holds a head of kind 'diffusion', but 'l1' was asked for"),
        ("diffusion", {"head": "discrete"}, "set use_diffusion"),
        ("reference", {"head": "diffusion"}, "holds a head of kind 'l1'"),
        ("reference", {"use_film": True}, "has no vision_backbone--"),
        ("film", {"use_film": False}, "has FiLM"),
        ("reference", {"head": "gaussian"}, "unknown kind of action head 'gaussian'; known: l1, diffusion, discrete"),
    ],
)
def test_what_the_checkpoint_does_not_hold_is_refused(request, kind, options, words):
    with pytest.raises(ValueError, match=words):
        load_checkpoint(request.getfixturevalue(f"{kind}_directory"), LoadOptions(**options))


def test_the_number_of_diffusion_steps_is_recorded_given_or_assumed(diffusion_directory, tmp_path):
    """A published checkpoint records none; what is saved does, and nothing else is then accepted."""
    assumed = load_checkpoint(diffusion_directory)
    assert assumed.action_head.num_train_steps == 50
    assert "config.json records no number of diffusion steps: assumed 50" in assumed.assumptions
    given = load_checkpoint(diffusion_directory, LoadOptions(num_diffusion_steps_train=20))
    assert given.action_head.num_train_steps == 20 and not any("diffusion" in text for text in given.assumptions)
    saved = save_checkpoint(tmp_path / "saved", given, 0)
    assert load_checkpoint(saved).action_head.num_train_steps == 20
    with pytest.raises(ValueError, match="num_diffusion_steps_train 50: .* was trained with 20 steps; leave it out"):
        load_checkpoint(saved, LoadOptions(num_diffusion_steps_train=50))


def test_random_tokens_are_drawn_anew_at_every_denoising_step(diffusion_directory):
    policy = Policy.from_pretrained(diffusion_directory, pruner="random:seed=3")
    policy.action_head.num_inference_steps = 3
    kept = watch_kept(policy.model)
    sample = reference_sample(0)
    seen = {"full_image": sample["images"][0], "wrist_image": sample["images"][1], "state": sample["state"]}
    actions = [policy.act_batch([seen], ["turn on the stove"], seeds=[5]).actions for _ in range(2)]
    assert len({mask.tobytes() for mask in kept[:3]}) == 3
    np.testing.assert_array_equal(kept[:3], kept[3:])
    np.testing.assert_array_equal(*actions)


def test_half_a_diffusion_head_is_refused(diffusion_directory, tmp_path):
    folder = write_variant(diffusion_directory, tmp_path / "half", {})
    (folder / "action_head--100_checkpoint.pt").unlink()
    with pytest.raises(ValueError, match="a diffusion head needs both"):
        load_checkpoint(folder)


def test_quantization_is_refused_where_it_cannot_work(reference_directory):
    with pytest.raises(ValueError, match="bitsandbytes|CUDA"):
        load_checkpoint(reference_directory, LoadOptions(quantization="4bit"))


def test_a_head_of_another_chunk_is_refused(reference_directory):
    robot = load_checkpoint(reference_directory).model.robot
    with pytest.raises(ValueError, match="the head was made for another robot"):
        load_checkpoint(reference_directory, LoadOptions(robot=replace(robot, action_dim=14)))


def test_new_diffusion_heads_start_without_files() -> None:
    head = DiffusionActionHead(16, 7, 8, num_train_steps=20)
    assert head.num_train_steps == 20
    assert head.predict_noise(torch.zeros(2, 56, 16)).shape == (2, 8, 7)
