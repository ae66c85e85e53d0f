"""Fine-tuning without merging, then the merge script, gives what fine-tuning with merging gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prismatic.checkpoints.files import check_complete
from prismatic.checkpoints.weight_files import fingerprint
from prismatic.stored_files import load_component
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import BadInput, finetune

SCRIPT = Path(__file__).resolve().parents[2] / "vla-scripts" / "merge_lora_weights_and_save.py"


def merge(*flags: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, flags)], capture_output=True, text=True)


def lora(**overrides) -> dict:
    return {"use_lora": True, "lora_rank": 4, "max_steps": 2, "batch_size": 2, **overrides}


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="fp32"),
        pytest.param({"ema_decay": 0.5, "precision": "bf16"}, id="averaged in bf16", marks=pytest.mark.slow),
        pytest.param(
            {"pruner": "lightvla_star:site=llama,layer=1,queries=6"}, id="with learnt queries", marks=pytest.mark.slow
        ),
        pytest.param({"pruner": "grids:tokens=4"}, id="with sampled points", marks=pytest.mark.slow),
    ],
)
def test_merging_afterwards_gives_the_same_checkpoint(flags, reference_directory: Path, overrides):
    base = str(reference_directory)  # bfloat16 in two shards
    at_once = finetune(flags(vla_path=base, run_id_override="at-once", **lora(**overrides)))
    config = flags(vla_path=base, run_id_override="later", merge_lora_during_training=False, **lora(**overrides))
    later = finetune(config)
    assert not list(later.glob("model*"))
    done = merge("--base_checkpoint", base, "--lora_finetuned_checkpoint_dir", later)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_checkpoint(at_once, later)
    recorded = json.loads((later / "config.json").read_text())["base_fingerprint"]
    assert recorded == fingerprint(check_complete(reference_directory)) != fingerprint(check_complete(later))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in check_complete(folder) for name, value in load_file(file).items()}


def assert_same_checkpoint(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert set(a) == set(b)
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different, different
    for component in ("action_head--2_checkpoint.pt", "proprio_projector--2_checkpoint.pt"):
        one, other = load_component(first / component), load_component(second / component)
        assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    for name in ("config.json", "dataset_statistics.json", "lora_adapter/base_fingerprint.json"):
        assert json.loads((first / name).read_text()) == json.loads((second / name).read_text())
    names = [
        {path.name for path in folder.iterdir() if not path.name.startswith("model")} for folder in (first, second)
    ]
    assert names[0] == names[1]


def test_a_base_model_that_changed_is_noticed_on_resuming(flags, small_base: Path, tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    for file in small_base.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    shared = {"vla_path": str(base), "save_freq": 1, **lora(max_steps=1)}
    finetune(flags(**shared))
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)
    config: FinetuneConfig = flags(**{**shared, "max_steps": 2}, resume=True)
    with pytest.raises(BadInput, match="was trained on weights sha256:.* now holds sha256:.*; put the base model back"):
        finetune(config)


def test_what_cannot_be_merged_ends_with_one_message_and_status_2(small_base: Path):
    done = merge("--lora_finetuned_checkpoint_dir", small_base)
    told = done.stdout + done.stderr
    assert done.returncode == 2 and "adapter_config.json is not there" in told and "Traceback" not in told
