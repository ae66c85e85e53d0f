"""The `.pt` files beside a checkpoint's weights: action head and projectors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from prismatic.extern.hf.configuration_prismatic import HEAD_KINDS
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import DiscreteActionHead, L1RegressionActionHead
from prismatic.models.autoregressive import AUTOREGRESSIVE, WITHOUT_FILES, AutoregressiveActionHead
from prismatic.models.contract import ActionHead
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.stored_files import component_file, load_component

Module = TypeVar("Module", bound=nn.Module)

NO_HEAD = (
    "{} has no action_head--*_checkpoint.pt; fine-tune it first, fetch its .pt files, or say what it is if its actions "
    "are tokens of the LLM: head 'discrete' (all at once) or 'autoregressive' (one after another)"
)


def head_kind(directory: Path, config_json: dict[str, Any], wanted: str | None = None) -> str | None:
    """Which kind of action head a checkpoint holds; None where nothing says so and nothing is wanted.

    A checkpoint without head files can be read as action tokens, discrete (all at once) or autoregressive (one after
    another), where that is wanted or recorded. `extern.hf.original` tells what to want where nothing is said.

    Raises:
        ValueError: where it is not the wanted kind, or files of a diffusion head are missing.
        FileNotFoundError: where another kind is wanted or recorded, and there are no files of it.
    """
    head, projector = (component_file(directory, name) for name in ("action_head", "noisy_action_projector"))
    recorded = config_json.get("action_head")
    if (projector is None) != (head is None) and (projector is not None or recorded == "diffusion"):
        raise ValueError(
            f"{directory} holds only one of action_head--* and noisy_action_projector--*; a diffusion head needs both"
        )
    if head is None and recorded == "l1":
        raise FileNotFoundError(
            f"{directory} records an L1 head, but has no action_head--*_checkpoint.pt; copy it there (to train a new "
            "one, set action_head in its config.json to null)"
        )
    held = "diffusion" if projector else "l1" if head else recorded if recorded in WITHOUT_FILES else None
    if wanted is not None and wanted not in HEAD_KINDS:
        raise ValueError(f"unknown kind of action head {wanted!r}; known: {', '.join(HEAD_KINDS)}")
    if wanted is None or wanted == held or (wanted in WITHOUT_FILES and held is recorded is None):
        return wanted or held
    if held is None:
        raise FileNotFoundError(NO_HEAD.format(directory))
    flags = {"l1": "use_l1_regression", "diffusion": "use_diffusion", "discrete": "neither of the two"}
    flags[AUTOREGRESSIVE] = f"action_head {AUTOREGRESSIVE}"
    raise ValueError(
        f"{directory} holds a head of kind {held!r}, but {wanted!r} was asked for; set {flags[held]} "
        f"(and not {flags[wanted]})"
    )


def diffusion_steps(config_json: dict[str, Any], wanted: int | None = None) -> int | None:
    """From clean actions to noise, as a checkpoint's diffusion head was trained; None where nothing says how many.

    Raises ValueError where another number is wanted than `config.json` records, and for what is no number of steps.
    """
    recorded = config_json.get("num_diffusion_steps_train")
    for where, steps in (("num_diffusion_steps_train", wanted), ("config.json: num_diffusion_steps_train", recorded)):
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"{where} {steps!r}: expected a whole number of steps, 1 or more")
    if None not in (recorded, wanted) and recorded != wanted:
        raise ValueError(
            f"num_diffusion_steps_train {wanted}: the checkpoint's diffusion head was trained with {recorded} steps; "
            f"leave it out, or give {recorded}"
        )
    return wanted if recorded is None else recorded


def new_head(
    model: OpenVLAForActionPrediction, kind: str
) -> L1RegressionActionHead | DiffusionActionHead | DiscreteActionHead | AutoregressiveActionHead:
    """An untrained head of that kind, of the sizes that the model and its robot need."""
    robot, llm_dim = model.robot, model.config.llama.hidden_size
    if kind == "discrete":
        return model.discrete_head()
    if kind == AUTOREGRESSIVE:
        return model.autoregressive_head()
    if kind == "diffusion":
        steps = model.config.num_diffusion_steps_train
        return DiffusionActionHead(llm_dim, robot.action_dim, robot.chunk_length, steps)
    return L1RegressionActionHead(llm_dim, robot.action_dim, robot.chunk_length)


def load_head(
    directory: Path, model: OpenVLAForActionPrediction, kind: str | None, dtype: torch.dtype | None
) -> ActionHead | None:
    """The head of that kind, in `dtype` or as stored; None where there is none. Raises ValueError on misfits."""
    if kind is None:
        return None
    if (file := component_file(directory, "action_head")) is None:
        return new_head(model, kind)
    with torch.device("meta"):  # what would be drawn here is not what it becomes
        head = new_head(model, kind)
    if isinstance(head, DiffusionActionHead):
        projector_file = component_file(directory, "noisy_action_projector")
        assert projector_file is not None  # head_kind has seen it
        head.restore_schedule()
        _fill(head.noise_predictor, file, model.device, dtype, prefix="noise_predictor.")
        _fill(head.noisy_action_projector, projector_file, model.device, dtype)
        return head.eval()
    return _fill(head, file, model.device, dtype)


def load_proprio(
    directory: Path, model: OpenVLAForActionPrediction, dtype: torch.dtype | None
) -> ProprioProjector | None:
    """The proprio projector, in `dtype` or as stored; None where there is none. Raises ValueError on misfits."""
    if (file := component_file(directory, "proprio_projector")) is None:
        return None
    with torch.device("meta"):
        projector = ProprioProjector(model.config.llama.hidden_size, model.robot.proprio_dim)
    return _fill(projector, file, model.device, dtype)


def _fill(module: Module, file: Path, device: torch.device, dtype: torch.dtype | None, prefix: str = "") -> Module:
    state = {name.removeprefix(prefix): value for name, value in load_component(file).items()}
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        name = next(name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name))
        raise ValueError(
            f"{file}: {name!r} has shape {found.get(name)}, a {type(module).__name__} of this checkpoint needs "
            f"{expected.get(name)}; the head was made for another robot or kind of head"
        )
    dtype = dtype or next(iter(state.values())).dtype
    if device.type != "meta":
        module.load_state_dict({name: value.to(device, dtype) for name, value in state.items()}, assign=True)
    return module.to(dtype).eval()


def component_states(
    head: ActionHead | None, proprio_projector: ProprioProjector | None
) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of the head and the projectors, as their files hold them; empty where there is no such part.

    The tensors are the parts' own, where they lie.
    """
    states = {
        "action_head": head.state_dict() if head is not None else {},
        "noisy_action_projector": {},
        "proprio_projector": proprio_projector.state_dict() if proprio_projector else {},
    }
    if isinstance(head, DiffusionActionHead):
        own = "noisy_action_projector."
        states["action_head"] = {k: v for k, v in head.state_dict().items() if not k.startswith(own)}
        states["noisy_action_projector"] = head.noisy_action_projector.state_dict()
    return {name: {k: v.detach() for k, v in state.items()} for name, state in states.items()}


def on_host(states: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """The same in the host's memory. What is divided among processes has to be gathered before, where it lies."""
    return {name: {k: v.cpu() for k, v in state.items()} for name, state in states.items()}
