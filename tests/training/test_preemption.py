"""Runs that are asked to end, and go on by the same command: two real processes, as torchrun starts them."""

import os
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import killed_runs
import pytest

from prismatic.command_status import PREEMPTED, STOPPED
from prismatic.training.config import FinetuneConfig
from prismatic.training.preemption import StopRequest

ROOT = Path(__file__).resolve().parents[2]
LORA = {"use_lora": True, "lora_rank": 4, "ema_decay": 0.9, "batch_size": 2}


def same_weights(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names == sorted(path.name for path in second.glob("*.safetensors"))
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_request_is_noted_while_somebody_listens():
    stop = StopRequest()
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.signal == "SIGTERM" and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.slow
def test_one_signalled_process_of_two_makes_both_save_and_end(flags, tmp_path: Path):
    make = partial(flags, **LORA, max_steps=60, use_val_set=True, val_freq=20)
    whole = make(run_id_override="whole")
    assert killed_runs.end(killed_runs.start(lambda: whole, 2, tmp_path / "log"), 0) == [0, 0]
    for number, who in ((signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGINT, 1)):
        processes = killed_runs.start(make, 2, tmp_path / "log")
        begin = killed_runs.steps_done(make())
        assert killed_runs.wait_until(lambda begin=begin: killed_runs.steps_done(make()) > begin, processes)
        pid = processes[who].pid
        assert pid is not None
        os.kill(pid, number)
        assert killed_runs.end(processes, 0) == [PREEMPTED, PREEMPTED], (tmp_path / "log").read_text()[-3000:]
        assert make().run_dir.joinpath("checkpoints", "latest").is_dir()
    assert killed_runs.end(killed_runs.start(make, 2, tmp_path / "log"), 0) == [0, 0]
    assert same_weights(whole.checkpoint_dir(60), make().checkpoint_dir(60))


def command(config: FinetuneConfig) -> list[str]:
    words = [word for name, value in vars(config).items() if value is not None for word in (f"--{name}", str(value))]
    return ["-m", "lightvla", "finetune", *words]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, PREEMPTED), pytest.param(signal.SIGINT, STOPPED, marks=pytest.mark.slow)]
)
def test_the_command_ends_with_a_status_that_schedulers_know(flags, number, status):
    config = flags(max_steps=500)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, *command(config)], env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
        while killed_runs.steps_done(config) < 2 and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(number)
        _, told = run.communicate(timeout=120)
    assert run.returncode == status, told
    assert f"{number.name}: step " in told and "the same command goes on" in told and "Traceback" not in told


def workers(launcher: int) -> dict[int, int]:
    """Rank -> process of those that torchrun has started and that train."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for child in children:
        content = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if rank := next((part for part in content if part.startswith(b"RANK=")), None):
            found[int(rank.partition(b"=")[2])] = int(child)
    return found


@pytest.mark.slow
def test_one_command_started_again_whenever_it_ends_trains_the_undisturbed_run(flags, tmp_path: Path):
    """Signals to one process, which torchrun starts again once; then to torchrun itself; six times in all."""
    shared = {**LORA, "max_steps": 260, "save_freq": 10}
    whole = flags(run_id_override="whole", **shared)
    assert killed_runs.end(killed_runs.start(lambda: whole, 2, tmp_path / "log"), 0) == [0, 0]
    config = flags(**shared)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    launch += ["--monitor-interval", "0.1", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    plan = [
        [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)],
        [(signal.SIGKILL, 0), (signal.SIGKILL, 1)],
        [(signal.SIGUSR1, None)],
        [(signal.SIGTERM, None)],
    ]
    for interruptions in plan:
        started = [sys.executable, *launch, *command(config)]
        with (
            (tmp_path / "log").open("a") as log,
            subprocess.Popen(started, env=environment, stdout=subprocess.DEVNULL, stderr=log) as run,
        ):
            for number, rank in interruptions:
                begin = killed_runs.steps_done(config)
                while killed_runs.steps_done(config) in (0, begin):
                    assert run.poll() is None, (tmp_path / "log").read_text()[-5000:]
                    time.sleep(0.02)
                os.kill(run.pid if rank is None else workers(run.pid)[rank], number)
                time.sleep(2)
            assert run.wait(120) != 0
    assert 0 < killed_runs.steps_done(config) < 260
    done = subprocess.run([sys.executable, *launch, *command(config)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same_weights(whole.checkpoint_dir(260), config.checkpoint_dir(260))


SLURM = {
    # What the script asks of SLURM, done by this machine: one node, steps that run here, and a list of what was asked.
    "srun": 'echo $$ > "$WORLD/srun.pid"; exec "$PYTHON" -m torch.distributed.run "${@:2}"',
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$WORLD/asked"; fi',
    "scancel": 'echo "$@" >> "$WORLD/asked"; kill -USR1 "$(cat "$WORLD/srun.pid")"',
}


@pytest.mark.slow
def test_the_slurm_script_queues_again_until_the_run_is_finished(flags, tmp_path: Path):
    world = tmp_path / "world"
    world.mkdir()
    for name, body in SLURM.items():
        (world / name).write_text(f"#!/bin/bash\n{body}\n")
        (world / name).chmod((world / name).stat().st_mode | stat.S_IXUSR)
    config = flags(**LORA, max_steps=120)
    place = {"WORLD": world, "PYTHON": sys.executable, "PATH": f"{world}:{os.environ['PATH']}", "PYTHONPATH": ROOT}
    place |= {"SLURM_JOB_ID": 5, "SLURM_JOB_NUM_NODES": 1, "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in place.items()}}
    script = ["bash", str(ROOT / "docs/guides/slurm.sh"), *command(config)[3:]]
    began = 0
    for _ in range(2):
        with subprocess.Popen(
            script, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
        ) as job:
            while killed_runs.steps_done(config) < began + 3 and job.poll() is None:
                time.sleep(0.05)
            job.send_signal(signal.SIGUSR1)
            told, _ = job.communicate(timeout=200)
        assert job.returncode != 0, told
        began = killed_runs.steps_done(config)
    assert (world / "asked").read_text().splitlines() == ["--signal=USR1 5", "requeue 5"] * 2, told
    assert 0 < began < 120
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = flags(**{**LORA, "batch_size": 2}, max_steps=120, run_id_override="whole")
    assert killed_runs.end(killed_runs.start(lambda: whole, 2, tmp_path / "log"), 0) == [0, 0]
    assert same_weights(whole.checkpoint_dir(120), config.checkpoint_dir(120))


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(flags, tmp_path: Path):
    shared = {**LORA, "max_steps": 150, "save_freq": 2, "keep_last": 2, "log_freq": 1}
    whole = flags(run_id_override="whole", **shared)
    assert killed_runs.end(killed_runs.start(lambda: whole, 2, tmp_path / "log"), 0) == [0, 0]
    make = partial(flags, run_id_override="killed", **shared)
    killed, inside, failures = killed_runs.kill_again_and_again(make, 2, 8, tmp_path / "log")
    assert killed == 8 and inside >= 2 and not failures
    assert same_weights(whole.checkpoint_dir(150), make().checkpoint_dir(150))
