"""FSDP2 on CPU processes against one process and DDP. Each torchrun trains several runs, since starting costs most."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightvla.demo.small_model import SmallModelConfig
from lightvla.demo.small_model import build as build_small_model
from prismatic.checkpoints.saving import load_training_state
from prismatic.training.build import build
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.loop import BadInput, finetune
from prismatic.training.parallel.sharding import gathered_bytes, sharded_units
from prismatic.training.parallel.shards import gathered, own_part, part_like, total_norm
from prismatic.training.runs.resuming import find_resumption

WORKER = Path(__file__).with_name("training_runs.py")
LORA = {"use_lora": True, "lora_rank": 4, "ema_decay": 0.9, "max_grad_norm": 0.5, "learning_rate": 1e-4}
FULL = {"ema_decay": 0.9, "max_grad_norm": 0.5, "learning_rate": 1e-4}


def train_together(processes: int, folder: Path, jobs: list[tuple[FinetuneConfig, dict[str, str]]]) -> None:
    """Train the runs one after another, in that many processes."""
    listed = [
        {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()} | more
        for config, more in jobs
    ]
    file = folder / f"jobs{processes}.json"
    file.write_text(json.dumps([{k: v for k, v in flags.items() if v is not None} for flags in listed]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[3])}
    command = [sys.executable, *torchrun, str(WORKER), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]


def copied(config: FinetuneConfig, root: Path) -> Path:
    """A copy of the run in another root, to go on there."""
    shutil.copytree(config.run_dir, root / config.run_id)
    return root


def tensors(config: FinetuneConfig, step: int) -> dict[str, torch.Tensor]:
    """All that is trained or averaged, of a checkpoint's training state."""
    state = load_training_state(config.checkpoint_dir(step))
    moments = {
        f"optimizer.{number}.{name}": value
        for number, moment in state["optimizer"]["state"].items()
        for name, value in moment.items()
    }
    averages = {f"average.{name}": value for name, value in (state["average"] or {}).items()}
    return {**state["parameters"], **averages, **moments}


