"""What `meta` says wrongly is said of its file, before anything is trained on."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures_lerobot import LOSSLESS, write_lerobot

from prismatic.vla.datasets.catalog import LAYOUTS
from prismatic.vla.datasets.entries.opening import open_dataset
from prismatic.vla.datasets.rlds import RldsIndex
from prismatic.vla.datasets.stored.index import DatasetIndex
from prismatic.vla.gripper import GRIPPERS

SPEC = replace(LAYOUTS["libero"], name="arm", map_actions=GRIPPERS["libero"])
INFO = Path("meta/info.json")
EPISODES = Path("meta/episodes.jsonl")
TASKS = Path("meta/tasks.jsonl")
EPISODES_3 = Path("meta/episodes/chunk-000/file-000.parquet")
TASKS_3 = Path("meta/tasks.parquet")
FROM = "videos/observation.images.image/from_timestamp"


def read(root: Path, **options: bool) -> DatasetIndex:
    return open_dataset(root, "arm", SPEC, **options)


def change_rows(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Of a file of lines in JSON, or of a Parquet file."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    else:
        pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


def with_value(key: str, value: Any, number: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Another value in one of the rows."""
    return lambda rows: [row | {key: value} if n == number else row for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("starts", "told"),
    [
        ([0.0, 0.0, 0.0], r"file-000.parquet has episode 1 begin at 0.0000 s of the video .*image/chunk-000/file-000"
         r".mp4, where the 12 frames of the episodes before it end at 0.6000 s"),
        ([0.05, 0.65, 1.3], r"has episode 0 begin at 0.0500 s .* the 0 frames"),
        ([0.6, 0.0, 1.25], r"has episode 0 begin at 0.6000 s .* the 13 frames .* end at 0.6500 s"),
        ([0.0, float("nan"), 1.25], r"file-000.parquet: .*/from_timestamp of episode 1 is nan; expected seconds"),
        ([0.0, None, 1.25], r"file-000.parquet: .*/from_timestamp of episode 1 is None; expected seconds"),
    ],
)  # fmt: skip
def test_an_episode_begins_in_its_video_where_the_one_before_it_ends(
    tmp_path: Path, tiny_index: RldsIndex, starts: list[float | None], told: str
) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", LOSSLESS)
    change_rows(
        folder / EPISODES_3,
        lambda rows: [row | {FROM: start} for row, start in zip(rows, starts, strict=True)],
    )
    with pytest.raises(ValueError, match=told):
        read(tmp_path)


