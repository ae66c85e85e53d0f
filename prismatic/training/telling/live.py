"""The report of a run, written again and again while the run goes on, by a process of its own."""

import importlib.util
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import prismatic
from prismatic.training.runs.files import REPORT_FILE

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""So long a run's end waits for a page that is being written, and then for its last one: schedulers kill who stays."""


class LiveReport:
    """Keeps `report.html` of a run's folder up to date.

    The page is made by another process (`python -m prismatic.training.telling.write`), at low priority and one at a
    time, from what the run has written: training pays for starting it. That no page can be made is a warning.
    """

    def __init__(self, run: Path, minutes: float) -> None:
        """Args:
        run: the run's folder.
        minutes: between two pages; 0: none is written.
        """
        self._run = run
        self._minutes = minutes
        if minutes and (missing := [name for name in ("jinja2", "matplotlib") if not importlib.util.find_spec(name)]):
            log.warning(
                "no %s is written, which needs %s: pip install 'lightvla[report]'", REPORT_FILE, " and ".join(missing)
            )
            self._minutes = 0.0
        self._last = -float("inf")
        self._writer: subprocess.Popen[str] | None = None

    def write(self) -> None:
        """Begin to write the page if that is due and none is being written."""
        if self._minutes and time.monotonic() - self._last >= 60 * self._minutes and self._is_over():
            self._start()

    def close(self) -> None:
        """Write the last page, and wait for it."""
        if not self._minutes:
            return
        try:
            if self._writer is not None:
                self._writer.wait(_PATIENCE_S)
                self._is_over()
            self._start()
            if self._writer is not None:
                self._writer.wait(_PATIENCE_S)
                self._is_over()
        except subprocess.TimeoutExpired:
            log.warning(
                "the last %s was not finished in time and may still say that the run goes on; make it again with: "
                "lightvla report %s",
                REPORT_FILE, shlex.quote(str(self._run)),
            )  # fmt: skip
            assert self._writer is not None and self._writer.stderr is not None
            self._writer.stderr.close()

    def _is_over(self) -> bool:
        """Whether no page is being written; says what went wrong with the last one."""
        if self._writer is None:
            return True
        if self._writer.poll() is None:
            return False
        words = self._writer.communicate()[1].strip()
        if self._writer.returncode:
            log.warning("%s could not be written: %s", REPORT_FILE, words.rpartition("\n")[2])
        self._writer = None
        return True

    def _start(self) -> None:
        self._last = time.monotonic()
        root = str(Path(prismatic.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        words = [sys.executable, "-m", "prismatic.training.telling.write", str(self._run)]
        try:
            self._writer = subprocess.Popen(
                words,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                start_new_session=True,  # a terminal's Ctrl-C is the run's
            )  # fmt: skip
        except OSError as error:
            log.warning("%s could not be written: %s", REPORT_FILE, error)
