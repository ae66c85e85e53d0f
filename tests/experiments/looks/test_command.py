"""The command over a real untrained policy and the real simulator, in short rollouts."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.robot.libero.evaluation.evaluate import evaluate
from experiments.robot.libero.evaluation.plan import make_plan
from experiments.robot.libero.looks.classes import CLASSES, TARGET
from experiments.robot.libero.looks.command import explore, main, prepared
from experiments.robot.libero.looks.config import LooksConfig
from experiments.robot.libero.looks.phases import Carried
from experiments.robot.libero.looks.report import Looks, report_data
from experiments.robot.libero.looks.seen import read_all
from experiments.robot.libero.looks.shares import lies_on
from experiments.robot.libero.policies.choice import make_agent
from experiments.robot.libero.results.results import Results
from experiments.robot.libero.settings.flags import EvaluationConfig

STEPS = 16
QUIET = Console(quiet=True)
SAME = {
    "task_suite_name": "libero_goal",
    "task_ids": "8",
    "initial_states": "30,31",
    "env_img_res": 128,
    "renderer": "fast",
    "num_envs": 1,
}


@pytest.fixture(scope="module")
def config(untrained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LooksConfig:
    """Of a command that has been run: two rollouts of two policy queries, in four conditions."""
    where = {"output_dir": tmp_path_factory.mktemp("looks"), "blank": "target,random,hidden"}
    config = LooksConfig(str(untrained_checkpoint), engine="eager", dtype="float32", **where, **SAME)  # type: ignore[arg-type]
    plans, agent = prepared(config, QUIET)
    plans = {name: dataclasses.replace(plan, max_steps=STEPS) for name, plan in plans.items()}
    assert explore(config, plans, agent, ["lightvla", "looks"], QUIET) == 0
    return config


def results(config: LooksConfig, name: str) -> Results:
    return Results.load(config.output_dir / "rollouts" / name)


@pytest.mark.slow
def test_looking_changes_no_action(config: LooksConfig, tmp_path: Path) -> None:
    """Neither against an evaluation nor from simulators in processes of their own."""
    flags = {name: getattr(config, name) for name in ("pretrained_checkpoint", "engine", "dtype")}
    plan = make_plan(EvaluationConfig(output_dir=str(tmp_path), **flags, **SAME))  # type: ignore[arg-type]
    agent = make_agent(plan.config)
    plain = evaluate(dataclasses.replace(plan, max_steps=STEPS), agent, ["eval"]).episodes
    looked = results(config, "unblanked").episodes
    assert [each.actions_sha256 for each in looked] == [each.actions_sha256 for each in plain]
    assert [each.tokens_kept for each in looked] == [each.tokens_kept for each in plain]
    assert [each.success for each in looked] == [each.success for each in plain]

    beside = dataclasses.replace(config, num_envs=2, blank="none", output_dir=tmp_path / "beside")
    plans, agent = prepared(beside, QUIET)
    plans = {name: dataclasses.replace(plan, max_steps=STEPS) for name, plan in plans.items()}
    assert explore(beside, plans, agent, ["lightvla", "looks"], QUIET) == 0
    found = Looks.load(tmp_path / "beside" / "looks.json").rollouts
    assert found == Looks.load(config.output_dir / "looks.json").unblanked


def test_counts_are_those_of_the_stored_patches(config: LooksConfig) -> None:
    looks = Looks.load(config.output_dir / "looks.json")
    found = read_all(config.output_dir / "rollouts" / "unblanked", results(config, "unblanked").episodes, False)
    assert len(looks.unblanked) == len(found) == 2
    for rollout, (record, seen) in zip(looks.unblanked, found, strict=True):
        assert rollout.state == record.initial_state and rollout.kept == sum(record.tokens_kept)
        assert rollout.carried == [Carried(held=False, at_end=False, apart=None)]  # in 16 steps
        on, chance = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
        for kept, pixels in zip(seen.kept, seen.pixels, strict=True):
            for camera in range(2):  # token by token
                own = range(camera * len(kept) // 2, (camera + 1) * len(kept) // 2)
                shares = {token: pixels[token] / pixels[token].sum() for token in own}
                on += sum((shares[token] for token in own if kept[token]), np.zeros(len(CLASSES)))
                chance += sum(kept[list(own)]) * sum(shares.values()) / len(own)
        counts = rollout.counts()
        assert counts.queries == 2 * 2 and counts.kept == rollout.kept  # each query is counted for each camera
        np.testing.assert_allclose(list(counts.on.values()), on, atol=1e-5)
        np.testing.assert_allclose(list(counts.chance.values()), chance, atol=1e-5)
        for sums in (counts.on, counts.chance, counts.majority):
            assert abs(sum(sums.values()) - counts.kept) < 1e-4


def test_blanked_is_what_was_asked_and_the_count_is_told(config: LooksConfig) -> None:
    looks = Looks.load(config.output_dir / "looks.json")
    for record, seen in read_all(config.output_dir / "rollouts" / "target", results(config, "target").episodes, False):
        expected = seen.kept & np.stack([lies_on(pixels, TARGET) for pixels in seen.pixels])
        np.testing.assert_array_equal(seen.blanked, expected)
        (told,) = [r.blanked for r in looks.rollouts if (r.condition, r.state) == ("target", record.initial_state)]
        assert told == expected.sum() > 0
    before = results(config, "unblanked").episodes
    assert [e.actions_sha256 for e in results(config, "target").episodes] != [e.actions_sha256 for e in before]
    for _, seen in read_all(config.output_dir / "rollouts" / "random", results(config, "random").episodes, False):
        on_target = np.stack([lies_on(pixels, TARGET) for pixels in seen.pixels])
        assert not (seen.blanked & on_target).any() and not (seen.blanked & ~seen.kept).any()
        np.testing.assert_array_equal(seen.blanked.sum(axis=1), (seen.kept & on_target).sum(axis=1))


def test_a_hidden_target_blanks_nothing_and_changes_what_is_seen(config: LooksConfig) -> None:
    before, hidden = results(config, "unblanked").episodes, results(config, "hidden").episodes
    assert [e.actions_sha256 for e in hidden] != [e.actions_sha256 for e in before]
    for _, seen in read_all(config.output_dir / "rollouts" / "hidden", hidden, False):
        assert not seen.blanked.any() and seen.pixels[..., TARGET].any()  # the truth still has it


def test_the_report_holds_the_tables_and_says_how_it_was_made(config: LooksConfig) -> None:
    folder = config.output_dir
    text = (folder / "looks.md").read_text()
    for words in (
        "times chance",
        "Phase by phase",
        "Success with blanked tokens",
        "full_image",
        "wrist_image",
        "sha256:",
    ):
        assert words in text
    made = json.loads((folder / "looks.json").read_text())["made"]
    assert made["command"] == ["lightvla", "looks"] and made["weights_fingerprint"].startswith("sha256:")
    assert "<table" in (folder / "looks.html").read_text()
    assert (folder / "libero_goal_task8.png").stat().st_size > 10_000
    ran = results(config, "target").run
    assert made["conditions"]["target"] == {"started": ran["started"], "git_commit": ran["git_commit"]}
    assert (folder / "libero_goal_task8.mp4").stat().st_size > 1_000 and "libero_goal_task8.png" in text
    titles = [section.title for section in report_data(Looks.load(folder / "looks.json"), folder).filled]
    assert titles[0] == "In pictures" and {"How far it came", "Does it need them there"} <= set(titles)
    assert "akita_black_bowl_1 to plate_1 | 0 of 2 | 2 | 0" in text


def test_a_note_tells_only_of_what_was_asked(config: LooksConfig) -> None:
    looks = Looks.load(config.output_dir / "looks.json")
    asked = [each for each in looks.rollouts if each.condition in ("unblanked", "hidden")]
    said = {
        name: next(section.note for section in report_data(each, config.output_dir).filled if "need" in section.title)
        for name, each in (("all", looks), ("hidden", Looks(looks.made, asked)))
    }
    assert "mean token" in said["all"] and "mean token" not in said["hidden"]
    assert "left out of the pictures" in said["hidden"]


def test_the_same_command_goes_on_with_what_is_there(config: LooksConfig) -> None:
    plans, agent = prepared(config, QUIET)
    plans = {name: dataclasses.replace(plan, max_steps=STEPS) for name, plan in plans.items()}
    written = (config.output_dir / "rollouts" / "target" / "looks").iterdir()
    before = {path: path.stat().st_mtime_ns for path in written}
    assert explore(config, plans, agent, ["lightvla", "looks"], QUIET) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_was_asked_before_stays_in_the_report(config: LooksConfig, tmp_path: Path) -> None:
    """Else p would be corrected for the last question alone."""
    folder = Path(shutil.copytree(config.output_dir, tmp_path / "copy"))
    plans, _ = prepared(dataclasses.replace(config, output_dir=folder, blank="hidden"), QUIET)
    assert list(plans) == ["unblanked", "target", "random", "hidden"]
    shutil.rmtree(folder / "rollouts" / "target")
    plans, _ = prepared(dataclasses.replace(config, output_dir=folder, blank="none"), QUIET)
    assert list(plans) == ["unblanked", "random", "hidden"]


def test_a_damaged_file_is_found_before_any_rollout(config: LooksConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(config.output_dir, tmp_path / "copy"))
    damaged = sorted((folder / "rollouts" / "unblanked" / "looks").iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    more = dataclasses.replace(config, output_dir=folder, blank="goal")
    with pytest.raises(ValueError, match=f"{damaged.name} cannot be read .*; remove .*unblanked and run the same"):
        prepared(more, QUIET)
    assert not (folder / "rollouts" / "goal").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"blank": "target,table"}, "--blank 'target,table' has 'table'; expected some of target, goal"),
        ({"blank": "goal,goal"}, "names one twice"),
        ({"task_ids": "11"}, "has no task 11"),
        ({"env_img_res": 13 + 3, "pruner": "fastv:tokens=8,layer=1", "blank": "target"}, "drops tokens inside"),
        ({"pretrained_checkpoint": "nowhere/at all"}, "nowhere/at all"),
    ],
)
def test_bad_flags_are_refused_before_any_rollout(
    untrained_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: dict, message: str
) -> None:
    given = {"pretrained_checkpoint": str(untrained_checkpoint), **SAME, "output_dir": tmp_path / "out", **flags}
    assert main(LooksConfig(**given), ["lightvla", "looks"], QUIET) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "looks.json").exists()
