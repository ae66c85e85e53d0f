"""Runs that meet values that are not finite, or pictures that cannot be read; loss spikes and collapsed pruners."""

import json
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import draccus
import numpy as np
import pytest
import torch
from fixtures_rlds import hand_made, write_by_hand

from prismatic.policy import Policy
from prismatic.training.build import Run, build
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.health import CollapseDetector, Signs, SpikeDetector, gradient_norm
from prismatic.training.loading import substitute, train_batches
from prismatic.training.loop import BadInput, finetune, train
from prismatic.training.preemption import StopRequest
from prismatic.training.step import seed_dropout
from prismatic.vla.datasets.sampler import index_at

ALONE = Ranks(0, 1, torch.device("cpu"))
FRAMES = [(episode, step) for episode in range(4) for step in range(15 + episode - 7)]
"""(episode, step) of every frame of the tiny dataset."""


def lines(config: FinetuneConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def spoil(run: Run, *positions: int, kind: str = "loss") -> Run:
    """Make the loss of batches with one of these samples NaN, or its gradient infinite."""

    def hook(_module, arguments, output):
        loss, metrics = output
        if not {*positions} & {*arguments[0]["positions"].tolist()}:
            return output
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.inf)
            return output
        metrics.loss = metrics.loss * torch.nan
        return loss * torch.nan, metrics

    run.module.register_forward_hook(hook)
    return run


def trained(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.training.trained.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    ("kind", "what"), [("loss", "the loss is nan"), ("gradient", "the norm of the gradient is (inf|nan)")]
)
def test_a_step_that_is_not_finite_stops_the_run_by_name(flags, kind: str, what: str):
    config = flags(save_freq=2, max_steps=5, log_freq=5)  # not at log times only
    run = spoil(build(config, ALONE), 9, kind=kind)
    with pytest.raises(FloatingPointError) as error:
        train(run)
    places = [FRAMES[index_at(config.seed, position, len(FRAMES))] for position in range(8, 12)]
    names = ", ".join(f"libero_tiny_no_noops episode {episode} step {step}" for episode, step in places)
    error.match(rf"^{what} at step 3, for {names}\. Nothing of that step was applied or saved; the last checkpoint is ")
    error.match(
        r"--2_chkpt\. Lower --learning_rate .0\.001. or set --max_grad_norm 1, and go on with --resume True "
        rf"--run_id_override {re.escape(config.run_id)}; or begin anew with --precision fp32; --on_nan skip leaves"
    )
    assert run.training.step == 2 and not config.checkpoint_dir(5).exists()
    assert all(parameter.isfinite().all() for parameter in run.training.trained.values())


def test_many_samples_are_counted(flags):
    run = spoil(build(flags(batch_size=5, grad_accumulation_steps=2), ALONE), 4, kind="gradient")
    with pytest.raises(
        FloatingPointError,
        match=r"(\w+ episode \d step \d+, ){7}[\w ]+ and 2 others\. Nothing .*there is no checkpoint yet",
    ):
        train(run)


def apart(make, step: int, position: int, **overrides) -> Run:
    """A run that has taken two steps and goes on behind `step` at `position`, as if nothing had been between."""
    run = build(make(run_id_override="apart", max_steps=2, **overrides), ALONE)
    train(run)
    run.training.step, run.training.position, run.config.max_steps = step, position, 4
    train(run)
    return run


def test_a_skipped_step_changes_nothing_but_the_place(flags):
    shared = {"noise_schedule": "constant", "ema_decay": 0.9}
    config = flags(on_nan="skip", max_steps=4, **shared)
    run = spoil(build(config, ALONE), 9)
    train(run)
    assert [line["skipped_steps"] for line in lines(config)] == [0, 0, 1, 1]
    assert [line["step"] for line in lines(config) if "loss" in line] == [1, 2, 4]
    expected = apart(flags, 3, 12, **shared)
    assert run.training.position == expected.training.position == 16
    assert_same(trained(run), trained(expected))


