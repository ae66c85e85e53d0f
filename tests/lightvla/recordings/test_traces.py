"""Records of a server as what is drawn of them: counted in queries, since nobody knows how many steps were taken."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lightvla.commands.replay import main as replay_command
from lightvla.commands.visualize import main, parse
from lightvla.recordings.traces import trace_of
from prismatic.recordings.recording import Recording


def recording(queries: int = 4) -> Recording:
    rng = np.random.default_rng(0)
    return Recording(
        source="server", instruction="lift it", session="arm", center_crop=True, control_rate_hz=20.0,
        images={c: rng.integers(80, 256, (queries, 64, 64, 3), np.uint8) for c in ("full_image", "wrist_image")},
        states=np.zeros((queries, 8)), times=1.8e9 + 0.4 * np.arange(queries), numbers=np.arange(queries),
        chunks=np.zeros((queries, 8, 7)), kept=rng.uniform(size=(queries, 32)) < 0.4,
        policy={"checkpoint": "runs/small", "pruner": "lightvla"},
    )  # fmt: skip


def test_steps_that_nobody_knows_are_not_made_up() -> None:
    seen = recording()
    trace = trace_of(seen, Path("a.npz"))
    assert trace.unit_name == "policy query" and trace.steps.tolist() == [0, 1, 2, 3]
    assert trace.queries_per_second == pytest.approx(2.5), "by the server's clock"
    assert trace.success is None and trace.context == "session arm · small (lightvla)"
    known = trace_of(replace(seen, steps=np.array([0, 5, 9, 14]), actions=np.zeros((14, 7))), Path("a.npz"))
    assert known.unit_name == "control step" and known.steps.tolist() == [0, 5, 9, 14]
    assert known.queries_per_second == pytest.approx(4.0)
    with pytest.raises(ValueError, match="did not say which tokens it kept"):
        trace_of(replace(seen, kept=None), Path("a.npz"))


def test_pictures_of_a_server_s_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording().save(tmp_path / "a.npz")
    flags = ["--record", str(tmp_path), "--no_video", "--output_dir", str(tmp_path / "out")]
    assert main(parse(flags), Console(width=300)) == 0
    assert "a: 4 policy queries" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out" / "a" / "queries").iterdir())
    assert names == [f"query{query:03d}.png" for query in range(4)]
    assert replay_command(tmp_path / "a.npz", None, 2, Console(width=300)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "was recorded by a server, which knows neither the simulator's start" in said


def test_a_record_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"states": np.zeros((3, 8))}, "numbers of observations differ"),
        ({"actions": np.zeros((9, 7))}, "only one of steps and actions"),
        ({"actions": np.zeros((9, 7)), "steps": np.array([0, 5, 9, 14])}, "do not lie in order within its 9 actions"),
        ({"source": "nobody"}, "entries of another kind: source"),
        ({"control_rate_hz": 0.0}, "entries of another kind: control_rate_hz"),
        ({"part": 0}, "entries of another kind: part"),
    ):
        replace(recording(), **change).save(tmp_path / "a.npz")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words):
            Recording.load(tmp_path / "a.npz")
