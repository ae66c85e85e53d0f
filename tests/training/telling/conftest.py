from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run's folder below the test's; keyword arguments as those of `write_run`."""

    def make(**given: Any) -> Path:
        return write_run(tmp_path / "runs", **given).run_dir

    return make
