"""What ends an evaluation, or its output, is one line and a status; in the real simulator and with real processes."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from served_policy import serving_process
from wandering_agent import Kills, Wanders, already_done, children, plan_into

from experiments.robot.libero.evaluation.command import main, roll_out
from experiments.robot.libero.evaluation.evaluate import evaluate
from experiments.robot.libero.evaluation.terminal import episode_line, summary_table
from experiments.robot.libero.policies.contract import ActionChunk, PolicyQuery
from experiments.robot.libero.policies.watched import PolicyLost, WatchedPolicy, watchdog
from experiments.robot.libero.results.journal import read_journals
from experiments.robot.libero.results.results import EpisodeRecord, Results
from experiments.robot.libero.rollouts import worker_pool
from experiments.robot.libero.rollouts.worker_pool import SimulatorsUnusable
from experiments.robot.libero.settings.flags import EvaluationConfig
from experiments.robot.libero.settings.protocols import DEFAULT
from experiments.robot.libero.simulator import backend
from prismatic.command_status import noticing_ctrl_c

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = "experiments/robot/libero/run_libero_eval.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


class DiesAfter(Wanders):
    """Answers so many queries, and none after that."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.left = queries

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        self.left -= len(queries)
        if self.left < 0:
            raise ConnectionError("the server is gone\nCUDA error: an illegal memory access was encountered")
        return super().query(queries)


@pytest.mark.parametrize("num_envs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_dead_policy_ends_the_evaluation_and_invalidates_nothing(
    serial: Results, tmp_path: Path, num_envs: int
) -> None:
    with pytest.raises(PolicyLost, match=r"failed at 5 queries in a row; the last error: CUDA error: an illegal"):
        evaluate(plan_into(tmp_path, num_envs=num_envs), DiesAfter(3), ["eval"])
    assert not children()
    stopped = Results.load(tmp_path)
    assert not stopped.run["complete"] and stopped.summary()["all"]["invalid"] == 0
    done = read_journals(tmp_path)
    assert len(done) == (1 if num_envs == 1 else len(done)) and all(record.invalid is None for record in done)
    results = evaluate(plan_into(tmp_path, num_envs=num_envs, resume=True), Wanders(), ["eval"])
    assert results.outcome() == serial.outcome()


@pytest.mark.slow
def test_a_server_that_dies_ends_the_command(
    untrained_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DEFAULT.step_caps, "libero_goal", 16)
    run = tmp_path / "run"
    flags: dict[str, Any] = {"task_suite_name": "libero_goal", "task_ids": "1", "initial_states": "10-49"}
    flags |= {"renderer": "fast", "env_img_res": 64, "num_envs": 1, "report": False, "output_dir": str(run)}
    with serving_process(untrained_checkpoint) as (server, url):

        def strike() -> None:
            while not read_journals(run) and server.poll() is None:
                time.sleep(0.1)
            server.kill()

        killer = threading.Thread(target=strike)
        killer.start()
        try:
            status = main(EvaluationConfig(policy_url=url, **flags), ["eval"])
        finally:
            server.kill()
            killer.join()
    error = " ".join(capsys.readouterr().err.split())
    assert (
        status == 2
        and f"error: the policy failed at 5 queries in a row; the last error: no policy server at {url}" in error
    )
    assert "Traceback" not in error and f"go on with the same command and --resume True --output_dir {run}" in error
    done = read_journals(run)
    assert 1 <= len(done) < 40 and all(record.invalid is None for record in done)


def test_only_failures_in_a_row_count() -> None:
    class Fails(Wanders):
        def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
            if queries[0].seed:
                raise ValueError("not this one")
            return []

    bad, good = PolicyQuery({}, "", 1), PolicyQuery({}, "", 0)
    policy = WatchedPolicy(Fails(), 3)
    for query in (bad, bad, good, bad, bad, good):
        if query is good:
            policy.query([query])
        else:
            with pytest.raises(ValueError, match="not this one"):
                policy.query([query])
    for _ in range(9):  # a batch is tried again one by one
        with pytest.raises(ValueError, match="not this one"):
            policy.query([bad, bad])
    assert policy.failures == 0


