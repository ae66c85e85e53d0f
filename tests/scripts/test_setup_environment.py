import re
import shutil
import sys
from pathlib import Path

import pytest

from experiments.robot.libero.simulator.backend import APT_COMMAND
from scripts import setup_environment


def test_the_simulator_names_the_same_packages() -> None:
    assert APT_COMMAND.endswith("install -y " + " ".join(setup_environment.EGL_PACKAGES))


def test_an_unfit_python_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"3\.10 to 3\.13 is needed.*make setup PYTHON="):
        setup_environment.check_python()


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 13, 0), (3, 14, 1)])
def test_only_an_untried_python_is_told_what_is_missing_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: tuple[int, ...]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    setup_environment.check_python()
    said = capsys.readouterr().out
    assert ("Python 3.14 has not been tried" in said and "TensorFlow does not" in said) == (version >= (3, 14))
    assert len(said.splitlines()) == (version >= (3, 14))


@pytest.mark.parametrize("document", ["README.md", "SETUP.md"])
def test_documents_and_script_tell_one_download_size(document: str) -> None:
    text = (setup_environment.ROOT / document).read_text()
    sizes = re.findall(r"downloads (?:about )?([\d.]+ GB)", text + setup_environment.SIZE)
    assert len(sizes) > 1 and len(set(sizes)) == 1


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian system")
def test_only_missing_packages_are_installed() -> None:
    assert setup_environment.missing_packages(["dpkg", "lightvla-no-such-package"]) == ["lightvla-no-such-package"]
    assert not setup_environment.install_packages(["dpkg"])


def test_a_renderer_that_does_not_work_is_reported_not_raised() -> None:
    name, error = setup_environment.render(Path(sys.executable), "no-such-backend")
    assert name is None
    assert "MUJOCO_GL='no-such-backend'" in error and "unset MUJOCO_GL" in error


def test_a_missing_browser_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    setup_environment.check_browser()
    assert "apt-get install -y chromium" in capsys.readouterr().out
    browser = tmp_path / "chromium"
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    assert setup_environment.find_browser() == str(browser)
    setup_environment.check_browser()
    assert str(browser) in capsys.readouterr().out
