"""The command itself, killed at random moments and gone on with, and under torchrun."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.robot.libero.results.journal import Journal, read_journals
from experiments.robot.libero.results.results import Results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "experiments/robot/libero/run_libero_eval.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


# One thread everywhere, as torchrun gives its processes: another number adds up in another order.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def flags(checkpoint: Path, folder: Path, *more: str) -> list[str]:
    given = f"""{SCRIPT} --pretrained_checkpoint {checkpoint} --task_suite_name libero_goal --task_ids 1,8
        --initial_states 30-32 --wide_starts_m 0.06 --env_img_res 64 --renderer fast --num_steps_wait 2 --device cpu
        --output_dir {folder}"""
    return [*given.split(), *more]


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def undisturbed(untrained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("undisturbed")
    run([sys.executable, *flags(untrained_checkpoint, folder, "--num_envs", "1")])
    return Results.load(folder)


def test_a_second_run_with_the_same_seed_is_identical(
    undisturbed: Results, untrained_checkpoint: Path, tmp_path: Path
) -> None:
    run([sys.executable, *flags(untrained_checkpoint, tmp_path, "--num_envs", "1")])
    assert Results.load(tmp_path).outcome() == undisturbed.outcome()


def test_killed_and_gone_on_with_it_is_as_undisturbed(
    undisturbed: Results, untrained_checkpoint: Path, tmp_path: Path
) -> None:
    seed = int(time.time())
    print("seed", seed)  # shown when the test fails
    rng = random.Random(seed)
    command = [sys.executable, *flags(untrained_checkpoint, tmp_path, "--num_envs", "2", "--resume", "True")]
    kept = 0
    for _ in range(4):
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout=rng.uniform(4.0, 25.0))
        except subprocess.TimeoutExpired:
            process.kill()  # the policy's process alone: the simulators must notice by themselves
            process.wait()
        assert wait_until_gone(process.pid), "simulator processes outlived their evaluation"
        assert len(read_journals(tmp_path)) >= kept
        kept = len(read_journals(tmp_path))
    run(command)
    assert Results.load(tmp_path).outcome() == undisturbed.outcome()
    assert not list((tmp_path).rglob("*.partial"))


def wait_until_gone(session: int) -> bool:
    """Whether all processes of a session end within half a minute."""
    for _ in range(60):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.5)
    os.killpg(session, signal.SIGKILL)
    return False


def test_torchrun_shares_the_starts_and_merges_the_results(
    undisturbed: Results, untrained_checkpoint: Path, tmp_path: Path
) -> None:
    run([*TORCHRUN, *flags(untrained_checkpoint, tmp_path, "--num_envs", "1")])
    results = Results.load(tmp_path)
    assert results.outcome() == undisturbed.outcome()
    assert results.run["processes"] == 2
    assert [len(path.read_bytes().splitlines()) for path in sorted(tmp_path.glob("episodes.rank*"))] == [1 + 3, 1 + 3]


def test_torchrun_goes_on_with_what_one_process_began(
    undisturbed: Results, untrained_checkpoint: Path, tmp_path: Path
) -> None:
    first = flags(untrained_checkpoint, tmp_path, "--num_envs", "1")
    process = subprocess.Popen([sys.executable, *first], cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
    while len(read_journals(tmp_path)) < 2 and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run([*TORCHRUN, *first, "--resume", "True"])
    assert Results.load(tmp_path).outcome() == undisturbed.outcome()


def test_another_policy_or_flag_is_not_gone_on_with(untrained_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, *flags(untrained_checkpoint, tmp_path, "--task_ids", "1", "--num_envs", "1")]
    run(command)
    again = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 2 and "holds rollouts of an earlier evaluation" in again.stderr
    other = [*command, "--resume", "True", "--num_open_loop_steps", "4"]
    again = subprocess.run(other, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 2 and "another --num_open_loop_steps: None, now 4" in again.stderr


def test_what_one_process_of_several_finds_all_refuse(untrained_checkpoint: Path, tmp_path: Path) -> None:
    command = [*TORCHRUN, *flags(untrained_checkpoint, tmp_path, "--num_envs", "1", "--resume", "True")]
    with Journal(tmp_path, rank=1, world_size=2):
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and done.stderr.count("error: process 1 of 2") == 1
    assert "process 1 of 2: --output_dir" in done.stderr and "is writing episodes.rank1.jsonl there" in done.stderr
    assert "Traceback" not in done.stdout
