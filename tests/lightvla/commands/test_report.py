import sys
from pathlib import Path

import pytest

from experiments.robot.libero.results.results import Results
from lightvla.commands.report import UNUSABLE, main


def test_command_writes_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        Results(run={"complete": True}).save(tmp_path / name / "results.json")
    assert main([str(tmp_path / "a" / "results.json"), str(tmp_path / "b"), "--output_dir", str(tmp_path / "out")]) == 0
    page, text = tmp_path / "out" / "report.html", tmp_path / "out" / "report.md"
    assert "2 evaluations" in page.read_text() and "2 evaluations" in text.read_text()
    assert str(page) in capsys.readouterr().out


def test_command_refuses_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == UNUSABLE
    assert capsys.readouterr().err.startswith("error: no results at")
    Results().save(tmp_path / "results.json")
    assert main([str(tmp_path), "--max_embedded_mb", "-1"]) == UNUSABLE
    assert "give 0 (embed nothing) or more" in capsys.readouterr().err
    assert main([str(tmp_path), "--max_embedded_mb", "inf"]) == UNUSABLE
    assert "max_embedded_mb is inf" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    assert main([str(tmp_path)]) == UNUSABLE
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a process")
def test_a_disk_that_is_full_is_said_with_its_folder_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file may have a byte: as on a full disk writing fails behind opening."""
    import resource

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        status = main([str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == UNUSABLE and not list(tmp_path.glob("report.html*"))
    words = capsys.readouterr().err
    assert f"written to {tmp_path}: File too large; make room, or give another folder with --output_dir" in words
