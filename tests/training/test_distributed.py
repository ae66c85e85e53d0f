import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from prismatic.checkpoints.adapters import merge_adapter
from prismatic.checkpoints.files import check_complete
from prismatic.checkpoints.weight_files import fingerprint
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import resolve_device

SCRIPT = Path(__file__).resolve().parents[2] / "vla-scripts" / "finetune.py"


def launch(config: FinetuneConfig, processes: int, script: Path = SCRIPT) -> list[dict]:
    """Run finetune.py as users do and return its metrics."""
    arguments = [
        part for name, value in vars(config).items() if value is not None for part in (f"--{name}", str(value))
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_learn_what_one_with_the_doubled_batch_learns(flags):
    shared = {"max_steps": 3, "use_val_set": True, "val_freq": 3, "ema_decay": 0.9}
    one = launch(flags(run_id_override="one", batch_size=4, **shared), processes=1)
    two = launch(flags(run_id_override="two", batch_size=2, **shared), processes=2)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-5)
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        for name in set(a) - {"step_time_s", "data_wait_s", "samples_per_s", "host_peak_gb"}:
            assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)


@pytest.mark.slow
def test_two_processes_draw_the_same_pictures_as_one(flags):
    shared = {"max_steps": 2, "picture_freq": 1, "ema_decay": 0.9}
    drawn = []
    for name, processes in (("one", 1), ("two", 2)):
        config = flags(run_id_override=name, batch_size=4 // processes, **shared)
        launch(config, processes)
        drawn.append(json.loads((config.run_dir / "pictures" / "pictures.json").read_text()))
    assert [look["step"] for look in drawn[0]] == [0, 1, 2]
    assert drawn[0] == drawn[1]


CALLED_BACK = r"""
import sys
import numpy as np
import draccus
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import finetune

class Acts:
    def is_due(self, step): return step == 2
    def rewind(self, step): pass
    def __call__(self, step, policy, stop):
        draw = np.random.default_rng(0)
        pictures = draw.integers(0, 255, (2, 64, 64, 3), np.uint8)
        seen = {"full_image": pictures[0], "wrist_image": pictures[1], "state": np.zeros(8)}
        chunks = [policy.act(seen, text) for text in ("turn on the stove", "open it")]
        return {"acted": float(np.abs(chunks).sum())}

finetune(draccus.parse(FinetuneConfig, args=sys.argv[1:]), [Acts()])
"""


@pytest.mark.slow
def test_a_callback_of_two_processes_gets_the_policy_of_one(flags, tmp_path: Path):
    (script := tmp_path / "called_back.py").write_text(CALLED_BACK)
    acted = []
    for name, processes in (("one", 1), ("two", 2)):
        config = flags(run_id_override=name, batch_size=4 // processes, max_steps=3, ema_decay=0.9)
        told = launch(config, processes, script)
        acted += [line["acted"] for line in told if "acted" in line]
    assert len(acted) == 2 and acted[0] == pytest.approx(acted[1], abs=1e-3)


@pytest.mark.slow
def test_several_processes_save_one_adapter_and_wait_for_it(flags, small_base: Path):
    config = flags(use_lora=True, lora_rank=4, merge_lora_during_training=False, batch_size=2, max_steps=2, save_freq=1)
    assert [line["step"] for line in launch(config, processes=2)] == [1, 2]
    for step in (1, 2):
        folder = config.checkpoint_dir(step)
        recorded = json.loads((folder / "lora_adapter" / "base_fingerprint.json").read_text())
        assert recorded == {"base": str(small_base), "base_fingerprint": fingerprint(check_complete(small_base))}
        check_complete(merge_adapter(folder))


def test_a_gpu_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU; pass --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_bad_flags_end_with_one_message_and_status_2(flags):
    config = flags()
    command = [sys.executable, str(SCRIPT), "--vla_path", config.vla_path, "--use_diffusion", "True"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    told = done.stdout + done.stderr
    assert "--use_l1_regression and --use_diffusion exclude each other" in told and "Traceback" not in told


WAITING = r"""
import sys, time
from datetime import timedelta
import torch
from prismatic.training.distributed import ranks

with ranks("cpu", save_timeout=timedelta(seconds=float(sys.argv[1])), exchange_timeout=timedelta(seconds=2)) as group:
    seconds = group.waiting._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    sys.stdout.write(f"asked {seconds}\n")
    if group.is_main:
        time.sleep(4)  # a save that takes longer than an exchange may
    group.barrier()
    sys.stdout.write(f"sum {group.sum(torch.ones(1)).item()}\n")
"""


def wait(save_timeout: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", WAITING, str(save_timeout)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_others_wait_as_long_as_asked_while_one_saves():
    done = wait(60)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("asked 60.0") == 2 and done.stdout.count("sum 2.0") == 2


def test_a_wait_without_end_is_given_up():
    done = wait(1)
    assert done.returncode != 0 and "sum" not in done.stdout
    assert "imed out" in done.stderr


def start_on_node(rank: int, port: int, config: FinetuneConfig, **flags: str) -> subprocess.Popen:
    """One of two processes that take themselves for the only one on their node, as `torchrun` starts them."""
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    environment |= {name: str(value) for name, value in place.items()} | {"PYTHONPATH": str(SCRIPT.parents[1])}
    given = {"vla_path": config.vla_path, "data_root_dir": str(config.data_root_dir), "device": "cpu"}
    given |= {"dataset_name": config.dataset_name, "run_root_dir": str(config.run_root_dir), **flags}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def test_what_another_node_lacks_is_said_on_both(flags):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config, node = flags(), socket.gethostname()
    complete, lacking = start_on_node(0, port, config), start_on_node(1, port, config, data_root_dir="nowhere")
    what = f"on node {node}: the data folder nowhere does not exist; data_root_dir must hold one folder per dataset"
    for process, words in ((lacking, f"error: {what}"), (complete, f"error: process 1 of 2 {what}")):
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 2 and words in said and "Traceback" not in said, said


def test_a_flag_that_is_wrong_on_another_node_is_said_there(flags):
    process = start_on_node(1, 1, flags(), save_steps="5")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert f"on node {socket.gethostname()}: unknown flag --save_steps: here it is --save_freq" in said
