"""A dataset's folder, whatever it holds: RLDS shards or a LeRobot dataset."""

from pathlib import Path

from prismatic.vla.datasets.catalog import DatasetSpec
from prismatic.vla.datasets.lerobot.layout import Layout, is_lerobot
from prismatic.vla.datasets.lerobot.libraries import check_libraries
from prismatic.vla.datasets.lerobot.reader import LeRobotIndex
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.shards import find_shards, find_version
from prismatic.vla.datasets.stored.index import DatasetIndex


def open_dataset(
    root: Path | str,
    name: str,
    spec: DatasetSpec,
    use_state: bool = True,
    compare: bool = True,
    as_stored: bool = False,
) -> DatasetIndex:
    """All episodes of `<root>/<name>`: a LeRobot dataset where there is a `meta/info.json`, else RLDS.

    Args and errors as of `RldsIndex.open` and `LeRobotIndex.open`.
    """
    if is_lerobot(Path(root).expanduser() / name):
        return LeRobotIndex.open(root, name, spec, use_state, as_stored)
    return RldsIndex.open(root, name, spec, use_state, compare, as_stored)


def check_folder(root: Path | str, spec: DatasetSpec) -> None:
    """What can be said of a dataset's folder without reading it.

    Raises:
        ValueError: its layout is not read, or a library that reads it lacks.
        FileNotFoundError: it or one of its shards is missing.
    """
    folder = Path(root).expanduser() / spec.name
    if is_lerobot(folder):
        check_libraries(Layout.read(folder), spec)
    else:
        find_shards(find_version(Path(root), spec.name))
