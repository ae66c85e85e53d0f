"""What a checkpoint folder holds and what is wrong with it, told without loading weights or changing the folder."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismatic.adapters import CONFIG_FILE
from prismatic.atomic_folder import PENDING
from prismatic.checkpoint import REQUIRED_FILES, read_statistics, weight_problems
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.original import as_original, why_original
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.autoregressive import AUTOREGRESSIVE
from prismatic.models.lora import FINGERPRINT_FILE, FOLDER
from prismatic.models.projectors import ProprioProjector
from prismatic.vla.robots import LIBERO, RobotSpec
from prismatic.weight_files import INDEX_FILE, SINGLE_FILE, StoredTensor, read_header

COMPONENTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_Shapes = dict[str, tuple[int, ...]]


@dataclass
class Inspection:
    """What was found.

    Attributes:
        path: the folder.
        kind: what it is, in words.
        facts: label -> what was found, in the order to show them.
        problems: what is wrong, with the remedy; empty for a checkpoint that can be used.
        notes: what is worth knowing and not wrong.
    """

    path: Path
    kind: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def inspect_checkpoint(directory: Path) -> Inspection:
    """Look at everything in a checkpoint folder but the weights' values.

    Raises:
        FileNotFoundError: if there is no folder, or nothing of a checkpoint in it.
        ValueError: if `config.json` cannot be understood.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}")
    has_config, has_adapter = (directory / "config.json").is_file(), (directory / FOLDER).is_dir()
    if not has_config and not has_adapter:
        raise FileNotFoundError(f"{directory} has neither config.json nor {FOLDER}/, so it is no checkpoint")
    found = Inspection(directory)
    if (directory / PENDING).is_dir():
        found.notes.append(f"a save was interrupted behind its last write ({PENDING}); whoever loads this finishes it")
    config_json, config = _read_config(directory) if has_config else ({}, None)
    stored = _inspect_weights(found, config)
    head = _inspect_components(found, config)
    if config is not None:
        _inspect_config(found, config_json, config)
        _inspect_statistics(found, config_json, config, has_head=head is not None)
    if has_adapter:
        _inspect_adapter(found, has_weights=bool(stored))
    _inspect_training_state(found)
    found.kind = _kind(found, config_json, bool(stored), head)
    if not has_config:
        found.notes.append("no config.json: the folder holds what OpenVLA-OFT stores beside an adapter")
    elif stored or not has_adapter:
        missing = [name for name in REQUIRED_FILES if not (directory / name).is_file()]
        found.problems += [f"{name} is missing; copy it from the base checkpoint" for name in missing]
    return found


def _read_config(directory: Path) -> tuple[dict[str, Any], OpenVLAConfig]:
    file = directory / "config.json"
    try:
        config_json = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}); copy it again") from error
    if config_json.get("model_type") != "openvla":
        raise ValueError(f"{file} is of a model of type {config_json.get('model_type')!r}; expected 'openvla'")
    config = OpenVLAConfig.from_pretrained(directory)
    if why_original(directory, config_json):
        as_original(config)
    _ = config.robot_spec, config.pruner_spec, config.special_tokens  # raise ValueError where they are malformed
    return config_json, config


def _kind(found: Inspection, config_json: Mapping[str, Any], has_weights: bool, head: str | None) -> str:
    if not has_weights and (found.path / FOLDER).is_dir():
        return "adapter and heads without weights; merge them by vla-scripts/merge_lora_weights_and_save.py"
    if head is None and config_json.get("action_head") == "discrete":
        head = "discrete action token"
    if head is None and config_json.get("action_head") == AUTOREGRESSIVE:
        return "OpenVLA: action tokens one after another, one action per policy query"
    if head is None and (why := why_original(found.path, config_json)):
        found.notes.append(f"{why}; its tokens are decoded one after another unless head 'discrete' is asked for")
        return "original OpenVLA: action tokens one after another, one action per policy query; or a base to fine-tune"
    if head is None:
        return "OpenVLA: discrete action tokens, or a base model to fine-tune"
    name = (config_json.get("pruner") or {}).get("name")
    family = "OpenVLA-OFT or LightVLA (no pruner is recorded)" if name is None else "LightVLA"
    film = ", FiLM" if list(found.path.glob("vision_backbone--*_checkpoint.pt")) else ""
    return f"{'OpenVLA-OFT' if name == 'none' else family}, {head} head{film}"


