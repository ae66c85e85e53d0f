"""A raw training checkpoint becomes the published one that it was made from, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from reference_checkpoint import model_weights
from safetensors.torch import load_file

from prismatic.checkpoints.directory import load_checkpoint
from prismatic.checkpoints.files import check_complete
from scripts.extern.convert_prismatic_checkpoint import ConvertConfig, check_equal, convert, main, read_raw

STATISTICS = {"bridge_orig": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}}


def raw_parts() -> dict[str, dict[str, torch.Tensor]]:
    """The reference's tiny weights as training stores them: float32, its own names."""
    parts: dict[str, dict[str, torch.Tensor]] = {"vision_backbone": {}, "projector": {}, "llm_backbone": {}}
    layers = {"fc1": "0", "fc2": "2", "fc3": "4"}
    for name, tensor in model_weights().items():
        words = name.split(".")
        if words[0] == "projector":
            part, own = "projector", f"projector.{layers[words[1]]}.{words[2]}"
        elif words[0] == "language_model":
            part, own = "llm_backbone", ".".join(["llm", *words[1:]])
        else:
            vit = {"featurizer": "dino_featurizer", "fused_featurizer": "siglip_featurizer"}[words[1]]
            part, own = "vision_backbone", ".".join([vit, *words[2:]]).replace("scale_factor", "gamma")
        parts[part][own] = tensor.float()
    return parts


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run's folder."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save({"model": raw_parts()}, tmp_path / "run" / "checkpoints" / "latest-checkpoint.pt")
    (tmp_path / "run" / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    return tmp_path / "run"


def config_for(run: Path, like: Path, **overrides) -> ConvertConfig:
    file = run / "checkpoints" / "latest-checkpoint.pt"
    return ConvertConfig(**{"checkpoint": file, "output_dir": run / "converted", "like": str(like), **overrides})


def test_the_published_weights_come_out(run: Path, reference_directory: Path):
    folder = convert(config_for(run, reference_directory))
    written = {name: value for file in check_complete(folder) for name, value in load_file(file).items()}
    published = model_weights()
    assert set(written) == set(published)
    assert all(torch.equal(written[name], published[name]) for name in published)
    assert all(value.dtype == torch.bfloat16 for value in written.values())
    checkpoint = load_checkpoint(folder)
    assert checkpoint.dataset_statistics == STATISTICS and checkpoint.action_head is None
    assert (folder / "tokenizer.json").read_bytes() == (reference_directory / "tokenizer.json").read_bytes()


def test_values_are_rounded_only_where_asked(run: Path, reference_directory: Path):
    parts = raw_parts()
    parts["projector"]["projector.0.bias"] += 1e-6
    torch.save({"model": parts}, run / "checkpoints" / "latest-checkpoint.pt")
    folder = convert(config_for(run, reference_directory, dtype="float32"))
    written = load_file(folder / "model.safetensors")
    assert torch.equal(written["projector.fc1.bias"], parts["projector"]["projector.0.bias"])
    tensors = read_raw(run / "checkpoints" / "latest-checkpoint.pt")
    check_equal(folder, tensors, torch.float32)
    with pytest.raises(ValueError, match="was not written as it was read"):
        check_equal(folder, {**tensors, "projector.fc1.bias": tensors["projector.fc1.bias"] + 1}, torch.float32)


def drop_vision(parts: dict) -> None:
    parts["vision_backbone"] = {}


def rename(parts: dict) -> None:
    parts["projector"]["projector.6.weight"] = parts["projector"].pop("projector.4.weight")


def reshape(parts: dict) -> None:
    parts["projector"]["projector.4.weight"] = parts["projector"]["projector.4.weight"][:5]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_vision, "holds no vision_backbone .* frozen in training are not stored"),
        (rename, "'projector.6.weight' of part 'projector' has no place"),
        (reshape, r"'projector.fc3.weight' has shape \(5, 128\) .* same architecture as --like"),
        (lambda parts: parts.update(downsampler={"x": torch.ones(1)}), "holds a part 'downsampler'"),
    ],
)
def test_what_does_not_fit_is_named(run: Path, reference_directory: Path, damage, message):
    parts = raw_parts()
    damage(parts)
    torch.save({"model": parts}, run / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(ValueError, match=message):
        convert(config_for(run, reference_directory))
    assert not (run / "converted").exists()


def test_the_command_ends_with_a_status(run: Path, reference_directory: Path, tmp_path: Path, caplog, capsys):
    (run / "dataset_statistics.json").unlink()
    assert main(config_for(run, reference_directory)) == 0
    assert "can be fine-tuned, not run" in caplog.text
    assert main(config_for(run, reference_directory)) == 2 and "is not empty" in capsys.readouterr().err
    elsewhere = {"output_dir": tmp_path / "other"}
    assert main(config_for(run, reference_directory, checkpoint=tmp_path / "nowhere.pt", **elsewhere)) == 2
    assert main(config_for(run, reference_directory, dtype="int8", **elsewhere)) == 2
    assert "'int8'" in capsys.readouterr().err
    (run / "text.pt").write_text("no checkpoint")
    assert main(config_for(run, reference_directory, checkpoint=run / "text.pt", **elsewhere)) == 2
    assert "text.pt is cut off, or torch.save did not write it" in capsys.readouterr().err
    torch.save({"weights": {}}, run / "other.pt")
    assert main(config_for(run, reference_directory, checkpoint=run / "other.pt", **elsewhere)) == 2
    assert "other.pt is no raw training checkpoint" in capsys.readouterr().err
    shutil.rmtree(run / "converted")
