"""The check of a device: all of it, at a size that any machine runs, and what it says of errors and wrong figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.dev.gpu_check import CheckConfig, choose_sections
from scripts.dev.gpu_figures import Section, run_section

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_every_section_comes_to_its_end(tmp_path):
    output = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "scripts" / "dev" / "gpu_check.py"), "--preset", "tiny", "--device", "cpu"]
    command += ["--load", "True", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sections that failed: none" in done.stdout and "wrong figures: none" in done.stdout
    sections = json.loads(output.read_text())["sections"]
    assert list(sections) == ["right", "ceilings", "latency", "fp8", "batch", "memory", "load", "train"]
    for name, section in sections.items():
        assert section["error"] is None and section["figures"] and 0 <= section["seconds"] <= section["limit_s"], name
        for label, figure in section["figures"].items():
            value = figure["value"]
            assert label in done.stdout and figure["ok"] is not False
            assert not isinstance(value, float) or (math.isfinite(value) and value >= 0), label
    values = {name: {label: figure["value"] for label, figure in s["figures"].items()} for name, s in sections.items()}
    tested = [figure for section in sections.values() for figure in section["figures"].values() if figure["ok"]]
    assert len(tested) > 60
    latency = values["latency"]
    assert latency["none, tokens kept"] == 512 and latency["lightvla K=78, tokens kept"] == 78
    assert latency["none, whole, work"] > latency["lightvla K=78, whole, work"] > 0
    assert latency["none, encode, p50"] <= latency["none, encode, p95"]
    assert 0 < latency["none, whole, floor's share of p50"] < 1
    assert values["batch"]["lightvla K=78, 2 at once against alone: kept tokens"] == 2 * 78
    train = values["train"]
    assert train["compact, batch 2, tokens kept"] == train["duplicated, batch 2, tokens kept"] == 78
    assert train["losses of both forms apart by, relative"] < 0.02
    assert train["none, batch 2, gradient checkpointing, tokens kept"] == 512


def test_an_error_ends_its_section_alone():
    def break_off(section: Section) -> None:
        section.tell("before", 1)
        raise ArithmeticError("in the middle")

    def hang(section: Section) -> None:
        while True:
            pass

    broken, late, wrong = Section("broken", 5), Section("late", 0.05), Section("wrong", 5)
    run_section(broken, break_off)
    assert list(broken.figures) == ["before"] and "ArithmeticError: in the middle" in str(broken.error)
    run_section(late, hang)
    assert "TimeoutError" in str(late.error)
    run_section(wrong, lambda section: [section.tell(f"{v}", v, at_most=1.0) for v in (0.5, 2.0, float("nan"))])  # type: ignore[arg-type, func-returns-value]
    assert wrong.error is None and wrong.wrong == ["2.0", "nan"]


def test_sections_are_chosen_by_name():
    assert choose_sections(CheckConfig()) == ["right", "ceilings", "latency", "fp8", "batch", "memory", "train"]
    assert choose_sections(CheckConfig(only="train, load")) == ["load", "train"]
    with pytest.raises(ValueError, match="names speed; known: right, ceilings"):
        choose_sections(CheckConfig(only="right,speed"))
