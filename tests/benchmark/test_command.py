"""Flags, what is said against them, ratios, and the whole command."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lightvla.commands.benchmark import columns_to_leave_out, command
from prismatic.benchmark.config import Arm, BenchmarkConfig, Setting, arms_of, check_words, pruner_names
from prismatic.benchmark.measure import check, own_dtype, runs
from prismatic.benchmark.subject import SENTENCE, made_up_observations
from prismatic.benchmark.summary import ratio_of
from prismatic.benchmark.table import ARM_COLUMNS
from prismatic.models.flops import count_flops
from prismatic.models.precision import choose_dtype
from prismatic.policy import Policy
from prismatic.report.data import Table

ROOT = Path(__file__).resolve().parents[2]


def test_options_of_a_pruner_stay_with_it():
    assert pruner_names("none, lightvla:multiplicity=set,min_tokens=4,random:seed=3,none") == [
        "none",
        "lightvla:multiplicity=set,min_tokens=4",
        "random:seed=3",
    ]


def test_arms_of_one_dtype_and_number_of_threads_stand_together():
    config = BenchmarkConfig(engines="reference,eager", pruners="none,lightvla", dtypes="float32", threads="1,2")
    arms = arms_of(config)
    assert arms[:3] == [
        Arm(Setting("reference", "float32", 1), "none", 0),
        Arm(Setting("eager", "float32", 1), "none", 0),
        Arm(Setting("reference", "float32", 1), "lightvla", 1),
    ]
    assert len(arms) == 8 and [arm.setting.threads for arm in arms] == [1] * 4 + [2] * 4


def test_the_reference_is_measured_with_pruners_that_the_research_code_could_have():
    config = BenchmarkConfig(engines="reference,eager", pruners="none,grid:tokens=9,fastv:tokens=9", dtypes="float32")
    assert [(arm.setting.engine, arm.pruner) for arm in arms_of(config) if not runs(arm)] == [
        ("reference", "fastv:tokens=9")
    ]


TINY = {"preset": "tiny", "random_weights": True}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "needs --checkpoint, or --preset with --random_weights True; neither is given"),
        ({"preset": "huge", "random_weights": True}, "'huge' is unknown; known: tiny, small, 7b"),
        ({"preset": "tiny"}, "a preset has sizes and no weights"),
        ({**TINY, "engines": "eager,warp"}, "--engines warp: unknown; known: reference, "),
        ({**TINY, "pruners": "none,magic"}, "unknown pruner 'magic'; known: "),
        ({**TINY, "dtypes": "float8"}, "--dtypes float8: unknown; known: float32, bfloat16, float16"),
        ({**TINY, "threads": "0"}, "--threads 0: expected whole numbers from 1"),
        ({**TINY, "repeats": 4}, "--repeats 4: expected at least 5"),
        ({**TINY, "tokens": 513}, "--tokens 513: the policy has 512 visual tokens"),
        ({**TINY, "pruners": "none,grid:tokens=513"}, "pruner grid:tokens=513: tokens=513 is more than the 512 visual"),
        ({**TINY, "pruners": "static_reuse:tokens=999"}, "tokens=999 is more than the 512 visual tokens there are"),
        ({**TINY, "pruners": "fastv:layer=7"}, "has layers 0 to 1; choose layer 1 to 1"),
        ({**TINY, "pruners": "grids:tokens=4"}, "pruner grids:tokens=4 needs trained parameters, but lightvla"),
        ({**TINY, "device": "meta"}, "device 'meta' holds no values"),
        ({**TINY, "tokens": 77, "pruners": "none"}, "--tokens 77 is how many lightvla keeps, but --pruners names none"),
        ({"checkpoint": str(ROOT / "docs")}, "config.json"),
        ({**TINY, "device": "abacus"}, "device 'abacus' is unknown"),
    ],
)
def test_bad_input_is_one_sentence(flags, said, capsys):
    assert command(BenchmarkConfig(**flags)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error


def test_tokens_of_a_checkpoint_are_looked_up_before_it_is_loaded(small_policy_directory, original_directory):
    with pytest.raises(ValueError, match=r"--tokens 1000: the policy has 32 visual tokens"):
        check(BenchmarkConfig(checkpoint=str(small_policy_directory), tokens=1000))
    with pytest.raises(ValueError, match=r"pruner divprune:tokens=33: tokens=33 is more than the 32 visual tokens"):
        check(BenchmarkConfig(checkpoint=str(small_policy_directory), pruners="none,divprune:tokens=33"))
    with pytest.raises(ValueError, match="over all visual tokens, but the pruner is 'grid'; set pruner to none"):
        check(BenchmarkConfig(checkpoint=str(original_directory), pruners="none,grid:tokens=4"))
    check_words(BenchmarkConfig(checkpoint=str(small_policy_directory), tokens=7), ("reference", "eager", "compiled"))


@pytest.mark.parametrize(("width", "left_out"), [(200, 0), (120, 8), (60, 10)])
def test_a_narrow_window_goes_without_what_says_least(width, left_out):
    columns = (*ARM_COLUMNS, "p50 ms", "p95 ms", "x reference", "x reference none", "GFLOP", "weights MB", "memory MB",
               "aten calls", "of floor", "cold start s", "images ms", "off by")  # fmt: skip
    row = ["reference", "static_reuse:tokens=14", "16 to 33 anew", "bfloat16", "all", "27.3", "46.8"]
    row += ["0.64 (0.56–0.86)"] * 2 + ["0.5376", "10", "51", "522", "11 %", "3.3", "4.8", "0.02"]
    data = Table("", columns, [row])
    found = columns_to_leave_out(data, Console(force_terminal=True, width=width))
    assert len(found) == left_out
    assert not set(found) & {"engine", "pruner", "tokens", "p50 ms", "x reference", "x reference none", "GFLOP"}
    assert columns_to_leave_out(data, Console(width=width, file=io.StringIO())) == []


def test_all_processes_compute_in_one_dtype(small_policy_directory):
    config = BenchmarkConfig(checkpoint=str(small_policy_directory), device="cpu")
    assert own_dtype(config) == str(choose_dtype(None, "cpu").dtype).removeprefix("torch.")


def test_a_ratio_of_medians_lies_in_its_interval_and_rounds_are_drawn_together():
    rng = np.random.default_rng(0)
    busy = rng.lognormal(0, 1, 200)  # what else the machine did in each round
    ratio = ratio_of(list(2 * busy), list(busy))
    assert ratio.value == ratio.low == ratio.high == 2
    apart = ratio_of(list(2 * rng.lognormal(0, 0.1, 200)), list(rng.lognormal(0, 0.1, 200)))
    assert apart.low < 2 < apart.high and apart.high - apart.low < 0.2


@pytest.mark.slow
def test_reused_tokens_are_counted_of_a_second_observation_and_said_to_be_none_that_were_dropped(
    small_policy_directory, tmp_path
):
    config = BenchmarkConfig(
        checkpoint=str(small_policy_directory), engines="eager", pruners="static_reuse:tokens=2", dtypes="float32",
        threads="1", repeats=5, warm_up=1, cold_starts=0, device="cpu", output_dir=tmp_path,
    )  # fmt: skip
    assert command(config) == 0
    [arm] = json.loads((tmp_path / "benchmark.json").read_text())["arms"]
    assert arm["summary"]["counter_agrees"]
    # The second of a session's observations, asked of a policy that knows no benchmark.
    policy = Policy.from_pretrained(small_policy_directory, dtype="float32", engine="eager", pruner=config.pruners)
    session = policy.new_session()
    for look in made_up_observations(policy, 2, config.camera_size):
        kept = policy.act_batch([look], [SENTENCE], [session]).selection.kept()[0].unflatten(0, (2, -1)).sum(1)
    parts = policy.model, policy.action_head, policy.proprio_projector
    prompt = len(policy.transform.input_ids(SENTENCE))
    assert arm["summary"]["flops"] == count_flops(*parts, kept.tolist(), prompt).total
    page = (tmp_path / "benchmark.md").read_text()
    assert " anew |" in page and "picked" not in page and "GFLOP is of the second" in page


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["checkpoint", "preset"])
def test_the_whole_command(policy, small_policy_directory, tmp_path):
    words = ["--checkpoint", str(small_policy_directory)]
    if policy == "preset":
        words = ["--preset", "tiny", "--random_weights", "True", "--tokens", "77"]
    words += ["--repeats", "5", "--threads", "1", "--dtypes", "float32", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(arm["arm"]["setting"]["engine"], arm["arm"]["pruner"]) for arm in found["arms"]] == [
        (engine, pruner) for pruner in ("none", "lightvla") for engine in ("reference", "eager", "compiled")
    ]
    for arm in found["arms"]:
        summary = arm["summary"]
        assert summary["counter_agrees"] and summary["off"] < 1e-5 and len(arm["calls"]) == 5
        assert 0 < summary["share_of_floor"] < 1.5 and summary["memory"] > 0
        assert summary["cold"]["total"] > summary["cold"]["imports"] > 0
        if policy == "preset":
            assert summary["kept"] == ([512, 512] if arm["arm"]["pruner"] == "none" else [77, 77])
    assert found["arms"][0]["summary"]["flops"] > found["arms"][1]["summary"]["flops"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    page = (tmp_path / "benchmark.md").read_text()
    assert page.count("| reference | lightvla |") == 1 and "## Cold start" in page
