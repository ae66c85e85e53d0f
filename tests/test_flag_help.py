"""What `--help` says is what the source says."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.robot.libero.demonstrations.config import CollectionConfig
from experiments.robot.libero.looks.config import LooksConfig
from experiments.robot.libero.settings.flags import EvaluationConfig
from lightvla.demo.settings import DemoConfig, SmallModelConfig
from lightvla.flags import FinetuneFlags, MergeConfig
from prismatic.flag_help import FlagHelp, flags_of, help_text


@dataclass
class Example:
    """Do something with a policy."""

    # What acts
    checkpoint: str  # folder or hub id
    size: int = 224  # side, pixels

    # Where it acts
    place: Path | None = None  # None: here
    note: str = ""


def test_a_section_is_no_field_s_help() -> None:
    assert flags_of(Example) == [
        FlagHelp("checkpoint", "str", "What acts", "folder or hub id", None),
        FlagHelp("size", "int", "What acts", "side, pixels", "224"),
        FlagHelp("place", "Path | None", "Where it acts", "None: here", "None"),
        FlagHelp("note", "str", "Where it acts", "", "none"),
    ]


def test_help_shows_sections_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert help_text(Example, "lightvla example") == (
        "usage: lightvla example [--FLAG VALUE]...\n\nDo something with a policy.\n\nWhat acts:\n"
        "  --checkpoint TEXT           folder or hub id (must be given)\n"
        "  --size INT                  side, pixels (default: 224)\n\nWhere it acts:\n"
        "  --place PATH                None: here\n"
        "  --note TEXT                 (default: none)\n\nOther:\n"
        "  --config_path PATH          a YAML file with values of these flags (default: none)\n"
        "  --help                      this text\n"
    )


@pytest.mark.parametrize(
    "config",
    [FinetuneFlags, EvaluationConfig, LooksConfig, CollectionConfig, DemoConfig, SmallModelConfig, MergeConfig],
)
def test_every_flag_says_what_it_does_and_what_holds_without_it(config: type) -> None:
    flags = flags_of(config)
    assert [flag.name for flag in flags] == list(config.__dataclass_fields__)
    for flag in flags:
        assert len(flag.comment) > 3, f"--{flag.name} says nothing"
        assert any(words in flag.text for words in ("(default: ", "None:", "by default", "(must be given)")), flag
        assert flag.section or config not in (FinetuneFlags, EvaluationConfig)


def test_help_is_printed_and_ends_well() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightvla", "finetune", "-h"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: lightvla finetune [--FLAG VALUE]...")
    assert "--learning_rate NUMBER" in done.stdout and "(default: 0.0005)" in done.stdout
