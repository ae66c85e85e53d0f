"""What a checkpoint folder holds and what is wrong with it, told without loading weights or changing the folder."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prismatic.checkpoints.adapters import read_adapter_config
from prismatic.checkpoints.directory import load_processor
from prismatic.checkpoints.files import (
    missing_files,
    read_config,
    read_statistics,
    read_weight_map,
    small_file_problems,
    weights_remedy,
)
from prismatic.checkpoints.manifest import MANIFEST_FILE, manifest_problems
from prismatic.checkpoints.saving import load_training_state
from prismatic.checkpoints.weight_checks import weight_problems
from prismatic.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE, StoredTensor, read_header
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.original import as_original, why_original
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.autoregressive import AUTOREGRESSIVE
from prismatic.models.lora import FINGERPRINT_FILE, FOLDER
from prismatic.models.projectors import ProprioProjector
from prismatic.stored_files import component_files, load_component, load_tensors, read_json
from prismatic.vla.normalization import statistics_problems
from prismatic.vla.robots import LIBERO, RobotSpec

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
    config_json, config = _read_config(found) if has_config else ({}, None)
    stored = _inspect_weights(found, config)
    head = _inspect_components(found, config, config_json)
    found.problems += small_file_problems(directory)
    if config is not None:
        _inspect_config(found, config_json, config)
    if has_config:
        _inspect_statistics(found, config_json, config, has_head=head is not None)
    if has_adapter:
        _inspect_adapter(found, has_weights=bool(stored))
    _inspect_training_state(found)
    if (directory / MANIFEST_FILE).is_file():
        _inspect_manifest(found)
    found.kind = _kind(found, config_json, bool(stored), head)
    if not has_config:
        found.notes.append("no config.json: the folder holds what OpenVLA-OFT stores beside an adapter")
    elif stored or not has_adapter:
        missing = missing_files(directory)
        found.problems += [f"{name} is missing; copy it from the base checkpoint" for name in missing]
        if config is not None and not missing:
            _told(found, lambda: load_processor(directory, config))
    found.problems = list(dict.fromkeys(found.problems))
    return found


def _told(found: Inspection, check: Callable[[], object]) -> None:
    """Look at a part; what is wrong with it becomes a problem."""
    try:
        check()
    except (ValueError, OSError) as error:
        found.problems.append(str(error))


def _read_config(found: Inspection) -> tuple[dict[str, Any], OpenVLAConfig | None]:
    """`config.json`, and what it means; None where it means no model of ours, which is told."""
    file = found.path / "config.json"
    config_json = read_json(file)
    if config_json.get("model_type") != "openvla":
        raise ValueError(f"{file} is of a model of type {config_json.get('model_type')!r}; expected 'openvla'")
    try:
        config = read_config(found.path)[1]
    except ValueError as error:
        found.problems.append(str(error))
        return config_json, None
    if why_original(found.path, config_json):
        as_original(config)
    return config_json, config


def _kind(found: Inspection, config_json: Mapping[str, Any], has_weights: bool, head: str | None) -> str:
    if not has_weights and (found.path / FOLDER).is_dir():
        return "adapter and heads without weights; merge them by lightvla merge"
    if head is None and config_json.get("action_head") == "discrete":
        head = "discrete action token"
    if head is None and config_json.get("action_head") == AUTOREGRESSIVE:
        return "OpenVLA: action tokens one after another, one action per policy query"
    if head is None and (why := why_original(found.path, config_json)):
        found.notes.append(f"{why}; its tokens are decoded one after another unless head 'discrete' is asked for")
        return "original OpenVLA: action tokens one after another, one action per policy query; or a base to fine-tune"
    if head is None:
        return "OpenVLA: discrete action tokens, or a base model to fine-tune"
    pruner = config_json.get("pruner")
    name = pruner.get("name") if isinstance(pruner, Mapping) else None
    family = "OpenVLA-OFT or LightVLA (no pruner is recorded)" if name is None else "LightVLA"
    film = ", FiLM" if component_files(found.path, "vision_backbone") else ""
    return f"{'OpenVLA-OFT' if name == 'none' else family}, {head} head{film}"


def _inspect_weights(found: Inspection, config: OpenVLAConfig | None) -> dict[str, StoredTensor]:
    """The tensors that are there; says what is missing, cut off or of another shape."""
    directory = found.path
    index_file = directory / INDEX_FILE
    weight_map: dict[str, str] = {}
    if index_file.is_file():
        try:
            weight_map = read_weight_map(index_file)
        except ValueError as error:
            found.problems.append(str(error))
    names = sorted(set(weight_map.values())) or [SINGLE_FILE]
    present = [name for name in names if (directory / name).is_file()]
    if not present and (directory / FOLDER).is_dir():
        return {}
    missing = [name for name in names if name not in present]
    found.problems += [f"the weight file {name} is missing{weights_remedy(directory)}" for name in missing]
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


def _inspect_components(found: Inspection, config: OpenVLAConfig | None, config_json: Mapping[str, Any]) -> str | None:
    """The kind of action head, None where there is none."""
    head = None
    for component in COMPONENTS:
        files = component_files(found.path, component)
        if len(files) > 1:
            listed = ", ".join(file.name for file in files)
            found.problems.append(f"{len(files)} {component} files ({listed}), and nothing says which counts; keep one")
        if not files:
            if recorded := _recorded(component, config_json):
                found.problems.append(f"config.json records {recorded}, but there is no {component}--*; copy it here")
            continue
        file = files[-1]
        try:
            shapes, dtypes = _read_component(file)
        except ValueError as error:
            found.problems.append(str(error))
            continue
        values = sum(math.prod(shape) for shape in shapes.values())
        found.facts[component] = f"{file.name}: {values / 1e6:.2f} M values, {', '.join(sorted(dtypes))}"
        if component == "action_head":
            head = _head_kind(shapes)
        if config is not None and (expected := _expected_component(component, head, config)):
            _compare(found, file, shapes, expected, config.robot_spec)
    return head


def _recorded(component: str, config_json: Mapping[str, Any]) -> str:
    """What `config.json` says that needs this component; empty where it says nothing."""
    head = config_json.get("action_head")
    needed = {
        "action_head": f"an action head ({head})" if head in ("l1", "diffusion") else "",
        "noisy_action_projector": "a diffusion head" if head == "diffusion" else "",
        "proprio_projector": "use_proprio" if config_json.get("use_proprio") else "",
        "vision_backbone": "use_film" if config_json.get("use_film") else "",
    }
    return needed[component]


def _read_component(file: Path) -> tuple[_Shapes, set[str]]:
    state = load_component(file)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return shapes, {str(value.dtype).removeprefix("torch.") for value in state.values()}


def _head_kind(shapes: _Shapes) -> str:
    if any(name.startswith("noise_predictor.") for name in shapes):
        return "diffusion"
    return "L1" if any(name.startswith("model.") for name in shapes) else "unknown"


def _expected_component(component: str, head: str | None, config: OpenVLAConfig) -> _Shapes | None:
    """Shapes that the configuration implies; None for what is not checked."""
    robot, width = config.robot_spec, config.llama.hidden_size

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


def _inspect_statistics(
    found: Inspection, config_json: dict[str, Any], config: OpenVLAConfig | None, has_head: bool
) -> None:
    try:
        statistics = read_statistics(found.path, config_json)
    except ValueError as error:
        found.problems.append(str(error))
        return
    found.facts["statistics"] = ", ".join(sorted(statistics)) or "none"
    if not statistics and has_head:
        found.problems.append("no dataset statistics, without which actions cannot be scaled; copy the file again")
    sized = config is not None and (has_head or bool(config_json.get("robot")))
    robot = LIBERO if config is None else config.robot_spec
    use_proprio = True if "proprio_projector" in found.facts else None
    for name, parts in statistics.items():
        found.problems += statistics_problems(name, parts, robot, use_proprio, sized)


def _inspect_adapter(found: Inspection, has_weights: bool) -> None:
    folder = found.path / FOLDER
    try:
        config = read_adapter_config(folder)
        size = next(file for file in folder.glob("adapter_model.*") if file.suffix in (".safetensors", ".bin")).stat()
        if (file := folder / "adapter_model.safetensors").is_file():
            read_header(file)
        else:
            load_tensors(folder / "adapter_model.bin")
        if (file := folder / FINGERPRINT_FILE).is_file():
            read_json(file)
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
        step = load_training_state(found.path)["step"]
        found.facts["training state"] = f"behind step {step}, {_size(file.stat().st_size)}"
    except ValueError as error:
        found.problems.append(str(error))


def _inspect_manifest(found: Inspection) -> None:
    problems = manifest_problems(found.path)
    # Somebody may have removed them to save space: what is left can be used, not resumed.
    spare = [text for text in problems if text.startswith((f"{FOLDER}/", "training_state/")) and " is missing" in text]
    found.problems += [text for text in problems if text not in spare]
    found.notes += spare
    found.facts["files"] = "as written" if not problems else f"{len(problems)} not as written"


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"
