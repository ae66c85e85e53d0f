"""The lock file against `pyproject.toml`: that it holds every dependency within its bounds, on every Python."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def _lines() -> list[str]:
    return [line for line in LOCK.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _asked_for(extras: tuple[str, ...] = ("all",)) -> Iterator[Requirement]:
    """The requirements of the project and of the extras, those that an extra names of this project followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [
        *project["dependencies"],
        *(line for name in extras for line in project["optional-dependencies"][name]),
    ]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            yield from _asked_for(tuple(requirement.extras))
        else:
            yield requirement


def _holds(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(
        {"python_version": python, "python_full_version": f"{python}.0"}
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_locked_once_and_within_its_bounds(python: str) -> None:
    pinned = [requirement for requirement in map(Requirement, _lines()) if _holds(requirement, python)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    assert len(versions) == len(pinned)
    asked_for = [requirement for requirement in _asked_for() if _holds(requirement, python)]
    wrong = [str(r) for r in asked_for if not r.specifier.contains(versions.get(canonicalize_name(r.name), "0"))]
    assert not wrong, f"run `make lock`: requirements.lock does not hold {wrong} on Python {python}"


def test_the_lock_file_holds_versions_only_and_how_it_is_made() -> None:
    text = LOCK.read_text()
    assert "make lock (uv pip compile pyproject.toml --universal" in text.splitlines()[1]
    assert "://" not in text and "file:" not in text and "--index" not in text
    assert all(str(Requirement(line).specifier).startswith("==") for line in _lines())