def test_episodes_may_lie_in_a_video_in_another_order(tmp_path: Path, tiny_index: RldsIndex) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes, "v3.0", LOSSLESS)
    whole = read(tmp_path).episodes
    numbers = [2, 0, 1]  # as they lie in the video
    for path in (tmp_path / "arm" / EPISODES_3, tmp_path / "arm" / "data/chunk-000/file-000.parquet"):
        change_rows(path, lambda rows: [row | {"episode_index": numbers[row["episode_index"]]} for row in rows])
    other = read(tmp_path).episodes
    for one, another in zip((1, 2, 0), range(3), strict=True):
        assert (whole[one].image("full_image", 5) == other[another].image("full_image", 5)).all()


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("text", [None, " "])
def test_a_task_without_words_is_no_instruction(
    tmp_path: Path, tiny_index: RldsIndex, version: str, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, version)
    path, key = (folder / TASKS, "task") if version == "v2.1" else (folder / TASKS_3, "__index_level_0__")
    whole = [episode.instruction for episode in read(tmp_path).episodes]
    change_rows(path, with_value(key, text, 1))
    words = [episode.instruction for episode in read(tmp_path).episodes]
    assert 0 < len(words) < 3 and words == [word for word in whole if word != whole[1]]
    assert f"arm: {3 - len(words)} of 3 episodes without an instruction are left out" in caplog.text
    assert [episode.instruction for episode in read(tmp_path, as_stored=True).episodes][1] == ""
    change_rows(path, lambda rows: [row | {key: None} for row in rows])
    with pytest.raises(ValueError, match="none of the 3 episodes of .* has an instruction"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("version", "file", "key", "value", "told"),
    [
        ("v2.1", EPISODES, "length", None, "episodes.jsonl: length of episode 1 is None; expected an integer from 0"),
        ("v2.1", EPISODES, "length", "many", "episodes.jsonl: length of episode 1 is 'many'"),
        ("v2.1", EPISODES, "length", -3, "episodes.jsonl: length of episode 1 is -3"),
        ("v2.1", EPISODES, "length", 13.5, "episodes.jsonl: length of episode 1 is 13.5"),
        ("v2.1", EPISODES, "episode_index", None, "episodes.jsonl, episode 2 in it: episode_index is None"),
        ("v2.1", EPISODES, "episode_index", [1], r"episodes.jsonl, episode 2 in it: episode_index is \[1\]"),
        ("v2.1", EPISODES, "episode_index", 0, "episode 0 is listed twice, in .*episodes.jsonl and .*episodes.jsonl"),
        ("v2.1", TASKS, "task_index", None, "tasks.jsonl: task_index of '.*' is None"),
        ("v2.1", TASKS, "task_index", "a", "tasks.jsonl: task_index of '.*' is 'a'"),
        ("v3.0", EPISODES_3, "length", None, "file-000.parquet: length of episode 1 is None"),
        ("v3.0", EPISODES_3, "episode_index", None, "file-000.parquet: episode_index is None"),
        ("v3.0", EPISODES_3, "episode_index", 0, "episode 0 is listed twice, in .*file-000.parquet"),
        ("v3.0", EPISODES_3, "data/file_index", None, "file-000.parquet: data/file_index of episode 1 is None"),
        ("v3.0", TASKS_3, "task_index", None, "tasks.parquet: task_index of '.*' is None"),
    ],
)
def test_what_is_no_number_or_stands_twice_is_named(
    tmp_path: Path, tiny_index: RldsIndex, version: str, file: Path, key: str, value: Any, told: str
) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, version)
    change_rows(folder / file, with_value(key, value, 1))
    with pytest.raises(ValueError, match=told):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("fps", value) for value in (0, -20, [20], "abc", True, float("nan"), float("inf"))),
        *(("chunks_size", value) for value in (0, None, "1000", -1)),
    ],
)
def test_a_number_of_the_heading_that_is_none_is_named(
    tmp_path: Path, tiny_index: RldsIndex, key: str, value: Any
) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes, "v2.1", changed=lambda info: info | {key: value})
    with pytest.raises(ValueError, match=rf"info.json: {key} is {re.escape(repr(value))}; expected a"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"fps": None}, "info.json lacks fps"),
        ({"total_episodes": "3"}, "says total_episodes '3', and meta/episodes lists 3"),
        ({"data_path": "{episode_index.name}"}, "data_path '{episode_index.name}' cannot be filled in"),
        ({"features": {"action": {"dtype": ["float32"]}}}, "info.json lists no features with their dtype"),
    ],
)
def test_a_heading_that_is_malformed_is_named(
    tmp_path: Path, tiny_index: RldsIndex, wrong: dict[str, Any], told: str
) -> None:
    write_lerobot(tmp_path / "arm", tiny_index.episodes, "v2.1", changed=lambda info: info | wrong)
    with pytest.raises(ValueError, match=re.escape(told)):
        read(tmp_path)


TABLE = Path("data/chunk-000/episode_000001.parquet")


def with_column(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Another value in every row of one of the files."""
    return lambda path: change_rows(path, lambda rows: [row | {name: change(row[name])} for row in rows])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (with_column("timestamp", lambda _: float("nan")), "frame 0 of episode 1 in .*000001.parquet is at nan s"),
        (with_column("timestamp", str), "000001.parquet cannot be read: timestamp holds no number for each frame"),
        (with_column("episode_index", lambda _: [1, 1]), "000001.parquet cannot be read: episode_index holds no"),
        (lambda path: pq.write_table(pq.read_table(path).slice(0, 0), path), "episode 1 has 0 rows in"),
        (lambda path: path.write_bytes(b""), "000001.parquet cannot be read as Parquet"),
        (
            lambda path: pq.write_table(pq.read_table(path).drop_columns(["observation.images.image"]), path),
            "000001.parquet lacks the column observation.images.image; it has ",
        ),
    ],
)
def test_a_file_of_values_that_holds_others_is_named(
    tmp_path: Path, tiny_index: RldsIndex, damage: Callable[[Path], None], told: str
) -> None:
    damage(write_lerobot(tmp_path / "arm", tiny_index.episodes, "v2.1") / TABLE)
    with pytest.raises(ValueError, match=told):
        read(tmp_path)


def test_numbers_may_be_lists_of_one(tmp_path: Path, tiny_index: RldsIndex) -> None:
    folder = write_lerobot(tmp_path / "arm", tiny_index.episodes, "v2.1")
    for name in ("timestamp", "frame_index", "episode_index", "task_index"):
        with_column(name, lambda value: [value])(folder / TABLE)
    assert read(tmp_path).episodes[1].instructions == tiny_index.episodes[1].instructions