def furthest(first: FinetuneConfig, second: FinetuneConfig, step: int) -> float:
    """The largest difference between two runs' trained values at a step."""
    a, b = tensors(first, step), tensors(second, step)
    assert set(a) == set(b) and all(a[name].shape == b[name].shape for name in a)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def told(config: FinetuneConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def assert_told_the_same(first: FinetuneConfig, second: FinetuneConfig) -> None:
    for a, b in zip(told(first), told(second), strict=True):
        for name in ("loss", "val_loss", "grad_norm", "tokens_kept", "sampled_l1", "val_frames"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), (a["step"], name)


def assert_held(config: FinetuneConfig, processes: int) -> None:
    """Each process holds its share of weights and averages. Rows are dealt: of an uneven tensor some hold one more."""
    held = json.loads((config.run_dir / "held.json").read_text())
    assert len(held) == processes
    state = load_training_state(config.checkpoint_dir(config.max_steps))
    trained = sum(value.nbytes for value in state["parameters"].values())
    for name, whole in {"trained": trained, "optimizer": 2 * trained, "average": trained}.items():
        assert sum(each[name] for each in held) == whole, name
        # A tensor of fewer rows than processes lies in some of them alone.
        assert all(each[name] == pytest.approx(whole / processes, rel=0.1) for each in held), (name, held)


def test_two_processes_that_share_the_weights_train_what_one_does(flags, tmp_path: Path):
    shared = {**LORA, "max_steps": 4, "save_freq": 2, "use_val_set": True, "val_freq": 4}
    shared |= {"merge_lora_during_training": False, "picture_freq": 2, "picture_frames": 2}
    one = flags(run_id_override="one", batch_size=8, **shared)
    two = flags(run_id_override="two", batch_size=4, sharding="fsdp", **shared)
    finetune(one)
    train_together(2, tmp_path, [(two, {})])
    assert_told_the_same(one, two)
    assert furthest(one, two, 4) < 1e-5
    assert_held(two, 2)
    looks = [json.loads((config.run_dir / "pictures" / "pictures.json").read_text()) for config in (one, two)]
    assert [look["step"] for look in looks[1]] == [0, 2, 4]
    assert [look["kept"] for look in looks[0]] == [look["kept"] for look in looks[1]]
    adapters = [config.checkpoint_dir(4) / "lora_adapter" / "adapter_model.safetensors" for config in (one, two)]
    assert adapters[0].stat().st_size == adapters[1].stat().st_size
    assert load_file(adapters[0]).keys() == load_file(adapters[1]).keys()
    assert not list(two.checkpoint_dir(4).glob("model*.safetensors"))

    # One process goes on from what two have saved: with their very values, to where they came.
    rest = {**shared, "run_id_override": "two", "run_root_dir": copied(two, tmp_path / "copy"), "resume": "2"}
    alone = flags(batch_size=8, **rest)
    run = build(alone, Ranks(0, 1, torch.device("cpu")), find_resumption(alone, 1))
    state = load_training_state(two.checkpoint_dir(2))
    now = run.training.state_dict(alone)
    for kind in ("parameters", "average"):
        assert all(torch.equal(now[kind][name], value) for name, value in state[kind].items())
    for number, moment in state["optimizer"]["state"].items():
        assert all(torch.equal(now["optimizer"]["state"][number][name], value) for name, value in moment.items())
    finetune(alone)
    assert furthest(alone, two, 4) < 1e-5


@pytest.mark.slow
def test_four_processes_agree_with_ddp_and_two_go_on_for_them(flags, tmp_path: Path):
    def make(name: str, processes: int, sharding: str, what: dict[str, Any], **more: Any) -> FinetuneConfig:
        own = {"max_steps": 4, "save_freq": 2, "use_val_set": True, "val_freq": 4, "batch_size": 8 // processes}
        return flags(run_id_override=name, sharding=sharding, **{**own, **what, **more})

    lora, ddp_lora = make("lora", 4, "fsdp", LORA), make("ddp_lora", 4, "none", LORA)
    full, ddp_full = make("full", 4, "fsdp", FULL), make("ddp_full", 4, "none", FULL)
    one_lora, one_full = make("one_lora", 1, "none", LORA), make("one_full", 1, "none", FULL)
    again = make("lora", 4, "fsdp", LORA, run_root_dir=tmp_path / "again", resume="2")
    train_together(
        4, tmp_path,
        [(lora, {}), (ddp_lora, {}), (full, {}), (ddp_full, {}), (again, {"copied_from": str(lora.run_dir)})],
    )  # fmt: skip
    finetune(one_lora)
    finetune(one_full)
    for sharded, others in ((lora, (ddp_lora, one_lora)), (full, (ddp_full, one_full))):
        for other in others:
            assert_told_the_same(sharded, other)
            assert furthest(sharded, other, 4) < 1e-5
        assert_held(sharded, 4)
    assert furthest(again, lora, 4) == 0.0  # the same processes: bit for bit

    fewer = make("lora", 2, "fsdp", LORA, run_root_dir=tmp_path / "fewer", resume="2")
    whole = make("lora", 2, "none", LORA, run_root_dir=tmp_path / "whole", resume="2")
    to_shared = make("ddp_lora", 2, "fsdp", LORA, run_root_dir=tmp_path / "shared", resume="2")
    train_together(
        2, tmp_path,
        [
            (fewer, {"copied_from": str(lora.run_dir)}), (whole, {"copied_from": str(lora.run_dir)}),
            (to_shared, {"copied_from": str(ddp_lora.run_dir)}),
        ],
    )  # fmt: skip
    for goes_on in (fewer, whole, to_shared):
        assert furthest(goes_on, make(goes_on.run_id, 4, "none", LORA), 4) < 1e-5


HEADS_AND_PRUNERS: dict[str, dict[str, Any]] = {
    "diffusion": {"use_l1_regression": False, "use_diffusion": True, "diffusion_sample_freq": 2},
    "discrete": {**LORA, "use_l1_regression": False},
    "in the language model": {
        **LORA, "pruner": "lightvla_star:site=llama,layer=1,queries=6", "gradient_checkpointing": "True",
    },
    "in the vision backbone": {**LORA, "pruner": "lightvla_star:site=vision,layer=0,queries=6"},
    "film": {"use_film": True, "pruner": "none"},
    "micro-steps": {**LORA, "grad_accumulation_steps": 2, "batch_size": 2, "on_nan": "skip"},
    "dropout": {**LORA, "lora_dropout": 0.1, "gradient_checkpointing": "llm"},
}  # fmt: skip


@pytest.mark.slow
def test_every_kind_of_run_can_be_shared(flags, tmp_path: Path):
    pytest.importorskip("diffusers")
    sizes = SmallModelConfig(
        output_dir=tmp_path / "base", image_size=64, vision_dim=32, vision_depth=3, llm_dim=32, llm_layers=3,
        llm_heads=2, llm_mlp=64, vision_heads=2,
    )  # fmt: skip
    base = str(build_small_model(sizes))

    def make(name: str, sharding: str) -> FinetuneConfig:
        chosen = {"max_steps": 2, "learning_rate": 1e-4, **HEADS_AND_PRUNERS[name]}
        return flags(vla_path=base, run_id_override=f"{name} {sharding}", sharding=sharding, **chosen)

    def rounded(sharding: str) -> FinetuneConfig:
        chosen = {"max_steps": 2, "learning_rate": 1e-4, "precision": "bf16", "pruner": "none"}
        return flags(vla_path=base, run_id_override=f"rounded {sharding}", sharding=sharding, **chosen)

    pairs = [(make(name, "fsdp"), make(name, "none")) for name in HEADS_AND_PRUNERS]
    in_bf16 = rounded("fsdp"), rounded("none")
    train_together(2, tmp_path, [(config, {}) for pair in [*pairs, in_bf16] for config in pair])
    (first, second), (whole_first, whole_second) = map(told, in_bf16)
    assert first["loss"] == pytest.approx(whole_first["loss"], rel=1e-3)
    assert first["grad_norm"] == pytest.approx(whole_first["grad_norm"], rel=1e-3)
    assert second["loss"] == pytest.approx(whole_second["loss"], rel=0.02)
    a, b = (tensors(config, 2) for config in in_bf16)
    # Adam moves a weight by the rate at most, in a direction that rounding decides where the gradient is about zero.
    assert all((a[name] - b[name]).abs().max() <= 4.1e-4 for name in a if "optimizer" not in name)
    for shared, whole in pairs:
        assert_told_the_same(shared, whole)
        assert furthest(shared, whole, 2) < 1e-5, shared.run_id
        names = [{file.name for file in config.checkpoint_dir(2).iterdir()} for config in (shared, whole)]
        assert names[0] == names[1]
        for file in shared.checkpoint_dir(2).glob("*.safetensors"):
            a, b = load_file(file), load_file(whole.checkpoint_dir(2) / file.name)
            assert a.keys() == b.keys()
            assert all(torch.allclose(a[name].float(), b[name].float(), rtol=0.01, atol=1e-4) for name in a)


def test_one_process_has_nobody_to_share_with(flags):
    with pytest.raises(BadInput, match="--sharding fsdp divides the weights among processes, and here is one"):
        finetune(flags(sharding="fsdp"))
    with pytest.raises(BadInput, match="--sharding 'zero' is unknown; choose one of none, fsdp"):
        finetune(flags(sharding="zero"))


@pytest.mark.parametrize("pruner", ["lightvla", "lightvla_star:site=llama,layer=1,queries=6"])
def test_units_are_only_ever_called_as_a_whole(flags, pruner):
    run = build(flags(pruner=pruner), Ranks(0, 1, torch.device("cpu")))
    module = run.module
    units = sharded_units(module)
    held = [id(parameter) for unit in units for parameter in unit.parameters()]
    assert len(held) == len(set(held))
    layers = list(module.model.language_model.model.layers)
    assert layers[-1] not in units and layers[-1].mlp in units
    assert (layers[0] in units) == (pruner == "lightvla")
    rest = {name for name, parameter in module.named_parameters() if id(parameter) not in set(held)}
    assert "model.language_model.model.embed_tokens.weight" in rest
    assert not any("blocks" in name or "mlp" in name for name in rest)
    everything = sum(parameter.nbytes for parameter in module.parameters())
    assert 0 < gathered_bytes(module) < 3 * everything


def test_what_is_whole_stays_as_it_is():
    tensor = torch.arange(6.0).reshape(3, 2)
    assert own_part(tensor) is tensor and part_like(tensor, torch.zeros(3, 2)) is tensor
    assert total_norm(tensor, tensor) is tensor
    copy = gathered({"a": [tensor, 1]}, keep=True)
    assert torch.equal(copy["a"][0], tensor) and copy["a"][0] is not tensor and copy["a"][1] == 1
    assert gathered([tensor], keep=False) == [None]
