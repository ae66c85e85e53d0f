import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from prismatic.training.config import FinetuneConfig
from prismatic.training.runs.identity import ANNOUNCED, FREE, changes, check_changes, plain_flags, run_id

NAMES = {field.name for field in fields(FinetuneConfig)}
OTHER = {
    "bool": lambda value: not value,
    "int": lambda value: value + 1,
    "float": lambda value: (value or 0.0) / 2 + 0.25,
    "str": lambda value: "other",
    "str | None": lambda value: "other",
    "int | None": lambda value: 17,
}


def other(name: str) -> object:
    """Another value of a flag than its default."""
    field = next(field for field in fields(FinetuneConfig) if field.name == name)
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return OTHER[kind](field.default) if kind in OTHER else Path("other")


def test_the_tables_hold_flags_that_there_are():
    assert {*FREE} <= NAMES and {*ANNOUNCED} <= NAMES and not {*FREE} & {*ANNOUNCED}


@pytest.mark.parametrize("name", sorted(NAMES - {*FREE} - {"max_steps", "use_diffusion", "dataset_spec"}))
def test_what_decides_what_is_learnt_makes_another_name(name):
    first, second = FinetuneConfig(), FinetuneConfig(**{name: other(name)})
    assert run_id(first, 1) != run_id(second, 1)


@pytest.mark.parametrize("name", sorted({*FREE} - {"vla_path", "run_id_note", "batch_size", "grad_accumulation_steps"}))
def test_what_does_not_keeps_it(name):
    assert run_id(FinetuneConfig(), 1) == run_id(FinetuneConfig(**{name: other(name)}), 1)


def test_the_kind_of_head_is_told():
    heads = {
        "l1": {},
        "diffusion": {"use_l1_regression": False, "use_diffusion": True},
        "discrete": {"use_l1_regression": False},
    }
    names = [run_id(FinetuneConfig(**flags), 1) for flags in heads.values()]
    assert len({*names}) == 3 and "+diffusion--" in names[1] and "+discrete--" in names[2]


def test_as_many_samples_per_step_are_the_same_run():
    eight, four = FinetuneConfig(batch_size=4), FinetuneConfig(batch_size=4, grad_accumulation_steps=2)
    assert run_id(eight, 8) == run_id(four, 4) != run_id(eight, 4)
    assert "+b32+" in run_id(eight, 8)


def test_the_ablations_that_overwrote_each_other_have_names_of_their_own():
    with_and_without = [
        FinetuneConfig(pruner=pruner) for pruner in (None, "none", "lightvla", "lightvla:min_tokens=20")
    ]
    names = [run_id(config, 1) for config in with_and_without]
    assert len({*names}) == 4 and names[1].endswith("+none--image_aug")
    assert all("/" not in name and ":" not in name for name in names)


def test_names_stay_below_what_file_systems_take():
    name = FinetuneConfig(vla_path="runs/" + "x" * 200).run_id
    assert len(f"{name}--100000_chkpt") < 200
    assert name != FinetuneConfig(vla_path="runs/" + "x" * 201).run_id
    assert FinetuneConfig(vla_path="runs/first/checkpoints/latest").run_id.startswith("first+")


def test_a_long_automatic_name_is_cut():
    four = "libero_4_task_suites_no_noops+" * 6
    names = {run_id(FinetuneConfig(dataset_name=four, seed=seed), 1) for seed in (1, 2)}
    assert len(names) == 2 and all(len(name) < 200 for name in names)


def test_changes_are_refused_announced_or_free():
    run = Path("runs/a")
    recorded = plain_flags(FinetuneConfig())
    assert not check_changes(FinetuneConfig(save_freq=5, batch_size=1), recorded, run, announced=False)
    with pytest.raises(ValueError, match="--image_aug False: the run in runs/a had True; pass that to go on"):
        check_changes(FinetuneConfig(image_aug=False), recorded, run, announced=True)
    slower = FinetuneConfig(learning_rate=1e-5)
    with pytest.raises(
        ValueError, match=r"--learning_rate 1e-05: .* had 0.0005\. .* --resume True to go on with the new"
    ):
        check_changes(slower, recorded, run, announced=False)
    (change,) = check_changes(slower, recorded, run, announced=True)
    assert str(change) == "--learning_rate 1e-05 (the run had 0.0005)"


def test_flags_that_a_run_did_not_know_are_no_change():
    recorded = plain_flags(FinetuneConfig())
    del recorded["state_noise"]
    assert not changes(FinetuneConfig(state_noise=0.1), recorded)
    full = plain_flags(FinetuneConfig(use_lora=False, lora_rank=4))
    assert not changes(FinetuneConfig(use_lora=False, lora_rank=8), full), "no adapters, no rank"


def test_what_the_file_of_a_dataset_says_is_part_of_a_run_and_where_it_lies_is_not(tmp_path: Path):
    texts = {
        "one": "robot: libero\ngripper: open1\n",
        "moved": "gripper: open1  # a comment\nrobot: libero\n",
        "other": "robot: libero\ngripper: closed1\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    one, moved, other = (FinetuneConfig(dataset_name="kitchen", dataset_spec=tmp_path / name) for name in texts)
    assert one.run_id == moved.run_id not in (other.run_id, FinetuneConfig(dataset_name="kitchen").run_id)
    recorded = json.loads(json.dumps(plain_flags(one)))
    assert recorded["dataset_spec"] == {"robot": "libero", "gripper": "open1"}
    assert not check_changes(moved, recorded, tmp_path, announced=False)
    with pytest.raises(ValueError, match="--dataset_spec .*'closed1'.*: the run in .* had .*'open1'"):
        check_changes(other, recorded, tmp_path, announced=True)
    name = one.run_id
    (tmp_path / "one").write_text(texts["other"])
    assert one.run_id == name, "what is edited while a run goes on does not change it"


def test_the_guide_names_every_flag_that_may_change_and_is_announced():
    page = (Path(__file__).resolve().parents[3] / "docs" / "guides" / "long-runs.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `max_steps`"))
    assert {*re.findall(r"`(\w+)`", row.split("|")[1])} == {*ANNOUNCED}
