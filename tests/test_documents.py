"""What the documents say: commands that can be typed, links that lead somewhere, numbers that are the code's."""

import ast
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT, Typed, commands
from made_up_runs import write_run
from report_results import digest

from experiments.robot.libero.evaluation.checks import check_flags
from experiments.robot.libero.results.results import EpisodeRecord, Results
from experiments.robot.libero.settings.flags import EvaluationConfig
from lightvla.__main__ import COMMANDS
from prismatic.command_line import parse_flags

ALL = list(commands())
PATHS = {
    "vla-scripts/finetune.py": "finetune",
    "vla-scripts/merge_lora_weights_and_save.py": "merge",
    "vla-scripts/deploy.py": "serve",
    "experiments/robot/libero/run_libero_eval.py": "eval",
    "scripts/collect_libero_demos.py": "collect",
    "experiments/robot/libero/regenerate_libero_dataset.py": "regenerate",
    "scripts/compare_results.py": "compare",
    "scripts/report_results.py": "report",
    "scripts/benchmark.py": "benchmark",
    "scripts/inspect_checkpoint.py": "inspect",
    "scripts/inspect_dataset.py": "inspect-dataset",
    "scripts/push_to_hub.py": "push",
    "scripts/visualize_pruning.py": "visualize",
    "scripts/replay_record.py": "replay",
    "scripts/records_to_rlds.py": "records-to-rlds",
    "scripts/play.py": "play",
    "scripts/looks.py": "looks",
    "scripts/demo.py": "demo",
    "scripts/study.py": "study",
    "scripts/build_small_model.py": "build-small-model",
}
"""Files that are a command's -> the command."""

SYSTEM = {"sudo", "make", "pip", "hf", "git", "cd", ".", "export", "python3", "chmod", "docker"}
"""What stands in the documents and is not ours; `make` targets, files and extras are looked at below."""


def ours(typed: Typed) -> tuple[str, list[str]] | None:
    """(command of ours, its flags); None for what is none."""
    words = list(typed.words)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if words[0] == "torchrun":
        place = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")), None)
        assert place is not None, f"{typed}: torchrun of nothing"
        words = words[place + 2 :] if words[place] == "-m" else words[place:]
        return (PATHS[words[0]], words[1:]) if words[0] in PATHS else (words[0], words[1:])
    if words[:3] == ["python", "-m", "lightvla"]:
        words = words[2:]
    if words[0] == "python" and words[1] in PATHS:
        return PATHS[words[1]], words[2:]
    if words[0] == "lightvla":
        return (words[1], words[2:]) if len(words) > 1 else ("--help", [])
    return None


@cache
def flags_of(name: str) -> Callable[[list[str]], object]:
    module, _, attribute = COMMANDS[name].flags.partition(":")
    flags = getattr(importlib.import_module(module), attribute)
    return (lambda words: parse_flags(flags, words)) if isinstance(flags, type) else flags().parse_args


def test_there_are_commands_in_every_document_that_should_have_some() -> None:
    assert len(ALL) > 60
    assert {"README.md", "SETUP.md", "LIBERO.md", "docs/tutorials/evaluate.md"} <= {typed.document for typed in ALL}


@pytest.mark.parametrize("typed", ALL, ids=str)
def test_a_command_exists_and_takes_its_flags(typed: Typed, capsys: pytest.CaptureFixture[str]) -> None:
    found = ours(typed)
    if found is None:
        if typed.words[0] in ("python", "python3") and typed.words[1] != "-c":
            source = (ROOT / typed.words[1]).read_text()
            own = typed.words[2 : typed.words.index("--") if "--" in typed.words else None]
            flags = [word.removeprefix("--").partition("=")[0] for word in own if word.startswith("--")]
            # An argument of argparse, or a field of a configuration.
            missing = [flag for flag in flags if not re.search(rf'"--{flag}"|^    {flag}: ', source, re.MULTILINE)]
            assert not missing, f"{typed}: no such flags: {missing}"
        else:
            assert typed.words[0] in {*SYSTEM, "python"}, f"{typed}: what is {typed.words[0]}?"
        return
    name, flags = found
    if name in ("--help", "-h"):
        return
    assert name in COMMANDS, f"{typed}: there is no command {name}"
    try:
        flags_of(name)(flags)
    except SystemExit as end:
        assert end.code == 0, f"{typed}: {capsys.readouterr().err}"
    except ValueError as error:
        pytest.fail(f"{typed}: {error}")


@pytest.mark.parametrize("typed", [t for t in ALL if t.words[0] == "make"], ids=str)
def test_make_has_the_target(typed: Typed) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in typed.words[1:] if "=" not in word} <= targets