def _inspect_weights(found: Inspection, config: OpenVLAConfig | None) -> dict[str, StoredTensor]:
    """The tensors that are there; says what is missing, cut off or of another shape."""
    directory = found.path
    index_file = directory / INDEX_FILE
    weight_map: dict[str, str] = {}
    if index_file.is_file():
        try:
            weight_map = json.loads(index_file.read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            found.problems.append(f"{INDEX_FILE} cannot be read ({error!r}); copy it again")
    names = sorted(set(weight_map.values())) or [SINGLE_FILE]
    present = [name for name in names if (directory / name).is_file()]
    if not present and (directory / FOLDER).is_dir():
        return {}
    missing = [name for name in names if name not in present]
    found.problems += [f"the weight file {name} is missing; fetch it again" for name in missing]
    others = sorted(file.name for file in directory.glob("model*.safetensors") if file.name not in names)
    if others:
        found.problems.append(f"{', '.join(others)} stand beside the weights and belong to none; remove them")
    stored: dict[str, StoredTensor] = {}
    complete = not missing
    for name in present:
        try:
            stored |= read_header(directory / name)
        except ValueError as error:
            found.problems.append(str(error))
            complete = False
    if stored:
        size = sum((directory / name).stat().st_size for name in present)
        values = sum(tensor.num_values for tensor in stored.values())
        dtypes = ", ".join(sorted({tensor.dtype for tensor in stored.values()}))
        found.facts["weights"] = f"{values / 1e6:.2f} M values, {dtypes}, {_size(size)} in {_files(len(present))}"
    if complete:
        strayed = [name for name, file in weight_map.items() if name not in stored or stored[name].file.name != file]
        if strayed:
            name = strayed[0]
            found.problems.append(
                f"{INDEX_FILE} says that {weight_map[name]} holds {name!r}, but it does not; fetch both again"
            )
        if config is not None:
            found.problems += weight_problems(stored, config)
    return stored


def _inspect_components(found: Inspection, config: OpenVLAConfig | None) -> str | None:
    """The kind of action head, None where there is none."""
    head = None
    for component in COMPONENTS:
        files = sorted(found.path.glob(f"{component}--*_checkpoint.pt"))
        if len(files) > 1:
            listed = ", ".join(file.name for file in files)
            found.problems.append(f"{len(files)} {component} files ({listed}), and nothing says which counts; keep one")
        if not files:
            continue
        file = files[-1]
        try:
            shapes, dtypes = _read_component(file)
        except Exception as error:  # torch raises many kinds for a file that is cut off
            found.problems.append(f"{file.name} cannot be read ({type(error).__name__}); copy it again")
            continue
        values = sum(math.prod(shape) for shape in shapes.values())
        found.facts[component] = f"{file.name}: {values / 1e6:.2f} M values, {', '.join(sorted(dtypes))}"
        if component == "action_head":
            head = _head_kind(shapes)
        if config is not None and (expected := _expected_component(component, head, config)):
            _compare(found, file, shapes, expected, config.robot_spec)
    return head


def _read_component(file: Path) -> tuple[_Shapes, set[str]]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped into memory
        state = torch.load(file, map_location="cpu", weights_only=True)
    shapes = {name.removeprefix("module."): tuple(value.shape) for name, value in state.items()}
    return shapes, {str(value.dtype).removeprefix("torch.") for value in state.values()}


def _head_kind(shapes: _Shapes) -> str:
    if any(name.startswith("noise_predictor.") for name in shapes):
        return "diffusion"
    return "L1" if any(name.startswith("model.") for name in shapes) else "unknown"


def _expected_component(component: str, head: str | None, config: OpenVLAConfig) -> _Shapes | None:
    """Shapes that the configuration implies; None for what is not checked."""
    robot, width = config.robot_spec, int(config.text_config.hidden_size)  # type: ignore[union-attr]

    def shapes(make: Callable[[], nn.Module]) -> _Shapes:
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in make().state_dict().items()}

    if component == "action_head":
        own = shapes(lambda: L1RegressionActionHead(width, robot.action_dim, robot.chunk_length))
        if head == "diffusion":
            return {name.replace("model.", "noise_predictor.mlp_resnet.", 1): shape for name, shape in own.items()}
        return own
    if component == "vision_backbone":
        return None
    inputs = robot.proprio_dim if component == "proprio_projector" else 1
    return shapes(lambda: ProprioProjector(width, inputs))


def _compare(found: Inspection, file: Path, shapes: _Shapes, expected: _Shapes, robot: RobotSpec) -> None:
    odd = [name for name in sorted({*shapes, *expected}) if shapes.get(name) != expected.get(name)]
    if odd:
        name = odd[0]
        found.problems.append(
            f"{file.name}: {name!r} has shape {shapes.get(name)}, robot {robot.name!r} (actions {robot.chunk_length} x "
            f"{robot.action_dim}, state {robot.proprio_dim}) implies {expected.get(name)}; it is of another robot, "
            "width or kind of head"
        )


