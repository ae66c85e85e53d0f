"""Convert a raw training checkpoint of OpenVLA or Prismatic (`.pt`) to the published layout.

    python scripts/extern/convert_prismatic_checkpoint.py --checkpoint RUN/checkpoints/latest-checkpoint.pt \
        --like openvla/openvla-7b --output_dir runs/openvla-converted

The raw file holds `{"model": {"vision_backbone", "projector", "llm_backbone"}}`. Configuration, tokenizer and image
processor come from `--like`, a checkpoint of the same architecture in the published layout; statistics from the run's
`dataset_statistics.json`. Afterwards every tensor is read back and compared bit for bit. Nothing in the file is
executed, and one weight file is in memory at a time. Ends with 0, or 2 when the file cannot be converted.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismatic.checkpoints.atomic_folder import new_folder
from prismatic.checkpoints.files import (
    PROCESSOR_FILES,
    STATISTICS_FILE,
    copy_small_files,
    missing_files,
    read_config,
    resolve,
    small_file_problems,
)
from prismatic.checkpoints.weight_checks import expected_tensors
from prismatic.checkpoints.weight_files import split_into_shards, tensor_reader, write_shards
from prismatic.command_line import parse_or_exit
from prismatic.command_status import UNUSABLE, print_error
from prismatic.lazy_tensors import LazyTensor
from prismatic.stored_files import foreign_code_only, load_plain, read_json

log = logging.getLogger("convert")

MAX_SHARD_SIZE = "5GB"
_PROJECTOR_LAYERS = {"0": "fc1", "2": "fc2", "4": "fc3"}  # places of the linear layers among the activations
_VISION = {
    "dino_featurizer": "vision_backbone.featurizer",
    "siglip_featurizer": "vision_backbone.fused_featurizer",
    "featurizer": "vision_backbone.featurizer",  # of backbones with a single ViT
}
_LAYER_SCALE = re.compile(r"\.(ls[12])\.gamma$")


@dataclass
class ConvertConfig:
    """What to convert."""

    checkpoint: Path  # raw training checkpoint, a .pt file
    output_dir: Path  # a new folder
    like: str = "openvla/openvla-7b"  # published checkpoint of the same architecture, for all that is not weights
    dataset_statistics: Path | None = None  # None: dataset_statistics.json of the run, above or beside the file
    dtype: str = "bfloat16"  # of the converted weights: bfloat16, float16 or float32


def published_name(part: str, name: str) -> str:
    """The published name of a tensor of `vision_backbone`, `projector` or `llm_backbone`.

    Raises ValueError for a name that the published layout has no place for.
    """
    first, _, rest = name.partition(".")
    if part == "vision_backbone" and first in _VISION:
        return _LAYER_SCALE.sub(r".\1.scale_factor", f"{_VISION[first]}.{rest}")
    if part == "llm_backbone" and first == "llm":
        return f"language_model.{rest}"
    layer, _, leaf = rest.partition(".")
    if part == "projector" and first == "projector" and layer in _PROJECTOR_LAYERS:
        return f"projector.{_PROJECTOR_LAYERS[layer]}.{leaf}"
    raise ValueError(f"tensor {name!r} of part {part!r} has no place in the published layout")


def read_raw(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a raw checkpoint under their published names, mapped into memory as they lie in the file.

    Raises ValueError for a file that holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    content = load_plain(file)
    parts = content.get("model") if isinstance(content, dict) else None
    if not isinstance(parts, dict):
        raise ValueError(f"{file} is no raw training checkpoint: it has no part 'model'")
    needed = ("vision_backbone", "projector", "llm_backbone")
    if missing := [part for part in needed if not parts.get(part)]:
        raise ValueError(
            f"{file} holds no {missing[0]} (it has {', '.join(parts)}); parts that were frozen in training are not "
            "stored, so take a checkpoint of a run that trained all three"
        )
    if odd := [part for part, tensors in parts.items() if part not in needed and tensors]:
        raise ValueError(f"{file} holds a part {odd[0]!r}, which the published layout has no place for")
    return {published_name(part, name): tensor for part in needed for name, tensor in parts[part].items()}


def convert(config: ConvertConfig) -> Path:
    """Write the converted checkpoint and compare it with the raw one; returns its folder.

    Raises:
        FileNotFoundError, ValueError: saying what does not fit and what to do.
    """
    if config.output_dir.exists() and any(config.output_dir.iterdir()):
        raise ValueError(f"{config.output_dir} is not empty; give a new folder")
    if config.dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype {config.dtype!r} is unknown; choose bfloat16, float16 or float32")
    dtype: torch.dtype = getattr(torch, config.dtype)
    tensors = read_raw(config.checkpoint)
    like = resolve(config.like)
    if missing := missing_files(like):
        raise FileNotFoundError(f"{like} lacks {missing[0]}; pass a whole checkpoint as --like")
    if problems := small_file_problems(like):
        raise ValueError(problems[0])
    _check_shapes(tensors, like)
    weights = {name: LazyTensor.of(tensor).to(dtype) for name, tensor in tensors.items()}
    with new_folder(config.output_dir) as staging:
        _write_small_files(config, like, staging)
        write_shards(staging, split_into_shards(weights), weights, "converting")
        check_equal(staging, tensors, dtype)
    return config.output_dir


def check_equal(folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError unless the folder's weights are exactly `tensors`, rounded to `dtype`."""
    files = sorted(folder.glob("model*.safetensors"))
    with tensor_reader(files) as read:
        for name, tensor in tensors.items():
            written, expected = read(name), tensor.to(dtype)
            if written.dtype != dtype or not torch.equal(_bits(written), _bits(expected)):
                raise ValueError(f"{name!r} was not written as it was read; is the disk full or faulty?")
    log.info("all %d tensors were read back and are equal bit for bit", len(tensors))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)  # NaN equals itself here


def _check_shapes(tensors: Mapping[str, torch.Tensor], like: Path) -> None:
    expected = expected_tensors(read_config(like)[1])
    for name in sorted({*expected, *tensors}):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != expected.get(name):
            raise ValueError(
                f"{name!r} has shape {found} in the raw checkpoint and {expected.get(name)} in {like}; pass a "
                "published checkpoint of the same architecture as --like"
            )


def _write_small_files(config: ConvertConfig, like: Path, staging: Path) -> None:
    statistics = _statistics(config)
    content = foreign_code_only(read_json(like / "config.json"))
    content |= {"norm_stats": statistics, "torch_dtype": config.dtype}
    (staging / "config.json").write_text(json.dumps(content, indent=2))
    (staging / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2))
    copy_small_files(like, staging, PROCESSOR_FILES)


def _statistics(config: ConvertConfig) -> dict[str, Any]:
    folders = (config.checkpoint.parent, config.checkpoint.parent.parent)
    candidates = [config.dataset_statistics] if config.dataset_statistics else [f / STATISTICS_FILE for f in folders]
    for file in candidates:
        if file.is_file():
            return read_json(file)
    if config.dataset_statistics:
        raise FileNotFoundError(f"there is no file {config.dataset_statistics}")
    log.warning("no %s near %s: the result can be fine-tuned, not run", STATISTICS_FILE, config.checkpoint)
    return {}


def main(config: ConvertConfig) -> int:
    """Returns the exit status."""
    try:
        folder = convert(config)
    except (ValueError, OSError, FloatingPointError) as error:
        print_error(error)
        return UNUSABLE
    log.info("converted: %s", folder)
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    sys.exit(main(parse_or_exit(ConvertConfig)))
