"""The command as a person runs it: a small policy, the real simulator, the page in headless Chromium."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from browser import Visit, chromium

from lightvla.flags import PlayConfig
from lightvla.play import command
from prismatic.recordings.recording import Recording

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "<img src=x onerror=alert(1)>"


@contextmanager
def playing(checkpoint: Path) -> Iterator[str]:
    """The address of the page; the command ends well when it is told to."""
    flags = ["--pretrained_checkpoint", str(checkpoint), "--dtype", "float32", "--env_img_res", "64", "--port", "0"]
    program = [sys.executable, str(ROOT / "scripts" / "play.py"), *flags, "--max_steps", "40"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=checkpoint.parent) as process:
        assert process.stdout is not None
        try:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\w.:]+", line)))
            yield address
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()


def wait_for(state: Callable[[], dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    until = time.monotonic() + 240
    while True:
        now = state()
        if all(now[name] == value for name, value in wanted.items()):
            return now
        assert time.monotonic() < until and now["phase"] != "failed", now
        time.sleep(0.2)


@pytest.mark.slow
def test_a_person_plays(small_policy_directory: Path) -> None:
    with playing(small_policy_directory) as address, chromium() as browser:

        def state() -> dict[str, Any]:
            return requests.get(f"{address}/play/state", timeout=30).json()

        first = wait_for(state, phase="paused")
        assert len(first["tasks"]) == 10 and first["steps"] == 0 and first["num_initial_states"] == 50
        visit = Visit(browser, address, viewport={"width": 390, "height": 844})
        page = visit.page
        panel = page.locator("#panel")
        panel.get_by_label("to the left, cm").wait_for()
        panel.get_by_label("Move").select_option("plate_1")
        panel.get_by_label("away, cm").fill("-4")
        panel.get_by_label("away, cm").press("Enter")
        moved = wait_for(state, offsets={"plate_1": [0.04, 0]}, phase="paused")
        assert moved["starts"]["plate_1"][0] - first["starts"]["plate_1"][0] == pytest.approx(0.04, abs=2e-3)

        panel.get_by_label("Instruction").select_option(label="a sentence of your own …")
        panel.locator("input[type=text]").fill(HOSTILE)
        panel.get_by_label("Pruner").select_option("none")
        wait_for(state, pruner="none")
        panel.get_by_role("button", name="Start").click()
        ended = wait_for(state, phase="ended")
        assert ended["instruction"] == HOSTILE and ended["steps"] == 40 and ended["success"] is None
        page.wait_for_timeout(1500)
        assert page.inner_text("#instruction") == HOSTILE
        assert re.match(r"32 of 32 visual tokens kept", page.inner_text("#kept"))
        assert "none" in page.inner_text("#facts").split("\n")
        assert "40 steps are used up" in panel.inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="Download").click()
        record = Recording.load(download.value.path())
        assert record.instruction == HOSTILE and record.policy["pruner"].startswith("none")
        assert record.chunks.shape == (1, 8, 7) and record.kept is not None and record.kept.all()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert visit.complaints == []

        for content, status in (
            ({"instruction": "  "}, 422),
            ({"instruction": "x", "initial_state": 50}, 422),
            ({"instruction": "x", "offsets": {"plate_1": [9, 0]}}, 422),
        ):
            assert requests.post(f"{address}/play/begin", json=content, timeout=30).status_code == status
        begun = {"instruction": first["instruction"], "initial_state": 30, "offsets": {"plate_1": [0.0, -0.12]}}
        requests.post(f"{address}/play/begin", json=begun, timeout=30)
        until = time.monotonic() + 60
        while state()["phase"] != "failed":
            assert time.monotonic() < until
        assert "plate_1 cannot stand there" in state()["said"]


def test_what_cannot_be_played_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for config, words in (
        (PlayConfig(), "there is no demo/runs/small: `make demo`"),
        (PlayConfig(task_suite_name="libero_goals"), "libero_goals"),
        (PlayConfig("somewhere", host="0.0.0.0"), "--api_key_file"),
        (PlayConfig("somewhere", trained_tasks="bowl"), "--trained_tasks bowl"),
        (PlayConfig("somewhere", port=99_999), "--port 99999: expected 0 to 65535"),
        (PlayConfig("somewhere", renderer="other"), "unknown --renderer 'other'; known: robosuite, fast"),
        (PlayConfig("somewhere", max_steps=0), "--max_steps 0: expected at least 1"),
        (PlayConfig("somewhere", task_id=99), "libero_goal has no task 99; expected 0 to 9"),
        (PlayConfig("somewhere", initial_state=999), "--initial_state 999: expected 0 to 49"),
    ):
        assert command(config) == 2
        assert words in capsys.readouterr().err
