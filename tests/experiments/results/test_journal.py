from dataclasses import asdict
from pathlib import Path

import pytest

from experiments.robot.libero.results.journal import Journal, JournalInUse, has_rollouts, read_journals
from experiments.robot.libero.results.results import EpisodeRecord


def record(trial: int, **more: object) -> EpisodeRecord:
    return EpisodeRecord("libero_goal", 1, "task_1", "do it", trial, trial, 7, **more)  # type: ignore[arg-type]


def write(folder: Path, each: EpisodeRecord, rank: int = 0) -> None:
    with Journal(folder, rank) as journal:
        journal.append(each)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not has_rollouts(folder) and read_journals(folder) == []
    records = [record(0, success=True, stage_ms={"llm": [1.5, 2.0]}), record(1, success=False, tokens_kept=[3])]
    other = record(2, invalid="Traceback: boom")
    for each in records:
        write(folder, each)
    write(folder, other, rank=1)
    assert has_rollouts(folder)
    assert [asdict(each) for each in read_journals(folder)] == [asdict(each) for each in [*records, other]]


@pytest.mark.parametrize("ranks", [(0, 0), (0, 1), (1, 0)])
def test_of_a_repeated_start_the_valid_record_counts(tmp_path: Path, ranks: tuple[int, int]) -> None:
    write(tmp_path, record(0, invalid="boom"), ranks[0])
    write(tmp_path, record(0, success=True), ranks[1])
    (found,) = read_journals(tmp_path)
    assert found.success is True and found.invalid is None


@pytest.mark.parametrize("bytes_left", [1, 40, -1])
def test_a_line_that_was_cut_off_loses_only_itself(tmp_path: Path, bytes_left: int) -> None:
    write(tmp_path, record(0))
    (path,) = tmp_path.iterdir()
    whole = len(path.read_bytes())
    write(tmp_path, record(1))
    content = path.read_bytes()
    path.write_bytes(content[: whole + bytes_left if bytes_left > 0 else bytes_left])
    kept = [0] if bytes_left > 0 else [0, 1]  # only the end of the line is missing
    assert [each.trial for each in read_journals(tmp_path)] == kept
    write(tmp_path, record(2))
    assert [each.trial for each in read_journals(tmp_path)] == [*kept, 2]


def test_another_version_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.path.write_text('{"colour": "red", "trial": 4}\n')
    with pytest.raises(ValueError, match=r"rank0.jsonl, line 1: episode 4 has unknown keys \['colour'\]"):
        read_journals(tmp_path)


def test_one_evaluation_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for _ in range(2):  # a refused process leaves no lock behind, and takes none away
            with pytest.raises(JournalInUse, match=r"another evaluation is writing episodes\.rank0\.jsonl there; wait"):
                Journal(tmp_path)
        write(tmp_path, record(1), rank=1)
        journal.append(record(0))
    write(tmp_path, record(2))
    assert sorted(each.trial for each in read_journals(tmp_path)) == [0, 1, 2]


def test_fewer_processes_wait_for_the_end_of_more(tmp_path: Path) -> None:
    """As when the second of two machines goes on after the first has died."""
    with Journal(tmp_path, rank=1, world_size=2) as second:
        second.append(record(1))
        with pytest.raises(JournalInUse, match=r"episodes\.rank1\.jsonl"):
            Journal(tmp_path)
        Journal(tmp_path, world_size=2).close()
    Journal(tmp_path).close()


def test_an_evaluation_without_rollouts_leaves_no_trace(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with Journal(folder):
        assert folder.is_dir() and not has_rollouts(folder)
    assert not folder.exists()
    folder.mkdir()
    with Journal(folder), Journal(folder, rank=1, world_size=2) as second:
        second.append(record(1))
    assert [path.name for path in folder.iterdir()] == ["episodes.rank1.jsonl"]
