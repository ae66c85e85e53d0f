from pathlib import Path

import pytest
from report_page import full_report, write_video

from prismatic.report.data import ReportData


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.fixture
def report(video: Path) -> ReportData:
    return full_report(video)
