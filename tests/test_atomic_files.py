"""A reader sees the old file or the new one, whatever happens to the writer."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prismatic.atomic_files import replacing, write_atomically


def test_text_and_bytes_are_written_and_replaced(tmp_path: Path):
    path = tmp_path / "new" / "a.txt"
    assert write_atomically(path, "ä\n") == path and path.read_bytes() == b"\xc3\xa4\n"
    write_atomically(str(path), b"\x00")
    assert path.read_bytes() == b"\x00" and [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_alone(tmp_path: Path):
    path = write_atomically(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_process_leaves_the_old_file(tmp_path: Path):
    path = write_atomically(tmp_path / "a.txt", "old")
    code = (
        "import os, sys\nfrom prismatic.atomic_files import replacing\n"
        "with replacing(sys.argv[1]) as partial:\n    partial.write_text('ne')\n    os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_reader_never_sees_half_a_file(tmp_path: Path):
    path, seen, done = write_atomically(tmp_path / "a.txt", "a" * 100_000), set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            text = path.read_text()
            seen.add((len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "abcdefgh" * 20:
        write_atomically(path, letter * 100_000)
    done.set()
    reader.join()
    assert seen == {(100_000, 1)}
