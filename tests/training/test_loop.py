import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_rlds import write_tiny_rlds
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.files import PROCESSOR_FILES
from prismatic.checkpoints.saving import load_training_state, save_checkpoint
from prismatic.policy import Policy
from prismatic.stored_files import load_component
from prismatic.training.build import build
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.loop import BadInput, finetune, train
from prismatic.vla.datasets.collate import collate


def lines(config: FinetuneConfig) -> list[dict]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_checkpoint(folder)
    parts = {"": checkpoint.model, "head.": checkpoint.action_head, "proprio.": checkpoint.proprio_projector}
    return {
        prefix + name: value
        for prefix, part in parts.items()
        if part is not None
        for name, value in part.state_dict().items()
    }


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert set(a) == set(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def test_a_run_learns_tells_and_saves(flags):
    config = flags(max_steps=12, use_val_set=True, val_freq=6, ema_decay=0.5, max_grad_norm=1.0)
    folder = finetune(config)
    assert folder == config.checkpoint_dir(12) and folder.is_dir()
    told = [line for line in lines(config) if "loss" in line]
    assert [line["step"] for line in told] == list(range(1, 13))
    assert told[-1]["loss"] < told[0]["loss"]
    first = told[0]
    assert first["noise_scale"] == 1.0 and first["learning_rate"] == 1e-3 and first["grad_norm"] > 0
    assert len(first["tokens_kept_per_image"]) == 2
    assert sum(first["tokens_kept_per_image"]) == pytest.approx(first["tokens_kept"])
    assert [line["step"] for line in lines(config) if "val_loss" in line] == [6, 12]
    assert json.loads((folder / "config.json").read_text())["center_crop"] is True
    assert list(json.loads((folder / "dataset_statistics.json").read_text())) == ["libero_tiny_no_noops"]


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_saved_checkpoint_is_the_trained_policy(flags, small_base: Path, use_lora):
    folder = finetune(flags(use_lora=use_lora, lora_rank=4, max_steps=2))
    policy = Policy.from_pretrained(folder, dtype="float32")
    rng = np.random.default_rng(0)
    observation = {
        "full_image": rng.integers(0, 255, (64, 64, 3), np.uint8),
        "wrist_image": rng.integers(0, 255, (64, 64, 3), np.uint8),
        "state": np.zeros(8),
    }
    actions = policy.act(observation, "turn on the stove")
    assert actions.shape == (8, 7) and np.isfinite(actions).all()
    auto = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    assert set(auto.state_dict()) == set(load_checkpoint(small_base).model.state_dict())
    state = policy.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in auto.state_dict().items())
    base = load_checkpoint(small_base).model.state_dict()
    assert any(not torch.equal(state[name], base[name]) for name in base), "nothing was learnt"
    assert (folder / "lora_adapter" / "adapter_model.safetensors").is_file() == use_lora