HANGS = """
import sys, time
from pathlib import Path
from rich.console import Console
import torch
from wandering_agent import Wanders, plan_into
from experiments.robot.libero.evaluation.command import main, roll_out
from experiments.robot.libero.results.journal import Journal
from prismatic.training.distributed import Ranks

class Hangs(Wanders):
    def query(self, queries):
        if len(self.sizes) == 3:
            time.sleep(1000)
        return super().query(queries)

plan = plan_into(Path(sys.argv[1]), policy_timeout_s=3.0, num_envs=int(sys.argv[2]), report=False)
with Journal(plan.output_dir) as journal:
    sys.exit(roll_out(plan, Hangs(), journal, ["eval"], Console(), Ranks(0, 1, torch.device("cpu"))))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_policy_that_hangs_is_noticed(serial: Results, tmp_path: Path, num_envs: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path), str(num_envs)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = (
        r"error: the policy has not returned for \d seconds \(--policy_timeout_s 3\), and cannot be interrupted; go on "
        rf"with the same command and --resume True --output_dir {tmp_path}"
    )
    assert re.fullmatch(expected, said)
    assert "Traceback" not in done.stderr and all(record.invalid is None for record in read_journals(tmp_path))
    assert evaluate(plan_into(tmp_path, resume=True), Wanders(), ["eval"]).outcome() == serial.outcome()


def test_the_watchdog_lets_slow_batches_and_idle_policies_be() -> None:
    class Slow(Wanders):
        def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
            time.sleep(0.5 * len(queries))
            return []

    ended: list[int] = []
    policy = WatchedPolicy(Slow(), 5)
    with watchdog(policy, 0.8, "", ended.append):
        policy.query([PolicyQuery({}, "")] * 3)
        time.sleep(1.5)
        for _ in range(3):
            policy.query([PolicyQuery({}, "")])
    assert not ended


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("flags", [{"num_envs": 1}, {"num_envs": 2}], ids=["one process", "workers"])
def test_a_full_disk_is_no_rollouts_fault(
    serial: Results, tiny_disk: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The records of rollouts do not fit."""
    plan = plan_into(tiny_disk / "run", record=True, env_img_res=256, report=False, **flags)
    status, _, error = rolled_out(plan, Wanders(), capsys)
    assert status == 2 and error.startswith(
        f"error: no space left to write into {tiny_disk}/run: free some, then go on"
    )
    assert error.endswith(f"--resume True --output_dir {tiny_disk}/run") and "Traceback" not in error
    assert not children() and all(record.invalid is None for record in read_journals(tiny_disk / "run"))


