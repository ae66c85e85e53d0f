"""The libraries that read LeRobot datasets, imported when one is opened; RLDS and inference do without."""

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismatic.vla.datasets.catalog import DatasetSpec
    from prismatic.vla.datasets.lerobot.layout import Layout


def import_parquet() -> ModuleType:
    """`pyarrow.parquet`. Raises ValueError with the remedy where it is not installed."""
    return _import("pyarrow.parquet")


def import_av() -> Any:
    """`av` (PyAV). Raises ValueError with the remedy where it is not installed."""
    return _import("av")


def check_libraries(layout: "Layout", spec: "DatasetSpec") -> None:
    """Raises ValueError where a library lacks that the dataset needs."""
    needed = ["pyarrow", *(["av"] if any(f["dtype"] == "video" for f in layout.features.values()) else [])]
    _require(*needed)


def _import(name: str) -> ModuleType:
    _require(name.partition(".")[0])
    return importlib.import_module(name)


def _require(*names: str) -> None:
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(f"reading a LeRobot dataset needs {' and '.join(missing)}: pip install 'lightvla[data]'")
