"""A stored adapter, and merging it into its base model: shard by shard, on the CPU, exactly as saving does it.

Reads what `prismatic.models.lora.save_adapter` writes, and what PEFT wrote for adapters of OpenVLA-OFT and LightVLA.
"""

import logging
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prismatic.atomic_files import sync
from prismatic.checkpoints.atomic_folder import new_folder, remove_leftovers, settle, staging_folder
from prismatic.checkpoints.files import PROCESSOR_FILES, STATISTICS_FILE, check_complete, copy_small_files, resolve
from prismatic.checkpoints.manifest import list_again
from prismatic.checkpoints.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    fingerprint,
    read_header,
    stored_tensors,
    stored_weights,
    tensor_reader,
    write_shards,
)
from prismatic.lazy_tensors import LazyTensor
from prismatic.models.lora import FINGERPRINT_FILE, FOLDER, PREFIX, merge_weight
from prismatic.stored_files import component_files, load_tensors, read_json

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
_WEIGHTS = "model*.safetensors*"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none"}
_EMPTY = ("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices")


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder holds it.

    Attributes:
        folder: where it lies.
        base: path or hub id of the model that it was trained on, as it was called then; None where it is not said.
        base_fingerprint: of that model's weights; None in adapters that were made elsewhere.
        scale: alpha / rank.
        factors: name of the adapted weight -> (A, B), as in `prismatic.models.lora.low_rank_delta`.
        copies: name of a weight -> a copy of the base model's, which PEFT puts beside adapters of an LM head.
        pruner: name -> parameter of a pruner that has some: trained beside the adapters, and no part of the base.
    """

    folder: Path
    base: str | None
    base_fingerprint: str | None
    scale: float
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    copies: Mapping[str, torch.Tensor]
    pruner: Mapping[str, torch.Tensor]


def read_adapter(checkpoint_dir: Path) -> Adapter:
    """The adapter of a checkpoint, from its folder `lora_adapter`.

    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: for a kind of adapter that cannot be merged, or a file that holds other things than adapters.
    """
    folder = checkpoint_dir / FOLDER
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    copies, pruner = {}, {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            halves.setdefault(f"{match['module']}.weight", {})[match["which"]] = tensor
        elif "lora_" in name:
            raise ValueError(f"{folder}: {name!r} is no part of a low-rank adapter of a linear layer or convolution")
        elif name.startswith("pruner."):
            pruner[name] = tensor
        else:
            copies[name.replace(".base_layer.", ".")] = tensor
    if odd := sorted(name for name, parts in halves.items() if set(parts) != {"A", "B"}):
        raise ValueError(f"{folder}: the adapter of {odd[0]!r} lacks its lora_A or lora_B; copy the folder again")
    if not halves:
        raise ValueError(f"{folder} holds no adapters")
    rank, alpha = config["r"], config["lora_alpha"]
    factors = {name: (parts["A"], parts["B"]) for name, parts in halves.items()}
    if odd := sorted(name for name, (a, b) in factors.items() if not len(a) == b.shape[1] == rank):
        a, b = (tuple(part.shape) for part in factors[odd[0]])
        raise ValueError(f"{folder}: the factors of {odd[0]!r} have shapes {a} and {b}; {CONFIG_FILE} says rank {rank}")
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    base = config.get("base_model_name_or_path") or None
    return Adapter(folder, base, _read_fingerprint(checkpoint_dir), scale, factors, copies, pruner)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises FileNotFoundError and ValueError as `read_adapter` does."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there; give the checkpoint folder that fine-tuning wrote, the one that holds {FOLDER}/"
        )
    config = read_json(file)
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file}: peft_type {config['peft_type']!r} cannot be merged; only LORA can")
    odd = [key for key, plain in _PLAIN.items() if config.get(key, plain) != plain]
    odd += [key for key in _EMPTY if config.get(key)]
    for name in ("r", "lora_alpha"):
        if not isinstance(value := config.get(name), int | float) or value <= 0:
            raise ValueError(f"{file}: {name} = {value!r}, expected a positive number; copy it again")
    if odd:
        raise ValueError(f"{file}: {odd[0]} = {config[odd[0]]!r} is not supported; merge it with PEFT itself")
    return config


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    if (file := folder / "adapter_model.safetensors").is_file():
        read_header(file)  # says what is wrong with it
        return load_file(file)
    if (file := folder / "adapter_model.bin").is_file():
        return load_tensors(file)
    raise FileNotFoundError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin; copy it again")


def _read_fingerprint(checkpoint_dir: Path) -> str | None:
    """Of the base: from beside the adapter, else from the checkpoint's `config.json`; None where neither says it."""
    for file in (checkpoint_dir / FOLDER / FINGERPRINT_FILE, checkpoint_dir / "config.json"):
        if file.is_file() and (found := read_json(file).get("base_fingerprint")):
            return str(found)
    return None