class Follows:
    """A callback that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def is_due(self, step: int) -> bool:
        return True

    def rewind(self, step: int) -> None:
        self.told.append(("back to", step))

    def __call__(self, step: int, policy: Policy, stop: StopRequest) -> dict[str, float]:
        self.told.append(("behind", step))
        return {}


def test_a_rollback_goes_on_behind_the_bad_batch(flags, caplog):
    config = flags(on_nan="rollback", max_steps=4, save_freq=2, noise_schedule="constant")
    run, follows = spoil(build(config, ALONE), 13), Follows()
    train(run, [follows])
    steps = ("back to", 0), ("behind", 1), ("behind", 2), ("behind", 3), ("back to", 2), ("behind", 3), ("behind", 4)
    assert follows.told == [*steps]
    assert "rolled back: the loss is nan at step 4, for libero_tiny" in caplog.text
    assert [(line["step"], line["rollbacks"]) for line in lines(config)] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    expected = apart(flags, 2, 16, noise_schedule="constant")
    assert run.training.position == expected.training.position == 24
    assert_same(trained(run), trained(expected))


@pytest.mark.parametrize(
    ("on_nan", "save_freq", "message"),
    [
        ("skip", 100, "the loss is nan at step 12, .*no checkpoint yet.*; 10 steps before it were skipped, too"),
        ("rollback", 100, "the loss is nan at step 2, .*no checkpoint yet.*--on_nan rollback needs one .--save_freq"),
        ("rollback", 1, "the loss is nan at step 2, .*last checkpoint is .*--1_chkpt.*; 3 returns to it have led"),
    ],
)
def test_what_does_not_pass_stops_the_run(flags, on_nan: str, save_freq: int, message: str):
    config = flags(on_nan=on_nan, max_steps=14, save_freq=save_freq, batch_size=1)
    run = spoil(build(config, ALONE), *range(1, 14))
    with pytest.raises(FloatingPointError, match=message):
        train(run)


def test_a_policy_that_is_not_known_is_said(flags):
    with pytest.raises(BadInput, match="--on_nan 'ignore' is unknown; choose one of stop, skip, rollback"):
        finetune(flags(on_nan="ignore"))
    with pytest.raises(BadInput, match="--max_bad_samples -1: expected 0 or more"):
        finetune(flags(max_bad_samples=-1))


def test_the_norm_of_the_gradient_is_that_of_one_long_vector():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2))]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(parameter.shape)
    flat = np.concatenate([parameter.grad.numpy().ravel() for parameter in parameters[:2]])
    assert gradient_norm(parameters).item() == pytest.approx(np.sqrt((flat.astype(np.float64) ** 2).sum()), rel=1e-6)
    parameters[1].grad[2] = torch.nan
    assert gradient_norm(parameters).isnan()


def test_dropout_is_a_function_of_seed_step_micro_step_and_rank():
    def draw(*place: int) -> tuple[float, ...]:
        seed_dropout(*place)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, micro, rank) for seed in (0, 1) for step in (0, 1) for micro in (0, 1) for rank in (0, 1)]
    draws = [draw(*place) for place in places]
    assert len({*draws}) == len(places) and draws == [draw(*place) for place in places]


def test_a_spike_is_far_above_the_recent_median():
    rng = np.random.default_rng(0)
    calm = 0.1 + 0.01 * rng.standard_normal(300)
    detector = SpikeDetector()
    assert [detector.usual(loss) for loss in calm] == [None] * 300
    assert detector.usual(0.3) == pytest.approx(np.median(calm[-20:]))
    assert [detector.usual(loss) is not None for loss in [0.3] * 15] == [True] * 9 + [False] * 6  # it stays there
    jumpy = SpikeDetector()
    flagged = [jumpy.usual(loss) for loss in np.exp(0.7 * rng.standard_normal(1000))]
    assert sum(usual is not None for usual in flagged) < 20
    falling = SpikeDetector()
    assert not any(map(falling.usual, np.geomspace(10, 0.1, 50)))


def test_a_collapsed_pruner_is_told_once_with_the_remedy(caplog):
    detector = CollapseDetector()
    told = [detector.has_collapsed(kept) for kept in [2.0] * 19 + [5.0] + [2.0] * 40]
    assert [number for number, is_told in enumerate(told) if is_told] == [39]
    signs = Signs()
    for step in range(1, 60):
        collapsed = {"collapsed": 1.0} if step == 20 else {}
        assert signs.read(step, {"loss": 0.1, "tokens_kept": 2.0}) == {"loss_spike": 0.0, **collapsed}
    assert caplog.text.count("the pruner keeps 2.0 tokens per sample, fewer than 4 for 20 lines") == 1
    assert "step 20:" in caplog.text and "--pruner none first" in caplog.text and "min_tokens" in caplog.text


def cut(root: Path, *steps: int) -> dict[str, object]:
    """A dataset of one episode of 40 steps (33 frames) whose pictures at these steps are cut off; its flags."""
    episode = hand_made(40)
    for step in steps:
        episode["steps/observation/image"][step] = episode["steps/observation/image"][step][:300]
    write_by_hand(root, "libero_cut", train=[episode])
    return {"data_root_dir": root, "dataset_name": "libero_cut", "batch_size": 4}


def test_another_frame_stands_for_one_that_cannot_be_read_and_all_else_stays(flags, tmp_path: Path):
    good = build(flags(**cut(tmp_path / "good")), ALONE)
    bad = build(flags(**cut(tmp_path / "bad", 17, 20)), ALONE)
    expected = list(islice(train_batches(good), 16))
    found = list(islice(train_batches(bad), 16))
    replaced = 0
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a["positions"], b["positions"])
        for row, position in enumerate(a["positions"].tolist()):
            frame, attempt = a["indices"][row], 0
            while frame in (17, 20):
                attempt += 1
                frame = substitute(bad.config.seed, position, attempt, 33)
            replaced += attempt > 0
            assert b["indices"][row] == frame
            same = torch.equal(a["pixel_values"][row], b["pixel_values"][row])
            assert same == (attempt == 0)
    assert replaced >= 2 and bad.bad_samples.are_new


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_named_once_and_counted(flags, tmp_path: Path, caplog, workers: int):
    config = flags(**cut(tmp_path, 17, 20), num_workers=workers, max_steps=18, max_bad_samples=2, log_freq=18)
    finetune(config)
    assert lines(config)[-1]["bad_samples"] == 2
    for step in (17, 20):
        assert caplog.text.count(f"libero_cut episode 0 step {step}: image of camera 'full_image' at byte") == 1


def test_too_many_bad_pictures_end_the_run_behind_a_checkpoint(flags, tmp_path: Path):
    config = flags(**cut(tmp_path, 17, 20), max_steps=18, max_bad_samples=1, seed=1)
    with pytest.raises(
        BadInput, match=r"^2 stored pictures cannot be decoded, the last one: libero_cut episode 0 "
    ) as e:
        finetune(config)
    assert "(--max_bad_samples 1). Write it again; --resume True then goes on" in str(e.value)
    taken = lines(config)[-1]["step"]
    assert 0 < taken < 18 and config.checkpoint_dir(taken).is_dir()


def test_data_without_any_picture_that_can_be_read_end_the_run(flags, tmp_path: Path):
    with pytest.raises(BadInput, match="none of 20 frames drawn one after another can be read, the last: libero_cut"):
        finetune(flags(**cut(tmp_path, *range(1, 40))))


PROCESS = """
import sys, draccus, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_health import spoil
from prismatic.training.build import build
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import ranks
from prismatic.training.loop import train

config = draccus.load(FinetuneConfig, Path(sys.argv[1]).open())
with ranks("cpu") as group:
    assert group.any([group.rank == 0, group.rank == 1, False]) == [True, True, False]
    train(spoil(build(config, group), 13))
"""


@pytest.mark.slow
def test_two_processes_decide_what_one_decides(flags, tmp_path: Path):
    """Position 13 spoils the second batch of the second process only, and the cut pictures are met by one of them."""
    shared = cut(tmp_path, 17, 20) | {"max_steps": 9, "on_nan": "skip"}
    one = flags(**shared, run_id_override="one")
    one.batch_size = 8
    train(spoil(build(one, ALONE), 13))
    two = flags(**shared, run_id_override="two")
    (tmp_path / "two.yaml").write_text(draccus.dump(two))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-c", PROCESS, str(tmp_path / "two.yaml"), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [(line["step"], line["skipped_steps"], line["bad_samples"]) for line in lines(one)]
    assert told == [(line["step"], line["skipped_steps"], line["bad_samples"]) for line in lines(two)]
    assert told[1][1] == 1 and told[-1][2] == 2 and "loss" not in lines(two)[1]
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.get("loss") == pytest.approx(b.get("loss"), abs=1e-4)
