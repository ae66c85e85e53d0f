"""Shards put together, against the evaluation that they are parts of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paired_results import rollout

from experiments.robot.libero.results.results import Results
from lightvla.commands.merge_results import main
from prismatic.command_status import UNUSABLE, UNWANTED

EPISODES = [
    replace(rollout(task, state, state % 3 > 0), video=f"videos/{task}_{state}.mp4")
    for task in (1, 8)
    for state in range(5)
]
EPISODES = [replace(e, bddl_sha256=f"{e.task_index:064x}", init_states_sha256=None) for e in EPISODES]


def shard(
    folder: Path, part: int, parts: int = 3, policy: str = "runs/small", bddl: str = "", more: Any = (), **config: Any
) -> Path:
    run = {
        **dict(more),
        "complete": True,
        "warnings": [f"of machine {part % 2}"],
        "seconds": 10.0 * part,
        "worker_restarts": 1,
    }
    described = {"checkpoint": f"/machine{part}/{policy}", "device": f"cuda:{part}", "pruner": "lightvla"}
    flags = {"task_suite_name": "libero_goal", "shard": f"{part}/{parts}", "output_dir": str(folder), **config}
    episodes = EPISODES[part - 1 :: parts]
    episodes = [replace(episode, bddl_sha256=bddl or episode.bddl_sha256) for episode in episodes]
    Results(run, flags, described, {"mujoco": "3.2.3"}, episodes).save(folder / "results.json")
    return folder


def test_all_shards_are_the_whole(tmp_path: Path) -> None:
    parts = [shard(tmp_path / f"part{part}", part) for part in (2, 3, 1)]
    assert main([str(tmp_path / "whole" / "all"), *map(str, parts)]) == 0
    merged = Results.load(tmp_path / "whole" / "all")
    assert [replace(e, video=None) for e in merged.episodes] == [replace(e, video=None) for e in EPISODES]
    assert merged.episodes[0].video == "../../part1/videos/1_0.mp4"
    assert merged.run["complete"] and merged.config["shard"] is None
    assert merged.run["warnings"] == ["of machine 0", "of machine 1"]
    assert (merged.run["seconds"], merged.run["worker_restarts"]) == (30.0, 3)


def test_other_code_is_told(tmp_path: Path) -> None:
    parts = [shard(tmp_path / f"part{part}", part, more={"git_commit": f"c{part % 2}"}) for part in (1, 2, 3)]
    assert main([str(tmp_path / "whole"), *map(str, parts)]) == 0
    assert "the shards' code: c1, c0" in Results.load(tmp_path / "whole").run["warnings"]


def test_a_missing_shard_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [shard(tmp_path / f"part{part}", part) for part in (1, 3)]
    assert main([str(tmp_path / "whole"), *map(str, parts)]) == UNWANTED
    assert "warning: shard 2/3 is missing" in capsys.readouterr().err
    merged = Results.load(tmp_path / "whole")
    assert merged.run["complete"] is False and "shard 2/3 is missing" in merged.run["warnings"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"parts": 4}, "of different evaluations: number of shards 3 and 4"),
        ({"seed": 8}, "of different evaluations: seed null and 8"),
        ({"policy": "runs/large"}, 'of different evaluations: policy "small" and "large"'),
        ({"more": {"rendering_backend": "osmesa"}}, 'of different evaluations: rendering_backend "egl" and "osmesa"'),
        ({"bddl": "f" * 64}, "of different evaluations: BDDL file of libero_goal task 1"),
        ({"part": 1}, "libero_goal task 1, initial state 0 is in another one too; give each shard once"),
        ({"shard": None}, "part2 is no shard: it was evaluated without --shard"),
    ],
)
def test_what_belongs_not_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], words: str
) -> None:
    egl = {"rendering_backend": "egl"}
    parts = [shard(tmp_path / "part1", 1, more=egl), shard(tmp_path / "part2", **{"part": 2, "more": egl, **other})]
    assert main([str(tmp_path / "whole"), *map(str, parts)]) == UNUSABLE
    assert words in capsys.readouterr().err and not (tmp_path / "whole").exists()


def test_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [shard(tmp_path / f"part{part}", part) for part in (1, 2, 3)]
    assert main(list(map(str, parts))) == UNUSABLE
    assert "is there already; name a new folder first" in capsys.readouterr().err