def _inspect_config(found: Inspection, config_json: Mapping[str, Any], config: OpenVLAConfig) -> None:
    robot = config.robot_spec
    says = "" if config_json.get("robot") else " (assumed: none is recorded)"
    found.facts["robot"] = (
        f"{robot.name}{says}: actions {robot.chunk_length} x {robot.action_dim}, state {robot.proprio_dim}, "
        f"{robot.normalization}, cameras {', '.join(robot.cameras)}"
    )
    says = "" if config_json.get("pruner") else " (assumed: none is recorded)"
    found.facts["pruner"] = f"{config.pruner_spec}{says}"
    images = config.num_images_in_input or 2
    says = "" if config_json.get("num_images_in_input") else " (assumed: none is recorded)"
    found.facts["images per sample"] = f"{images}{says}"
    found.facts["action read-out"] = config.action_readout
    if images > len(robot.cameras):
        found.problems.append(
            f"config.json: num_images_in_input {images}, but robot {robot.name!r} has {len(robot.cameras)} cameras"
        )


def _inspect_statistics(found: Inspection, config_json: dict[str, Any], config: OpenVLAConfig, has_head: bool) -> None:
    try:
        statistics = read_statistics(found.path, config_json)
    except ValueError as error:
        found.problems.append(f"dataset_statistics.json is no JSON ({error}); copy it again")
        return
    found.facts["statistics"] = ", ".join(sorted(statistics)) or "none"
    if not statistics and has_head:
        found.problems.append("no dataset statistics, without which actions cannot be scaled; copy the file again")
    robot = config.robot_spec if config_json.get("robot") or has_head else None
    for name, parts in statistics.items():
        found.problems += _statistics_problems(name, parts, robot or LIBERO, sized=robot is not None)


def _statistics_problems(name: str, parts: Mapping[str, Any], robot: RobotSpec, sized: bool) -> list[str]:
    """What one dataset's statistics lack; lengths are compared with the robot where it is known (`sized`)."""
    problems = []
    sizes = {"action": robot.action_dim, "proprio": robot.proprio_dim}
    needed = ("min", "max", "q01", "q99") if robot.normalization == "bounds_q99" else ("min", "max")
    if "action" not in parts:
        problems.append(f"statistics of {name!r} have no part 'action'; recompute them")
    for part, size in sizes.items():
        if part not in parts:
            continue
        if lacking := [key for key in needed if key not in parts[part]]:
            problems.append(
                f"statistics of {name!r}, {part}: {', '.join(lacking)} missing, which {robot.normalization} needs; "
                "recompute them"
            )
        lists = {key: parts[part][key] for key in (*needed, "mask") if key in parts[part]}
        for key, values in lists.items():
            if sized and len(values) != size:
                problems.append(
                    f"statistics of {name!r}, {part}: {key} has {len(values)} values, robot {robot.name!r} has {size}"
                )
            elif not all(math.isfinite(value) for value in values):
                problems.append(f"statistics of {name!r}, {part}: {key} holds NaN or infinity; recompute them")
    return problems


def _inspect_adapter(found: Inspection, has_weights: bool) -> None:
    folder = found.path / FOLDER
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        size = next(file for file in folder.glob("adapter_model.*") if file.suffix in (".safetensors", ".bin")).stat()
        if (file := folder / "adapter_model.safetensors").is_file():
            read_header(file)
    except (OSError, ValueError, StopIteration) as error:
        found.problems.append(f"{FOLDER}/ is incomplete ({error or 'no adapter_model file'}); copy it again")
        return
    base = str(config.get("base_model_name_or_path") or "")
    found.facts["adapter"] = f"rank {config.get('r')}, alpha {config.get('lora_alpha')}, {_size(size.st_size)}"
    found.facts["adapter's base"] = base or "not said"
    if not (folder / FINGERPRINT_FILE).is_file():
        found.notes.append("the adapter records no fingerprint of its base model, so its base cannot be checked")
    known = Path(base).is_dir() or (bool(_HUB_ID.fullmatch(base)) and not Path(base).parent.is_dir())
    if not has_weights and not known:
        found.problems.append(
            f"an adapter without weights, whose base {base or '(not said)'} is not here; "
            "pass the base model as --base_checkpoint when merging"
        )


def _inspect_training_state(found: Inspection) -> None:
    file = found.path / "training_state" / "state.pt"
    if not file.is_file():
        found.facts["training state"] = "none: can be used, not resumed"
        return
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found.facts["training state"] = f"behind step {state['step']}, {_size(file.stat().st_size)}"
    except Exception as error:  # torch raises many kinds for a file that is cut off
        found.problems.append(f"training_state/state.pt cannot be read ({type(error).__name__}); copy it again")


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"