def test_extras_that_are_installed_exist() -> None:
    known = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        for extras in re.findall(r"(?:lightvla|\.)\[([a-z,]+)\]'", path.read_text()):
            assert {*extras.split(",")} <= known, f"{path.name}: {extras}"


def files(folder: Path, small_policy: Path) -> None:
    """What the runnable commands of the documents read, under the names that they give it."""
    shutil.copytree(small_policy, folder / "CHECKPOINT")
    solved = {"evaluation/wide": 10, "evaluation/random": 2, "evaluation/blank": 0, "evaluation-8/wide": 7}
    for name, successes in solved.items():
        episodes = [
            EpisodeRecord(
                "libero_goal", task, f"task_{task}", "put", state, state, 7, success=state < successes,
                tokens_kept=[17], num_visual_tokens=98, latency_ms=[20.0],
                bddl_sha256=digest(task), init_states_sha256=digest(task),
                actions_sha256=digest(f"{name}{task}{state}"),
            )
            for task in (1, 4)
            for state in range(12)
        ]  # fmt: skip
        policy = {"checkpoint": f"runs/{name}", "pruner": "lightvla", "robot": {"open_loop_steps": 8}}
        run = {"renderer": "fast", "complete": True}
        result = Results(run, {"task_suite_name": "libero_goal"}, policy, {"mujoco": "3.2.3"}, episodes)
        result.save(folder / "demo" / name / "results.json")
    copies = {
        "wide": ("OURS", "logs/ours", "experiments/logs/RUN"),
        "random": ("THEIRS", "logs/theirs"),
    }
    for run in ("first", "second"):
        write_run(folder / "runs", name=run)
    for source, targets in copies.items():
        for target in targets:
            shutil.copytree(folder / "demo" / "evaluation" / source, folder / target)


def runs_here(typed: Typed) -> bool:
    """Whether a command needs no GPU, download, simulator or training, and what it reads is in `files`."""
    found = ours(typed)
    if found is None:
        return False
    name, flags = found
    text = " ".join(flags)
    if "--help" in flags or name in ("--help", "-h"):
        return True
    if name in ("compare", "report"):
        return not re.search(r"SPATIAL|A7", text)
    return name == "inspect" and "CHECKPOINT" in flags


RUNNABLE = {t.words: t for t in ALL if runs_here(t)}


def test_enough_of_them_are_run() -> None:
    assert {"compare", "report", "inspect"} <= {found[0] for t in RUNNABLE.values() if (found := ours(t))}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_policy_directory: Path) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    files(folder, small_policy_directory)
    return folder


@pytest.mark.parametrize("typed", RUNNABLE.values(), ids=str)
def test_a_command_that_needs_nothing_runs(typed: Typed, workplace: Path) -> None:
    found = ours(typed)
    assert found is not None
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "lightvla", found[0], *found[1]],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{typed}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_evaluations_of_the_documents_are_ones_that_can_be_had() -> None:
    """Beyond the flags' types: suites, protocols, controls and indices exist."""
    checked = 0
    for typed in ALL:
        found = ours(typed)
        if found is None or found[0] != "eval" or "--help" in found[1] or "--resume" in found[1]:
            continue
        config = parse_flags(EvaluationConfig, found[1])
        if not (config.pretrained_checkpoint or config.policy_url):
            continue  # one that leaves the policy to the reader
        check_flags(config)
        checked += 1
    assert checked > 8


def headings(text: str) -> set[str]:
    """Anchors of a document, as GitHub and the site make them."""
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading)).strip().lower().replace(" ", "-") for heading in found
    }


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http", "mailto")):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{path.name}: {target}"
        if anchor and other.suffix == ".md":
            assert anchor in headings(other.read_text()), f"{path.name}: {target}"


def provenance() -> list[tuple[str, str]]:
    """(`module:name`, value as the page writes it) of each row that names both."""
    text = (ROOT / "docs" / "provenance.md").read_text()
    return re.findall(r"\| `([^`]+)` \| `([\w.]+:[\w.]+)` \|", text)


@pytest.mark.parametrize(("value", "place"), provenance())
def test_a_constant_is_what_the_page_says(value: str, place: str) -> None:
    module, _, names = place.partition(":")
    found: object = importlib.import_module(module)
    for name in names.split("."):
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            found = next(field.default for field in dataclasses.fields(found) if field.name == name)
        else:
            found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == ast.literal_eval(value)


def test_the_table_of_constants_is_read() -> None:
    assert len(provenance()) > 20


def test_no_document_is_large() -> None:
    for path in [*(ROOT / "docs").rglob("*"), *DOCUMENTS]:
        assert not path.is_file() or path.stat().st_size < 1_000_000, path
    assert len((ROOT / "LIBERO.md").read_text().splitlines()) < 200