@pytest.mark.parametrize(
    "overrides",
    [
        {"ema_decay": 0.9, "lr_schedule": "cosine"},
        {"use_lora": True, "lora_rank": 4, "grad_accumulation_steps": 2, "batch_size": 2},
        {"use_lora": True, "lora_rank": 4, "lora_dropout": 0.1, "grad_accumulation_steps": 2, "batch_size": 2},
        {"save_latest_checkpoint_only": True},
        {"use_lora": True, "lora_rank": 4, "pruner": "lightvla_star:site=llama,layer=1,queries=6"},
        {"use_lora": True, "lora_rank": 4, "pruner": "grids:tokens=4"},
    ],
    ids=["full", "lora", "dropout", "latest", "queries", "points"],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(flags, overrides):
    whole = finetune(flags(run_id_override="whole", **overrides))
    broken = flags(run_id_override="broken", save_freq=2, **overrides)
    # Stop behind step 2: the schedule of 4 steps goes on, so only the loop may end early.
    interrupted = stop_after(broken, 2)
    assert interrupted.is_dir()
    resumed = finetune(broken)
    assert_same_weights(whole, resumed)
    told = {line["step"]: line["loss"] for line in lines(broken)}
    assert told == {line["step"]: line["loss"] for line in lines(flags(run_id_override="whole"))}


def stop_after(config: FinetuneConfig, step: int) -> Path:
    """Run `config`, but as if killed one step behind the checkpoint of `step`."""
    config.run_dir.mkdir(parents=True, exist_ok=True)

    class Killed(BaseException):
        pass

    class StoppingRanks(Ranks):
        def any(self, flags: Sequence[bool]) -> list[bool]:  # what is asked behind a step
            if run.training.step == step + 1:
                raise Killed
            return super().any(flags)

    run = build(config, StoppingRanks(0, 1, torch.device("cpu")))
    with pytest.raises(Killed):
        train(run)
    return config.checkpoint_dir(step)


def test_accumulated_micro_batches_equal_one_large_batch(flags):
    large = flags(run_id_override="large", batch_size=4, max_steps=2)
    small = flags(run_id_override="small", batch_size=2, grad_accumulation_steps=2, max_steps=2)
    finetune(large)
    finetune(small)
    assert [line["step"] for line in lines(small)] == [1, 2]
    for a, b in zip(lines(large), lines(small), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["tokens_kept"] == b["tokens_kept"]


def test_a_finished_run_is_not_overwritten(flags):
    folder = finetune(flags(max_steps=1))
    assert finetune(flags(max_steps=1)) == folder, "a job that is queued again has nothing to do"
    with pytest.raises(BadInput, match="already has a checkpoint .*leave out --resume False"):
        finetune(flags(max_steps=1, resume=False))
    with pytest.raises(BadInput, match="is at step 1 already; to go on pass --max_steps"):
        finetune(flags(max_steps=1, resume=True))
    with pytest.raises(BadInput, match=r"--resume 7: the run in .* has no checkpoint of that step \(1\)"):
        finetune(flags(max_steps=2, resume=True, resume_step=7))
    with pytest.raises(BadInput, match="--use_lora True: the run in .* had False"):
        finetune(flags(max_steps=2, resume=True, use_lora=True))
    with pytest.raises(BadInput, match="--max_steps 2: the run in .* had 1. .* --resume True to go on with the new"):
        finetune(flags(max_steps=2))
    with pytest.raises(BadInput, match="a step of 1 processes with --batch_size 2 .* has 2 samples, .* have 4"):
        finetune(flags(max_steps=2, resume=True, batch_size=2))


def test_an_extended_run_keeps_the_length_of_its_schedules(flags):
    shared = {"lr_schedule": "cosine", "learning_rate": 1e-3}
    finetune(flags(max_steps=2, **shared))
    finetune(flags(max_steps=4, resume=True, **shared))
    told = lines(flags())
    assert [line["noise_scale"] for line in told] == [1.0, 0.5, 0.0, 0.0]
    assert [line["learning_rate"] for line in told] == pytest.approx([1e-3, 5e-4, 2e-5, 2e-5])
    record = json.loads((flags().run_dir / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 2]
    assert record["starts"][1]["changes"] == [{"flag": "max_steps", "was": 2, "now": 4}]


def test_a_second_stage_is_a_run_of_its_own(flags):
    """What lost runs: a stage that begins with another's checkpoint went on with that other run."""
    first = flags(run_id_override="first", pruner="none")
    finetune(first)
    second = flags(run_id_override="second", pruner="lightvla", vla_path=str(first.run_dir), max_steps=3, save_freq=2)
    whole = flags(run_id_override="whole", pruner="lightvla", vla_path=str(first.run_dir), max_steps=3)
    before = {path: path.stat().st_mtime_ns for path in first.run_dir.rglob("*")}
    stop_after(second, 2)
    assert_same_weights(finetune(second), finetune(whole))
    assert before == {path: path.stat().st_mtime_ns for path in first.run_dir.rglob("*")}
    facts = json.loads((second.run_dir / "run.json").read_text())["facts"]
    assert facts["base"] == str(first.checkpoint_dir(4)), "absolute, and the checkpoint itself"


def test_a_stage_that_begins_with_a_checkpoint_is_never_the_run_of_that_checkpoint(flags):
    shared = {"run_id_override": None, "max_steps": 2, "save_freq": 2, "use_lora": True, "lora_rank": 4}
    first = flags(**shared)
    finetune(first)
    checkpoint = str(first.run_dir) + "--2_chkpt"
    second = flags(**{**shared, "vla_path": checkpoint, "learning_rate": 1e-4})
    finetune(second)
    again = flags(**{**shared, "vla_path": checkpoint, "learning_rate": 1e-4, "resume": True, "max_steps": 3})
    assert again.run_dir == second.run_dir != first.run_dir
    finetune(again)
    assert not first.checkpoint_dir(3).exists() and second.checkpoint_dir(3).is_dir()


def test_the_base_is_what_a_run_folder_stood_for_at_first(flags):
    first = flags(run_id_override="first", pruner="none", max_steps=2, save_freq=1)
    finetune(first)
    second = flags(run_id_override="second", vla_path=str(first.run_dir), use_lora=True, lora_rank=4, save_freq=2)
    stop_after(second, 2)
    finetune(flags(run_id_override="first", pruner="none", max_steps=3, resume=True))
    finetune(second)
    facts = json.loads((second.run_dir / "run.json").read_text())["facts"]
    assert facts["base"] == str(first.checkpoint_dir(2))


def test_a_finished_run_of_another_base_or_of_other_data_is_not_taken(
    flags, small_base: Path, data_root, tmp_path: Path
):
    finetune(flags(max_steps=1))
    other = Path(shutil.copytree(small_base, tmp_path / "base"))
    state = load_file(other / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in state.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(BadInput, match="the run was trained on weights sha256:.* now holds sha256"):
        finetune(flags(max_steps=1, vla_path=str(other)))
    root = tmp_path / "data"
    write_tiny_rlds(root, flags().dataset_name, episodes=4, steps=16, size=64)
    with pytest.raises(BadInput, match="has changed since"):
        finetune(flags(max_steps=1, data_root_dir=root))


def test_what_is_refused_moves_nothing(flags, small_base: Path, tmp_path: Path):
    config = flags(save_freq=1, max_steps=2, use_lora=True, lora_rank=4)
    finetune(config)
    other = Path(shutil.copytree(small_base, tmp_path / "base"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="the run was trained on weights"):
        finetune(flags(max_steps=2, use_lora=True, lora_rank=4, vla_path=str(other), resume="1"))
    assert (
        config.checkpoint_dir(2).is_dir()
        and (config.run_dir / "checkpoints" / "latest").resolve().name == "run--2_chkpt"
    )


def test_a_run_folder_that_was_renamed_or_copied_goes_on(flags):
    whole = finetune(flags(run_id_override="whole"))
    config = flags(run_id_override="run", save_freq=2)
    stop_after(config, 2)
    shutil.copytree(config.run_dir, config.run_dir.with_name("copied"))  # links become what they lead to
    assert not (config.run_dir.with_name("copied") / "checkpoints" / "latest").is_symlink()
    assert_same_weights(whole, finetune(flags(run_id_override="copied", save_freq=2)))
    assert [
        start["step"]
        for start in json.loads((flags(run_id_override="copied").run_dir / "run.json").read_text())["starts"]
    ] == [0, 2]


def test_published_ways_to_resume_go_on_with_the_run(flags, monkeypatch):
    whole = finetune(flags(run_id_override="whole", use_lora=True, lora_rank=4))
    own = {"run_id_override": "own", "use_lora": True, "lora_rank": 4, "save_freq": 2}
    stop_after(flags(**own), 2)
    root = flags().run_root_dir
    monkeypatch.chdir(root)
    for vla_path in ("own--2_chkpt", "own"):
        finetune(flags(**own, vla_path=vla_path, resume=True, resume_step=2))
        assert_same_weights(whole, flags(**own).checkpoint_dir(4))


def test_checkpoints_of_the_earlier_layout_go_on(flags):
    whole = finetune(flags(run_id_override="whole", ema_decay=0.9))
    config = flags(run_id_override="run", ema_decay=0.9)
    inside = stop_after(flags(run_id_override="run", ema_decay=0.9, save_freq=2), 2)
    (config.run_dir / "checkpoints" / "latest").unlink()
    inside.rename(config.run_dir.parent / inside.name)
    (config.run_dir.parent / inside.name / "manifest.json").unlink()
    assert_same_weights(whole, finetune(config))


def test_what_is_kept(flags):
    shared = {"use_val_set": True, "val_freq": 100, "save_freq": 1, "max_steps": 5}
    config = flags(keep_last=1, keep_best=True, **shared)
    finetune(config)
    losses = {line["step"]: line["val_loss"] for line in lines(config) if "val_loss" in line}
    assert [*losses] == [1, 2, 3, 4, 5], "each save is validated"
    best = min(losses, key=lambda step: (losses[step], step))
    there = {int(path.name.split("--")[1].split("_")[0]) for path in config.checkpoint_dir(0).parent.glob("*_chkpt")}
    assert there == {best, 4, 5}
    assert load_checkpoint(config.run_dir / "checkpoints" / "best").path == config.checkpoint_dir(best)


def test_a_run_that_removed_what_it_went_on_from_saves_whole_checkpoints(flags):
    """All weights are trained, so it goes on from its own checkpoint, which a later save removes."""
    config = flags(save_freq=1, keep_last=1, max_steps=4)
    begun = stop_after(config, 1)
    beside = {name for name in PROCESSOR_FILES if (begun / name).is_file()}
    last = finetune(config)
    assert not begun.exists() and beside >= {"tokenizer.json", "preprocessor_config.json"}
    assert {name for name in PROCESSOR_FILES if (last / name).is_file()} == beside
    load_checkpoint(last)


@pytest.mark.parametrize("background", ["True", "False"])
def test_a_checkpoint_is_of_its_step_though_training_goes_on(flags, background, monkeypatch):
    """Writing takes longer than the steps behind it."""
    write = save_checkpoint

    def slow(*arguments, **more):
        time.sleep(0.5)
        return write(*arguments, **more)

    monkeypatch.setattr("prismatic.training.runs.saving.save_checkpoint", slow)
    shared = {"use_lora": True, "lora_rank": 4, "ema_decay": 0.5}
    finetune(flags(run_id_override="long", save_freq=1, max_steps=3, save_in_background=background, **shared))
    for step in (1, 2):
        short = flags(run_id_override="long", resume=str(step), max_steps=3, **shared)
        state = load_training_state(short.checkpoint_dir(step))
        assert state["step"] == step
    told = lines(flags(run_id_override="long"))
    again = flags(run_id_override="again", save_freq=1, max_steps=3, **shared)
    stop_after(again, 2)
    assert_same_weights(again.checkpoint_dir(2), flags(run_id_override="long").checkpoint_dir(2))
    assert len(told) == 3


def test_a_changed_dataset_is_noticed(flags, data_root: Path, tmp_path: Path):
    root = Path(shutil.copytree(data_root, tmp_path / "data"))
    config = flags(data_root_dir=root, save_freq=1, max_steps=2)
    stop_after(config, 1)
    shutil.rmtree(root / config.dataset_name)
    write_tiny_rlds(root, config.dataset_name, episodes=4, steps=16, size=64)
    with pytest.raises(BadInput, match="dataset 'libero_tiny_no_noops' has changed since .* --resume True if it was"):
        finetune(config)
    config.resume = "True"
    finetune(config)


def test_an_existing_head_is_loaded_and_a_new_one_is_said(flags, small_policy_directory: Path, caplog):
    caplog.set_level("INFO")
    run = build(flags(vla_path=str(small_policy_directory)), Ranks(0, 1, torch.device("cpu")))
    assert "action head: loaded from" in caplog.text and "proprio projector: loaded from" in caplog.text
    stored = load_component(next(small_policy_directory.glob("action_head--*")))
    assert all(torch.equal(value, stored[name]) for name, value in run.module.action_head.state_dict().items())
    caplog.clear()
    build(flags(), Ranks(0, 1, torch.device("cpu")))
    assert "action head: new" in caplog.text and "proprio projector: new" in caplog.text


def test_without_merging_only_the_adapter_is_saved(flags):
    folder = finetune(flags(use_lora=True, lora_rank=4, max_steps=1, merge_lora_during_training=False))
    assert not list(folder.glob("model*.safetensors"))
    assert (folder / "lora_adapter" / "adapter_config.json").is_file()
    assert (folder / "action_head--1_checkpoint.pt").is_file()


def test_queries_are_saved_beside_an_adapter_that_is_not_merged(flags):
    star = "lightvla_star:site=llama,layer=1,queries=6"
    folder = finetune(flags(use_lora=True, lora_rank=4, max_steps=1, merge_lora_during_training=False, pruner=star))
    stored = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    trained = load_training_state(folder)["parameters"]["model.pruner.queries"]
    assert torch.equal(stored["base_model.model.pruner.queries"], trained)


def test_sampled_points_are_saved_with_the_policy(flags):
    """What has been trained, adapters included, acts as the policy that was saved."""
    run = build(
        flags(use_lora=True, lora_rank=4, pruner="grids:tokens=4", max_steps=2), Ranks(0, 1, torch.device("cpu"))
    )
    folder, trained = train(run), run.module.eval()
    policy = Policy.from_pretrained(folder, dtype="float32")
    assert str(policy.model.config.pruner_spec) == "grids:tokens=4"
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 255, (64, 64, 3), np.uint8) for name in ("full_image", "wrist_image")}
    inputs = policy.model_inputs({**images, "state": np.zeros(8)}, "turn on the stove")
    batch = collate([inputs], policy.transform.pad_token_id)
    with torch.no_grad():
        encoded = trained.model.encode(**batch, proprio_projector=trained.proprio_projector)
        normalized, hidden = trained.action_head.predict(trained.model, encoded)
    output = policy.act_batch([{**images, "state": np.zeros(8)}], ["turn on the stove"])
    assert torch.equal(output.selection.index, hidden.selection.index) and output.selection.tokens.shape[1] == 4
    expected = policy.transform.unnormalize_actions(normalized.numpy())
    np.testing.assert_allclose(output.actions, expected, atol=1e-5)


def test_a_published_checkpoint_goes_on_weighted_and_keeps_its_layout(flags, reference_directory: Path):
    config = flags(
        vla_path=str(reference_directory), use_lora=True, lora_rank=4, batch_size=1, max_steps=1, precision="bf16"
    )
    folder = finetune(config)
    written, published = (json.loads((path / "config.json").read_text()) for path in (folder, reference_directory))
    assert "pruner" not in published
    assert written["pruner"] == {"name": "lightvla", "multiplicity": "weighted", "noise": "uniform"}
    before, after = load_checkpoint(reference_directory).model.state_dict(), load_checkpoint(folder).model.state_dict()
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    never_run = [name for name in before if "lm_head" in name]
    assert never_run and all(torch.equal(before[name], after[name]) for name in never_run)
