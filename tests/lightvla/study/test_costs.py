"""What arms cost, against counting one by one, and from what a training and an evaluation leave behind."""

from pathlib import Path

import numpy as np
import pytest
from study_files import BENCHMARKED, keep, keep_benchmark, table, write_study

from lightvla.study.benchmarks import SceneBenchmark
from lightvla.study.measures import peak_memory
from lightvla.study.records import load_all
from lightvla.study.telling.costs import costs
from lightvla.study.telling.report import write_reports


def test_costs_are_what_counting_gives(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    baseline = lambda seed, task, state, round_: (state + round_) % 3 > 0  # noqa: E731
    arm = lambda seed, task, state, round_: (state + seed) % 4 > 0  # noqa: E731
    keep(places, "none", baseline, curve=True)
    study = keep(places, "lightvla", arm, tokens=17.0, curve=True)
    results, _ = load_all(study, places)
    none, pruned = ([result for result in results if result.arm == name] for name in ("none", "lightvla"))
    # The same rollout takes as long in both: only a slower arm differs.
    for result in pruned:
        result.rollouts = [
            type(rollout)(**{**vars(rollout), "steps": rollout.steps + (8 if rollout.task == 1 else 2)})
            for rollout in result.rollouts
        ]
    found = costs("lightvla", pruned, none)
    assert found.flops == pytest.approx(17e6)
    assert (found.training_s, found.memory_gb) == (60 * 9, 1.5)
    trials = [(s, t, 30 + i % 5, i // 5, i) for s in (7, 11) for t in (1, 4) for i in range(10)]
    assert found.jerk == pytest.approx(np.mean([0.5 * i + s for s, t, state, r, i in trials if arm(s, t, state, r)]))
    assert found.steps is not None
    mean, interval, count = found.steps
    assert count == sum(arm(s, t, state, r) and baseline(s, t, state, r) for s, t, state, r, _ in trials)
    assert mean == pytest.approx(5) and interval == pytest.approx((5, 5))
    alone = costs("none", none, [])
    assert alone.steps is None and alone.flops == pytest.approx(98e6)


def test_the_report_tells_costs_beside_the_baseline(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    keep(places, "none", lambda *_: True, curve=True)
    study = keep(places, "grid", lambda *_: True, tokens=49.0)
    write_reports(study, places)
    rows = table((tmp_path / "report.md").read_text(), "What it costs and how it moves")
    assert rows["none"] == ["98 MFLOP (100 %)", "–", "11.2", "9.0 min", "1.50 GB"]
    assert rows["grid"][0] == "49 MFLOP (50 %)" and rows["grid"][3:] == ["–", "–"]
    assert rows["grid"][1].startswith("+0.0") and "to" not in rows["grid"][1]


def test_memory_is_the_most_that_was_held(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "host_peak_gb": 1.25}\n{"step": 2, "host_peak_gb": 1.51234}\n{"step": 3}\n{"st')
    assert peak_memory(path) == {"host_peak_gb": 1.512}


def test_the_benchmark_is_kept_and_told(tmp_path: Path) -> None:
    places = write_study(tmp_path)
    study = keep(places, "none", lambda *_: True)
    path = keep_benchmark(places, study)
    assert SceneBenchmark.load(path).rows == BENCHMARKED
    write_reports(study, places)
    found = table((tmp_path / "report.md").read_text(), "A query, by the benchmark")
    assert found["none"] == ["98", "98.0 MFLOP", "12.3 ms", "1.00"]
    assert found["grid:tokens=17"] == ["17", "21.5 MFLOP", "6.2 ms", "2.00 (1.90 to 2.10)"]
    path.write_text(path.read_text().replace("times_as_fast", "faster"))
    with pytest.raises(ValueError, match="is no benchmark of a study"):
        SceneBenchmark.load(path)
