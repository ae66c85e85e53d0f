"""What is said about a checkpoint, and that every kind of damage is found."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightvla.commands.inspect_checkpoint import main
from prismatic.checkpoints.adapters import merge_adapter
from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.inspection import inspect_checkpoint
from prismatic.checkpoints.saving import save_checkpoint
from prismatic.checkpoints.weight_files import INDEX_FILE
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.lora import FOLDER, attach_lora, save_adapter
from prismatic.models.projectors import ProprioProjector

KEY = "libero_tiny_no_noops"
HEAD = "action_head--100_checkpoint.pt"


@pytest.fixture
def copy(reference_directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference_directory, tmp_path / "copy"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}


def test_a_published_checkpoint_is_described_and_left_alone(reference_directory: Path):
    before = snapshot(reference_directory)
    found = inspect_checkpoint(reference_directory)
    assert not found.problems
    assert found.kind == "OpenVLA-OFT or LightVLA (no pruner is recorded), L1 head"
    assert "BF16" in found.facts["weights"] and "2 files" in found.facts["weights"]
    values = sum(value.numel() for value in load_checkpoint(reference_directory).model.state_dict().values())
    assert found.facts["weights"].startswith(f"{values / 1e6:.2f} M values")
    assert found.facts["robot"].startswith("libero (assumed: none is recorded): actions 8 x 7, state 8, bounds_q99")
    assert found.facts["statistics"] == "libero_tiny_no_noops"
    assert found.facts["proprio_projector"].endswith("float32")
    assert found.facts["training state"].startswith("none")
    assert snapshot(reference_directory) == before


def test_checkpoints_of_ours_are_told_apart(small_base: Path, small_policy_directory: Path):
    assert inspect_checkpoint(small_base).kind.startswith("OpenVLA: discrete action tokens, or a base model")
    found = inspect_checkpoint(small_policy_directory)
    assert found.kind == "LightVLA, L1 head" and not found.problems and not found.notes
    assert "assumed" not in " ".join(found.facts.values())


def test_an_adapter_without_weights_is_told_with_its_base(reference_directory: Path, copy: Path):
    model = load_checkpoint(reference_directory).model
    config = attach_lora(model, 2)
    for file in copy.glob("model*"):
        file.unlink()
    save_adapter(model, config, copy / FOLDER, str(reference_directory))
    found = inspect_checkpoint(copy)
    assert found.kind.startswith("adapter and heads without weights; merge") and not found.problems
    assert found.facts["adapter"].startswith("rank 2, alpha 2") and "records no fingerprint" in found.notes[0]
    save_adapter(model, config, copy / FOLDER, "somewhere/that/is/not/here")
    assert any(
        "whose base somewhere/that/is/not/here is not here" in text for text in inspect_checkpoint(copy).problems
    )
    merge_adapter(copy, reference_directory)
    assert not inspect_checkpoint(copy).problems


def change_json(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def statistics(folder: Path, change: Callable[[dict], None]) -> None:
    change_json(folder, "dataset_statistics.json", lambda content: change(content[KEY]))


def add_tensor(folder: Path, name: str) -> None:
    file = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(file), name: torch.ones(3)}, file, metadata={"format": "pt"})


def longer(file: Path) -> tuple[Path, int]:
    return file, file.stat().st_size + 1


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        "weight file model-00002-of-00002.safetensors is missing",
    ),
    "a shard is cut off": (
        lambda folder: os.truncate(folder / "model-00001-of-00002.safetensors", 100_000),
        "model-00001-of-00002.safetensors is cut off: 100000 of",
    ),
    "a byte too many": (
        lambda folder: os.truncate(*longer(folder / "model-00001-of-00002.safetensors")),
        r"model-00001-of-00002.safetensors has \d+ bytes instead of",
    ),
    "only weights of an older format": (
        lambda folder: [
            *(file.unlink() for file in folder.glob("model*")),
            (folder / "pytorch_model.bin").touch(),
        ],
        "model.safetensors is missing: pytorch_model.bin is there, which is not read; convert it to safetensors",
    ),
    "an index that starts with a byte order mark": (
        lambda folder: (folder / INDEX_FILE).write_bytes(b"\xef\xbb\xbf" + (folder / INDEX_FILE).read_bytes()),
        "index.json starts with a byte order mark",
    ),
    "an index without metadata": (
        lambda folder: change_json(folder, INDEX_FILE, lambda c: c.pop("metadata")),
        'index.json has no metadata, .* add "metadata"',
    ),
    "an empty index": (
        lambda folder: change_json(folder, INDEX_FILE, lambda c: c.update(weight_map={})),
        "index.json has an empty weight_map",
    ),
    "JSON that is nested without end": (
        lambda folder: (folder / "generation_config.json").write_text("[" * 100_000),
        "generation_config.json is no JSON",
    ),
    "a number of images below one": (
        lambda folder: change_json(folder, "config.json", lambda c: c.update(num_images_in_input=-1)),
        "config.json: num_images_in_input -1 should be a number of images, at least 1",
    ),
    "an unknown kind of head": (
        lambda folder: change_json(folder, "config.json", lambda c: c.update(action_head="x")),
        "config.json: action_head 'x' is unknown; known: l1, diffusion, discrete, autoregressive",
    ),
    "a kind of head that is a number": (
        lambda folder: change_json(folder, "config.json", lambda c: c.update(action_head=3)),
        "config.json: action_head 3 is unknown; known: l1, diffusion, discrete, autoregressive",
    ),
    "a token that the vocabulary lacks": (
        lambda folder: change_json(folder, "config.json", lambda c: c.update(token_ids={"empty": 10**6})),
        "config.json: token_ids.empty 1000000 is no token of text_config.vocab_size",
    ),
    "a head of whole numbers": (
        lambda folder: torch.save({n: v.long() for n, v in torch.load(folder / HEAD).items()}, folder / HEAD),
        f"{HEAD}: .* holds int64, where weights are floating-point numbers",
    ),
    "a shard is a placeholder": (
        lambda folder: (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs..."),
        "placeholder that git-lfs left",
    ),
    "shards of two saves": (
        lambda folder: shutil.copyfile(folder / "model-00001-of-00002.safetensors", folder / "model.safetensors"),
        "model.safetensors stand beside the weights and belong to none",
    ),
    "shards are exchanged": (
        lambda folder: shutil.copyfile(
            folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
        ),
        "says that model-0000.-of-00002.safetensors holds .* but it does not",
    ),
    "another width": (
        lambda folder: change_json(folder, "config.json", lambda c: c["text_config"].update(hidden_size=64)),
        "has shape .*, config.json implies .* more",
    ),
    "more layers": (
        lambda folder: change_json(folder, "config.json", lambda c: c["text_config"].update(num_hidden_layers=5)),
        "weights lack 9 tensors that config.json implies",
    ),
    "two heads": (
        lambda folder: shutil.copyfile(folder / HEAD, folder / "action_head--200_checkpoint.pt"),
        "2 action_head files .* nothing says which counts; keep one",
    ),
    "a head of another robot": (
        lambda folder: torch.save(L1RegressionActionHead(128, 14, 25).state_dict(), folder / HEAD),
        "action_head--100_checkpoint.pt: 'model.fc1.weight' .* another robot, width or kind of head",
    ),
    "a head that is cut off": (
        lambda folder: os.truncate(folder / HEAD, 5000),
        "action_head--100_checkpoint.pt is cut off, or torch.save did not write it",
    ),
    "a projector of another robot": (
        lambda folder: torch.save(
            ProprioProjector(128, 14).state_dict(), folder / "proprio_projector--100_checkpoint.pt"
        ),
        r"proprio_projector.*: 'fc1.weight' has shape \(128, 14\).*implies \(128, 8\)",
    ),
    "no quantiles": (
        lambda folder: statistics(folder, lambda s: [s["action"].pop("q01"), s["action"].pop("q99")]),
        "action: q01, q99 missing, which bounds_q99 needs",
    ),
    "statistics of another robot": (
        lambda folder: statistics(folder, lambda s: s["proprio"]["q01"].append(0.0)),
        "proprio: q01 has 9 values, robot 'libero' has 8",
    ),
    "statistics that are no numbers": (
        lambda folder: statistics(folder, lambda s: s["action"]["max"].__setitem__(0, float("nan"))),
        "action: max holds NaN",
    ),
    "no statistics": (
        lambda folder: [
            (folder / "dataset_statistics.json").unlink(),
            change_json(folder, "config.json", lambda c: c.update(norm_stats={})),
        ],
        "no dataset statistics",
    ),
    "more images than cameras": (
        lambda folder: change_json(folder, "config.json", lambda c: c.update(num_images_in_input=3)),
        "num_images_in_input 3, but robot 'libero' has 2 cameras",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "a tensor that nothing reads": (
        lambda folder: add_tensor(folder, "language_model.model.layers.0.self_attn.q_proj.bias"),
        "weights hold 1 tensors that config.json does not imply, first 'language_model.*q_proj.bias'",
    ),
    "another language model": (
        lambda folder: change_json(folder, "config.json", lambda c: c["text_config"].update(model_type="qwen2")),
        "text_config.model_type 'qwen2' is not supported",
    ),
    "a pickled module for a head": (
        lambda folder: torch.save(torch.nn.Linear(2, 2), folder / HEAD),
        "action_head--100_checkpoint.pt holds pickled Python objects",
    ),
    "statistics without the state": (
        lambda folder: statistics(folder, lambda s: s.pop("proprio")),
        "statistics of 'libero_tiny_no_noops' have no part 'proprio'",
    ),
    "statistics upside down": (
        lambda folder: statistics(folder, lambda s: s["action"].update(q01=s["action"]["q99"], q99=s["action"]["q01"])),
        "action: q01 lies above q99",
    ),
    "statistics of no dataset": (
        lambda folder: change_json(folder, "dataset_statistics.json", lambda s: s.update(s.pop(KEY))),
        "dataset_statistics.json: the statistics do not stand below their dataset's name",
    ),
    "an index that is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json has no weight_map",
    ),
    "a processor of another backbone": (
        lambda folder: change_json(folder, "preprocessor_config.json", lambda c: c.update(means=[[0.5] * 3])),
        "three numbers for each of 2 ViTs",
    ),
    "a training state that is cut off": (
        lambda folder: [(folder / "training_state").mkdir(), (folder / "training_state" / "state.pt").write_text("PK")],
        "state.pt is cut off",
    ),
    "a recorded state that nothing projects": (
        lambda folder: [
            next(folder.glob("proprio_projector--*")).unlink(),
            change_json(folder, "config.json", lambda c: c.update(use_proprio=True)),
        ],
        "config.json records use_proprio, but there is no proprio_projector--",
    ),
    "a broken adapter": (lambda folder: (folder / FOLDER).mkdir(), "lora_adapter/ is incomplete"),
}


REFUSED_TOO = (
    "a byte too many", "only weights of an older format", "an index that starts with a byte order mark",
    "an index without metadata", "an empty index", "a head of whole numbers", "JSON that is nested without end",
    "a number of images below one", "an unknown kind of head", "a kind of head that is a number",
    "a token that the vocabulary lacks",
)  # fmt: skip
"""Loading says them in the same words, but for which file is missing."""


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(copy: Path, name: str):
    damage, message = DAMAGES[name]
    damage(copy)
    found = inspect_checkpoint(copy)
    assert any(re.search(message, problem) for problem in found.problems), found.problems
    if name in REFUSED_TOO:
        with pytest.raises(
            (ValueError, FileNotFoundError), match=message.replace("safetensors is missing:", "safetensors:")
        ):
            load_checkpoint(copy)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
ANYTHING = (b"", b"[]", b"{}", b'{"a": 1}', b"null", b"\xff\xfe", POINTER)


def test_whatever_a_file_holds_it_is_told_and_never_a_crash(reference_directory: Path, tmp_path: Path, capsys):
    """Every file of a checkpoint in turn, with contents of every kind."""
    harmless = {("generation_config.json", content) for content in ANYTHING} | {
        ("tokenizer_config.json", content) for content in ANYTHING
    }
    for file in sorted(reference_directory.iterdir()):
        for number, content in enumerate((*ANYTHING, file.read_bytes()[: file.stat().st_size // 2])):
            folder = tmp_path / f"{file.name}-{number}"
            folder.mkdir()
            for other in reference_directory.iterdir():
                (folder / other.name).symlink_to(other)
            (folder / file.name).unlink()
            (folder / file.name).write_bytes(content)
            status = main(str(folder))
            told = "".join(capsys.readouterr())
            assert status in (1, 2) or (file.name, content) in harmless, (file.name, content, told)
            assert status == 0 or file.name.partition("--")[0].partition(".")[0] in told.replace("\n", ""), told


CONFIG_VALUES = (None, 3, -1, "text", [], {}, [None], True, float("nan"))


@pytest.mark.parametrize("key", ["text_config", "pruner", "robot", "token_ids", "timm_model_ids", "image_sizes"])
def test_settings_of_any_type_are_told(copy: Path, key: str):
    original = (copy / "config.json").read_text()
    for value in CONFIG_VALUES:
        (copy / "config.json").write_text(json.dumps({**json.loads(original), key: value}))
        found = inspect_checkpoint(copy)
        assert all(isinstance(problem, str) and "\n" not in problem for problem in found.problems)
        if found.problems:
            with pytest.raises((ValueError, FileNotFoundError)):
                load_checkpoint(copy)


def test_files_that_are_not_as_written_are_told(small_policy_directory: Path, tmp_path: Path):
    folder = save_checkpoint(tmp_path / "run", load_checkpoint(small_policy_directory), 1, training_state={"step": 1})
    found = inspect_checkpoint(folder)
    assert found.facts["files"] == "as written" and not found.problems
    shutil.rmtree(folder / "training_state")
    found = inspect_checkpoint(folder)
    assert not found.problems and found.notes == [
        "training_state/state.pt is missing, which manifest.json lists; copy the checkpoint again"
    ]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "note": "by hand"}))
    assert not inspect_checkpoint(folder).problems
    head = next(folder.glob("action_head--*"))
    head.write_bytes(head.read_bytes()[:-1])
    assert f"{head.name} has" in " ".join(inspect_checkpoint(folder).problems)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither config.json nor lora_adapter"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="type 'llama'; expected 'openvla'"):
        inspect_checkpoint(tmp_path)


def test_the_command_prints_and_ends_with_a_status(copy: Path, tmp_path: Path, capsys):
    assert main(str(copy)) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    (copy / "tokenizer.json").unlink()
    assert main(str(copy)) == 1
    told = capsys.readouterr().out
    assert "wrong: tokenizer.json is missing" in told
    assert main(str(tmp_path / "nowhere")) == 2
    assert "error: checkpoint directory" in capsys.readouterr().err
