"""The flags of `lightvla study`."""

import argparse
from pathlib import Path

PRESETS = ("quick",)
STUDIES = Path("studies")


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text.lower() == "true"


def study_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a study: one parent, arms trained and measured alike, a report with paired verdicts. Its "
        "definition is NAME/study.yaml below --studies_dir. Interrupted, the same command goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("name", nargs="?", help="folder of the study below --studies_dir")
    add("--preset", choices=PRESETS, help="instead of a name: a study of under an hour on two cores")
    add("--only", metavar="ARM", help="one arm, and what it needs (default: all)")
    switch: dict = {"nargs": "?", "const": True, "default": False, "type": _switch, "metavar": "BOOL"}
    add("--list", help="show the steps, what is done and how long the rest takes; run nothing", **switch)
    add("--report_only", help="make the report from the kept results; run nothing", **switch)
    add("--force", help="go on although study.yaml changed after arms had been run; the report tells it", **switch)
    add("--num_processes", type=int, default=2, help="simulator processes at once (default: 2)")
    add("--studies_dir", type=Path, default=STUDIES, help=f"holds a folder for each study (default: {STUDIES})")
    return parser