def test_a_journal_that_finds_the_disk_full_says_so(
    serial: Results, tiny_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    already_done(tiny_disk / "run", serial, 2)
    plan = plan_into(tiny_disk / "run", report=False, resume=True)
    with pytest.raises(OSError, match="No space left"), (tiny_disk / "other").open("wb", buffering=0) as other:
        while True:
            other.write(b"x" * 4096)
    status, _, error = rolled_out(plan, Wanders(), capsys)
    assert status == 2 and error.startswith(f"error: no space left to write into {tiny_disk}/run")
    assert not list(tiny_disk.rglob("*.partial"))
    (tiny_disk / "other").unlink()
    assert evaluate(plan, Wanders(), ["eval"]).outcome() == serial.outcome()


def rolled_out(plan: Any, agent: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, standard output and standard error of the part of the command behind loading; words in one line."""
    import torch

    from experiments.robot.libero.results.journal import Journal
    from prismatic.training.distributed import Ranks

    with Journal(plan.output_dir) as journal, noticing_ctrl_c():
        status = roll_out(plan, agent, journal, ["eval"], Console(), Ranks(0, 1, torch.device("cpu")))
    said = capsys.readouterr()
    return status, said.out, " ".join(said.err.split())


def test_simulators_that_never_start_say_why_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_into(tmp_path / "run", num_envs=2, report=False)
    monkeypatch.setattr(worker_pool, "_PROGRAM", "import a_package_that_is_missing")
    began = time.monotonic()
    with pytest.raises(SimulatorsUnusable, match="before it was ready: ModuleNotFoundError: No module named 'a_pack"):
        evaluate(plan, Wanders(), ["eval"])
    assert time.monotonic() - began < 20
    status, _, error = rolled_out(plan, Wanders(), capsys)
    assert status == 2 and error.startswith(
        "error: the simulator process ended with status 1 before it was ready: Module"
    )
    assert "Traceback" not in error and not children()


def test_a_simulator_without_memory_is_named_and_not_replaced(
    serial: Results, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    already_done(tmp_path, serial, 2)
    results = evaluate(plan_into(tmp_path, num_envs=2, resume=True), Kills({1}, signal.SIGKILL), ["eval"])
    assert results.outcome() == serial.outcome()
    (said,) = [r.getMessage() for r in caplog.records if "going on with" in r.getMessage()]
    assert said.startswith("the simulator process was killed by signal 9, as the system does when memory runs out")
    assert said.endswith("fewer --num_envs need less); going on with 1")


FLAGS = ["--task_suite_name", "libero_goal", "--task_ids", "1", "--initial_states", "30", "--renderer", "fast"]
FLAGS += ["--env_img_res", "64", "--device", "cpu", "--num_steps_wait", "2", "--num_envs", "1", "--report", "False"]


@pytest.mark.slow
def test_nobody_reads_the_output(untrained_checkpoint: Path, tmp_path: Path) -> None:
    """As `| head` does: the evaluation goes on without a word."""
    command = [sys.executable, SCRIPT, *FLAGS, "--pretrained_checkpoint", str(untrained_checkpoint)]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=300) == 0, error
    assert "Traceback" not in error and "BrokenPipe" not in error
    assert Results.load(tmp_path / "run").run["complete"]


@pytest.mark.parametrize(
    "seconds", [0.4, 1.5, *(pytest.param(seconds, marks=pytest.mark.slow) for seconds in (4.0, 8.0))]
)
def test_ctrl_c_in_the_first_seconds_is_one_line(untrained_checkpoint: Path, tmp_path: Path, seconds: float) -> None:
    command = [sys.executable, SCRIPT, *FLAGS, "--pretrained_checkpoint", str(untrained_checkpoint)]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, error = process.communicate(timeout=120)
    said = (out + error).splitlines()
    assert process.returncode == 130, said
    assert "Traceback" not in out + error and len([line for line in said if line.startswith("stopped")]) == 1, said


class SwallowsCtrlC(Wanders):
    """At its first query Ctrl+C comes, and a bare `except` takes it, as those of some libraries do."""

    has_swallowed = False

    def query(self, queries: Sequence[PolicyQuery]) -> list[ActionChunk]:
        if not self.has_swallowed:
            self.has_swallowed = True
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except:  # noqa: E722
                pass
        return super().query(queries)


def test_ctrl_c_that_a_library_swallows_stops_behind_the_rollout(
    serial: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = rolled_out(plan_into(tmp_path, report=False), SwallowsCtrlC(), capsys)
    assert status == 130 and "stopped; go on with the same command" in out
    assert len(Results.load(tmp_path).episodes) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_terminal_every_rollout_is_a_line(serial: Results, tmp_path: Path, capsys: Any) -> None:
    status, out, _ = rolled_out(plan_into(tmp_path, report=False), Wanders(), capsys)
    assert status == 0
    lines = [line for line in out.splitlines() if line.startswith("[")]
    assert lines[0] == "[1/4] libero_goal task 1 initial state 30: failure, 16 steps; 0/1 solved (0%)"
    assert lines[3] == "[4/4] libero_goal task 8 initial state 31: failure, 16 steps; 0/4 solved (0%)"
    assert "\x1b" not in out and "\r" not in out


def test_lines_say_how_it_goes() -> None:
    record = EpisodeRecord("libero_10", 3, "t", "do it", 7, 0, 7, success=True, steps=87)
    line = "[4/40] libero_10 task 3 initial state 7: success, 87 steps; 2/3 solved (67%)"
    assert episode_line(record, [True, None, False, True], 40) == line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_and_rates_stay_readable_on_narrow_terminals(width: int) -> None:
    name = "put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket"
    episodes = [
        EpisodeRecord("libero_10", task, name, "do it", trial, trial, 7, success=trial < 47, other_task=1)
        for task in range(2)
        for trial in range(50)
    ]
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary_table(Results(episodes=episodes)))
    console.file.close()
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if "47/50" in line]
    assert len(rows) == 2 and all("84% to 98%" in row and "put both the a" in row for row in rows)
    assert len(lines) == 9, "two of headings, one a row, a rule before the sum"


def test_a_renderer_that_hangs_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "vendor.json")  # whoever opens it to read waits for a writer
    monkeypatch.setattr(backend, "_FRAME_TIMEOUT_S", 4.0)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", str(tmp_path / "vendor.json"))
    if backend.choose_backend() != "egl":
        pytest.skip("EGL does not draw here")
    began = time.monotonic()
    with pytest.raises(backend.RenderingUnavailable, match="drew no picture within 4 seconds: the graphics"):
        backend.check_rendering()
    assert time.monotonic() - began < 20


def test_a_full_disk_is_told_from_other_errors() -> None:
    from experiments.robot.libero.rollouts.runner import is_full

    assert is_full(OSError(errno.ENOSPC, "x")) and is_full(RuntimeError("ffmpeg: No space left on device"))
    assert not is_full(OSError(errno.EACCES, "x")) and not is_full(ValueError("x"))
