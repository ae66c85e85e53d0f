"""What a policy query costs, as the report tells it."""

from pathlib import Path

import numpy as np
import pytest
from report_results import CONFIG, POLICY, RUN, data_of, episode, save, tables, texts
from scipy import stats

from experiments.robot.libero.reports.cost import REST, REST_WITH_WAITING, SERVER_REST, latency_section, query_times
from experiments.robot.libero.reports.evaluation import Evaluation
from experiments.robot.libero.results.results import Results
from prismatic.report.charts import StackedBars
from prismatic.report.data import Table


def test_the_table_of_tasks_counts_each_task_by_itself(tmp_path: Path) -> None:
    slow = {"latency_ms": [990.0, 31.0, 55.0], "policy_ms": [900.0, 30.0, 50.0]}
    episodes = [episode(1, 0, True, steps=40, **slow), episode(4, 0, True), episode(4, 1, None), episode(4, 2, False)]
    table = tables(data_of(save(tmp_path / "run", episodes)))["Tasks"]
    assert [row[2:] for row in texts(table)] == [
        ["0", "40 (2.0 s)", "10.0", "50.0 ms"], ["1", "20 (1.0 s)", "10.0", "15.0 ms"],
        ["1", "30 (1.5 s)", "10.0", "15.0 ms"],
    ]  # fmt: skip
    for record in episodes:
        record.policy_ms, record.jerk, record.progress = [], 3.0, 0.5
    table = tables(data_of(save(tmp_path / "run", episodes)))["Tasks"]
    assert [row[4:6] for row in texts(table)] == [["3.0", "50 %"]] * 3 and table.columns[4] == "jerk in m/s³"
    assert [row[-1] for row in texts(table)] == [f"{time} ms including waiting" for time in ("55.0", "60.0", "60.0")]


def test_times_are_split_by_stage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    latency, vision, llm = rng.uniform(20, 30, 40), rng.uniform(1, 5, 40), rng.uniform(3, 9, 40)
    stages = {"vision": vision.tolist(), "llm": llm.tolist(), "total": (vision + llm).tolist()}
    recorded = episode(1, 0, True, latency_ms=(latency + 50).tolist(), policy_ms=latency.tolist(), stage_ms=stages)
    silent = episode(1, 1, True, latency_ms=[45.0, 41.0], policy_ms=[40.0, 41.0], stage_ms={})
    broken = episode(1, 2, None, latency_ms=[999.0] * 3, policy_ms=[900.0] * 3)
    evaluation = Evaluation("run", Results(RUN, CONFIG, POLICY, {}, [recorded, silent, broken]), tmp_path)
    times = query_times(evaluation)
    assert times.whole.tolist() == [*latency.tolist(), 40.0, 41.0]
    assert list(times.stages) == ["vision", "llm", REST]
    assert times.stages[REST] == pytest.approx(latency - vision - llm)
    section = latency_section([evaluation])
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    waiting = np.array([*[50.0] * 40, 5.0, 0.0])
    for row, values in zip(texts(table), (*times.stages.values(), times.whole, waiting), strict=True):
        expected = [stats.scoreatpercentile(values, p) for p in (50, 90, 95, 99)] + [sum(values) / len(values)]
        assert [float(number) for number in row[1:]] == pytest.approx(expected, abs=0.0501)
    assert "stages of 2 queries were not recorded" in table.note
    means = next(block for block in section.blocks if block.kind == "chart").description
    assert f"vision {vision.mean():.1f}" in means and texts(table)[-1][0] == "waiting"
    recorded.policy_ms = silent.policy_ms = []  # as results say that are older
    old = query_times(evaluation)
    assert old.whole.tolist() == [*(latency + 50).tolist(), 45.0, 41.0] and not old.waiting.size
    assert old.stages[REST_WITH_WAITING] == pytest.approx(latency + 50 - vision - llm)
    (table,) = (block for block in latency_section([evaluation]).blocks if isinstance(block, Table))
    assert texts(table)[-1][0] == "including waiting" and "including waiting" in latency_section([evaluation]).note


def test_a_server_s_time_is_not_counted_twice(tmp_path: Path) -> None:
    """A query of 100 ms, 90 of them in the server: 30 for vision, 50 for the language model, 10 for something else."""
    stages = {"total": [95.0] * 2, "server": [90.0] * 2, "vision": [30.0] * 2, "llm": [50.0] * 2}
    split = episode(1, 0, True, policy_ms=[100.0] * 2, latency_ms=[100.0] * 2, stage_ms=stages)
    whole = episode(1, 1, True, policy_ms=[100.0], latency_ms=[100.0], stage_ms={"total": [95.0], "server": [90.0]})
    odd = episode(1, 2, True, policy_ms=[100.0], latency_ms=[100.0], stage_ms={"server": [20.0], "queue": [60.0]})
    for record, expected in (
        (split, {"vision": 30.0, "llm": 50.0, SERVER_REST: 10.0, REST: 10.0}),
        (whole, {"server": 90.0, REST: 10.0}),
        (odd, {"queue": 60.0, SERVER_REST: 0.0, REST: 40.0}),  # the parts lie outside of the server's own time
    ):
        evaluation = Evaluation("run", Results(RUN, CONFIG, POLICY, {}, [record]), tmp_path)
        times = query_times(evaluation)
        assert {name: values.mean() for name, values in times.stages.items()} == pytest.approx(expected)
        assert sum(values.sum() for values in times.stages.values()) == pytest.approx(times.whole.sum())
        chart = next(block for block in latency_section([evaluation]).blocks if block.kind == "chart")
        assert isinstance(chart, StackedBars) and sum(parts[0] for parts in chart.parts.values()) == pytest.approx(100)