def merge_adapter(checkpoint_dir: Path, base: str | Path | None = None, output_dir: Path | None = None) -> Path:
    """Write the weights that a checkpoint's adapter and its base model make together.

    Every adapted weight is added up in float32 and rounded once to the base's stored dtype; all others are the base's,
    bit for bit. The result is split into files as the base is, and one tensor is in memory at a time.

    Args:
        checkpoint_dir: what fine-tuning with `merge_lora_during_training` False wrote.
        base: folder or hub id of the base model; None: what the adapter says.
        output_dir: a new folder for a checkpoint without adapter and training state; None: `checkpoint_dir` itself gets
            the weights, and can then be evaluated as well as resumed. Killed in between, it is what it was.

    Returns:
        The folder with the weights.

    Raises:
        FileNotFoundError: naming what is not there.
        FileExistsError: for an `output_dir` that is not empty.
        ValueError: for an adapter that belongs to another base model, or cannot be merged.
        FloatingPointError: naming a sum that is not finite.
        OSError: where the disk is full or the folder cannot be written to.
    """
    if not checkpoint_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {checkpoint_dir}; give the one that fine-tuning wrote")
    adapter = read_adapter(checkpoint_dir)
    base_dir = _base_dir(adapter, checkpoint_dir, base)
    files = check_complete(base_dir)
    if output_dir is None:
        # Beside the parts that are there; a merge that was killed has left the like.
        remove_leftovers(checkpoint_dir)
        place: AbstractContextManager[Path] = staging_folder(checkpoint_dir, "merging")
    else:
        place = new_folder(output_dir)
    with place as staging:
        stored = stored_tensors(files)
        _check_shapes(adapter, base_dir, stored)
        _check_base(adapter, base_dir, files)
        _copy_beside(checkpoint_dir, base_dir, staging, output_dir is not None)
        _write_merged(adapter, files, staging)
        if output_dir is None:
            settle(staging)
            _move_in(staging, checkpoint_dir)
    return output_dir or checkpoint_dir


def _write_merged(adapter: Adapter, files: list[Path], staging: Path) -> None:
    """The sum of `adapter` and the weights in `files`, in files of the same names."""
    with stored_weights(files) as weights:
        shards = {file.name: list(read_header(file)) for file in files}
        dtype = next(iter(weights.values())).dtype
        for name, tensor in adapter.pruner.items():
            if name not in weights:
                shards[files[-1].name].append(name)
            weights[name] = LazyTensor.of(tensor).to(dtype)
        for name, factors in adapter.factors.items():
            weights[name] = _merged(weights[name], *factors, adapter.scale)
        write_shards(staging, shards, weights, "merging")


def _merged(weight: LazyTensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> LazyTensor:
    return LazyTensor(weight.shape, weight.dtype, lambda: merge_weight(weight.make(), a, b, scale))


def _move_in(staging: Path, checkpoint_dir: Path) -> None:
    """Move finished weights into a checkpoint, so that at every moment it has all of them or counts as having none.

    Weights count by their index or, where there is only one file, by that. So it goes first and comes last. The
    manifest lists weights while they count, and no file that is not there.
    """
    heads = (INDEX_FILE, SINGLE_FILE)
    old = sorted(checkpoint_dir.glob(_WEIGHTS), key=lambda file: file.name not in heads)
    if old:
        list_again(checkpoint_dir, {file.name for file in old}, {})
    for file in old:
        file.unlink()
    new = sorted(staging.iterdir(), key=lambda file: (file.name == SINGLE_FILE, file.name == INDEX_FILE))
    sizes = {file.name: file.stat().st_size for file in new}
    for file in new:
        sync(checkpoint_dir)  # what was renamed so far stays so, whatever happens to the machine
        os.replace(file, checkpoint_dir / file.name)
    sync(checkpoint_dir)
    list_again(checkpoint_dir, set(), sizes)


def _base_dir(adapter: Adapter, checkpoint_dir: Path, base: str | Path | None) -> Path:
    given = base or adapter.base
    if given is None:
        raise ValueError(f"{adapter.folder / CONFIG_FILE} does not say which model it belongs to; pass base_checkpoint")
    base_dir = resolve(given)
    if base_dir.resolve() == checkpoint_dir.resolve():
        raise ValueError(
            f"base_checkpoint {given} is the folder of the adapter itself, whose weights may have it merged already; "
            "give the model that the adapter was trained on"
        )
    return base_dir


def _check_shapes(adapter: Adapter, base_dir: Path, stored: Mapping[str, StoredTensor]) -> None:
    for name, (a, b) in adapter.factors.items():
        if name not in stored:
            raise ValueError(f"{adapter.folder} adapts {name!r}, which {base_dir} does not have; it has another base")
        if stored[name].shape != (expected := (len(b), *a.shape[1:])):
            raise ValueError(
                f"{adapter.folder} adapts {name!r} with shape {expected}, but {base_dir} has it with shape "
                f"{stored[name].shape}; it has another base"
            )


def _check_base(adapter: Adapter, base_dir: Path, files: list[Path]) -> None:
    """Raises ValueError where the adapter was trained on other weights than these."""
    if adapter.base_fingerprint is None:
        logger.warning(
            "%s records no fingerprint of its base model (adapters made elsewhere do not): whether that is %s cannot "
            "be checked",
            adapter.folder,
            base_dir,
        )
    elif (found := fingerprint(files)) != adapter.base_fingerprint:
        raise ValueError(
            f"{adapter.folder} was trained on weights {adapter.base_fingerprint}, but {base_dir} holds {found}: pass "
            f"the base model of the training run{f' ({adapter.base})' if adapter.base else ''} as base_checkpoint"
        )
    with tensor_reader(files) as read:
        stored = stored_tensors(files)
        for name, copy in adapter.copies.items():
            if name not in stored or not torch.equal(read(name).float(), copy.float()):
                raise ValueError(
                    f"{adapter.folder} holds {name!r} beside its adapters, and it is not the one of {base_dir}: pass "
                    "the base model that the adapter was trained on as base_checkpoint"
                )


def _copy_beside(checkpoint_dir: Path, base_dir: Path, staging: Path, everything: bool) -> None:
    """What must stand beside the weights: `everything` for a new folder, else what the checkpoint lacks."""
    parts = [path.name for path in component_files(checkpoint_dir)] if everything else []
    names = ("config.json", STATISTICS_FILE, *PROCESSOR_FILES, *parts)
    own = [name for name in names if (checkpoint_dir / name).is_file()]
    if everything:
        copy_small_files(checkpoint_dir, staging, own)
    copy_small_files(base_dir, staging, [name for name in names if name not in (*own, STATISTICS_FILE)])
