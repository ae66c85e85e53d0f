"""Flags, what is said against them, ratios, and the whole command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightvla.commands.benchmark import command
from prismatic.benchmark.config import Arm, BenchmarkConfig, Setting, arms_of, check_words, pruner_names
from prismatic.benchmark.measure import check, runs
from prismatic.benchmark.summary import ratio_of

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
        ({**TINY, "tokens": 77, "pruners": "none"}, "--tokens 77 is how many lightvla keeps, but --pruners names none"),
        ({"checkpoint": str(ROOT / "docs")}, "config.json"),
        ({**TINY, "device": "abacus"}, "device 'abacus' is unknown"),
    ],
)
def test_bad_input_is_one_sentence(flags, said, capsys):
    assert command(BenchmarkConfig(**flags)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error


def test_tokens_of_a_checkpoint_are_looked_up_before_it_is_loaded(small_policy_directory):
    with pytest.raises(ValueError, match=r"--tokens 1000: the policy has 32 visual tokens"):
        check(BenchmarkConfig(checkpoint=str(small_policy_directory), tokens=1000))
    check_words(BenchmarkConfig(checkpoint=str(small_policy_directory), tokens=7), ("reference", "eager", "compiled"))


def test_a_ratio_of_medians_lies_in_its_interval_and_rounds_are_drawn_together():
    rng = np.random.default_rng(0)
    busy = rng.lognormal(0, 1, 200)  # what else the machine did in each round
    ratio = ratio_of(list(2 * busy), list(busy))
    assert ratio.value == ratio.low == ratio.high == 2
    apart = ratio_of(list(2 * rng.lognormal(0, 0.1, 200)), list(rng.lognormal(0, 0.1, 200)))
    assert apart.low < 2 < apart.high and apart.high - apart.low < 0.2


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
