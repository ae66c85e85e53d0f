"""`Policy`: observations and instructions in, chunks of actions out."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prismatic.checkpoint import Checkpoint, LoadOptions, load_checkpoint
from prismatic.checkpoint_files import check_complete, check_statistics, read_config, read_statistics, resolve
from prismatic.components import NO_HEAD, head_kind
from prismatic.extern.hf.configuration_prismatic import check_action_readout, check_switch
from prismatic.models.precision import inference_dtype
from prismatic.models.pruners.random import RandomTokens
from prismatic.models.pruners.registry import PrunerSpec
from prismatic.models.token_pruner import TokenSelection
from prismatic.stored_files import component_file
from prismatic.vla.datasets.collate import collate
from prismatic.vla.robots import RobotSpec, get_robot
from prismatic.vla.transform import PolicyTransform

logger = logging.getLogger(__name__)

Observation = Mapping[str, Any]

LOAD_OPTIONS = ("num_images_in_input", "use_proprio", "robot", "head", "use_film", "quantization", "attention")
"""Of `LoadOptions`, what `Policy.from_pretrained` passes on."""


@dataclass
class PolicyOutput:
    """Attributes:
    actions: (B, chunk, action_dim) float64 in the robot's units; LIBERO's gripper is 1 = open, 0 = closed.
    selection: the visual tokens that the LLM saw.
    timing: seconds per stage of this call (preprocessing, vision, pruner, llm, total).
    """

    actions: np.ndarray
    selection: TokenSelection
    timing: dict[str, float] = field(default_factory=dict)


class Policy:
    """A loaded checkpoint that acts. Make one by `Policy.from_pretrained`.

    Attributes:
        model, action_head, proprio_projector, processor: the parts, for those who need them.
        norm_stats: dataset statistics by dataset.
        transform: from observation to model inputs.
        unnorm_key: the dataset whose statistics apply.
    """

    def __init__(self, checkpoint: Checkpoint, transform: PolicyTransform, unnorm_key: str) -> None:
        if checkpoint.action_head is None:
            raise FileNotFoundError(NO_HEAD.format(checkpoint.path))
        self.checkpoint = checkpoint
        self.model = checkpoint.model.eval()
        self._trained_pruner = (self.model.config.pruner_spec, self.model.pruner)
        self.action_head = checkpoint.action_head.eval()
        self.proprio_projector = checkpoint.proprio_projector
        self.processor = checkpoint.processor
        self.norm_stats = checkpoint.dataset_statistics
        self.transform = transform
        self.unnorm_key = unnorm_key
        self._clock = _StageClock(self.model)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        unnorm_key: str | None = None,
        pruner: str | PrunerSpec | None = None,
        action_readout: str | None = None,
        center_crop: bool | None = None,
        engine: str = "eager",
        **options: Any,
    ) -> "Policy":
        """Load a checkpoint directory or hub id.

        Args:
            path_or_hub_id: what to load.
            device: where to run.
            dtype: a dtype or its name, "bfloat16", "float16" or "float32"; None or "auto": bfloat16 on a GPU and on a
                CPU that computes in it (as training decides), else float32.
            unnorm_key: dataset whose statistics apply; may be left out where there is only one.
            pruner: overrides the checkpoint's, e.g. "none", "lightvla:multiplicity=set".
            action_readout: "aligned" (as trained) or "tail" (as the LightVLA research code infers).
            center_crop: None follows the checkpoint, and crops where it does not say.
            engine: how the model is run; "eager" is the only one so far.
            options: `num_images_in_input`, `use_proprio`, `robot` (a name too), `head`, `use_film`, `quantization`,
                `attention` of `LoadOptions`; `revision` and `token` of the hub; `torch_dtype`, the older name of dtype.

        Raises:
            FileNotFoundError: naming what is not there.
            TypeError: listing the options, for an unknown one.
            ValueError: for a value that is none of its choices, and for files that are damaged or do not fit together.
        """
        hub = {key: options.pop(key) for key in ("revision", "token") if key in options}
        dtype = inference_dtype(_either(dtype, options.pop("torch_dtype", None)), device)
        load = _load_options(options)
        spec = PrunerSpec.parse(pruner) if isinstance(pruner, str) else pruner
        if engine != "eager":
            raise ValueError(f"engine {engine!r} is unknown; known: eager")
        if action_readout is not None:
            check_action_readout(action_readout)
        check_switch("center_crop", center_crop)
        # What can be said early is said before gigabytes of weights are read.
        directory = resolve(path_or_hub_id, **hub)
        check_complete(directory)
        config_json, config = read_config(directory)
        key = choose_unnorm_key(directory, unnorm_key)
        if head_kind(directory, config_json, load.get("head")) is None:
            raise FileNotFoundError(NO_HEAD.format(directory))
        has_projector = component_file(directory, "proprio_projector") is not None
        reads_state = has_projector and load.get("use_proprio") is not False
        check_statistics(directory, key, load.get("robot") or config.robot_spec, reads_state)
        logger.info("running in %s on %s; dtype chooses another", str(dtype).removeprefix("torch."), device)
        checkpoint = load_checkpoint(directory, LoadOptions(device, dtype, spec, action_readout, **load))
        if center_crop is None:
            recorded = checkpoint.model.config.center_crop
            center_crop = True if recorded is None else recorded
            if recorded is None:
                checkpoint.assumptions.append("config.json records no center_crop: assumed True")
        return cls(checkpoint, checkpoint.transform(key, bool(center_crop)), key)

    @property
    def robot(self) -> RobotSpec:
        """The robot this policy drives."""
        return self.model.robot

    def act(self, observation: Observation, instruction: str) -> np.ndarray:
        """One observation -> (chunk, action_dim) actions. See `act_batch` for what is checked."""
        return self.act_batch([observation], [instruction]).actions[0]

    @torch.inference_mode()
    def act_batch(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str],
        sessions: Sequence[Any] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> PolicyOutput:
        """Several observations at once; samples do not influence each other.

        Args:
            observations: each with the robot's camera keys, uint8 (H, W, 3), and its state key, (P,).
            instructions: as many sentences.
            sessions: for pruners with a memory; none of the present ones has.
            seeds: one per observation, of what is random about the answer (diffusion's starting noise, the control
                `random`); None draws from torch's generator. With seeds an answer depends on its own request alone.

        Raises ValueError naming the observation's key, what came and what was expected.
        """
        if sessions is not None and any(session is not None for session in sessions):
            raise ValueError("sessions were given, but no pruner of this version keeps a memory; leave them out")
        if len(observations) != len(instructions) or not observations:
            raise ValueError(
                f"{len(observations)} observations came with {len(instructions)} instructions; give one each"
            )
        if seeds is not None and len(seeds) != len(observations):
            raise ValueError(f"{len(observations)} observations came with {len(seeds)} seeds; give one each")
        start = time.perf_counter()
        samples = [self.model_inputs(o, i) for o, i in zip(observations, instructions, strict=True)]
        batch = collate(samples, self.transform.pad_token_id)
        prepared = time.perf_counter()
        device = self.model.device
        self._clock.reset()
        proprio = batch["proprio"].to(device) if "proprio" in batch else None
        if isinstance(self.model.pruner, RandomTokens):
            self.model.pruner.seeds = seeds
        encoded = self.model.encode(
            batch["input_ids"].to(device), batch["attention_mask"].to(device), batch["pixel_values"].to(device),
            proprio, self.proprio_projector,
        )  # fmt: skip
        actions, hidden = self.action_head.predict(self.model, encoded, seeds)
        normalized = actions.cpu().numpy()
        timing = {"preprocessing": prepared - start, **self._clock.seconds, "total": time.perf_counter() - start}
        return PolicyOutput(self.transform.unnormalize_actions(normalized), hidden.selection, timing)

    def model_inputs(self, observation: Observation, instruction: str) -> dict[str, Any]:
        """One observation as the model takes it; the same keys as a training sample, without actions."""
        check_observation(observation, self.robot, self.transform)
        inputs: dict[str, Any] = {
            "input_ids": self.transform.input_ids(instruction),
            "pixel_values": self.transform.pixel_values(self.transform.prepare_images(observation)),
        }
        if self.transform.use_proprio:
            inputs["proprio"] = self.transform.proprio(np.asarray(observation[self.robot.state_key]))
        return inputs

    def set_pruner(self, spec: str | PrunerSpec) -> None:
        """Run with another pruner from now on (`none`, `random:seed=3`); what it leaves unsaid is as in training.

        Raises ValueError for a pruner with parameters other than those that were loaded.
        """
        spec = PrunerSpec.parse(spec) if isinstance(spec, str) else spec
        spec = spec.following(self.checkpoint.config_json.get("pruner"))
        loaded, trained = self._trained_pruner
        if spec.has_parameters and not spec.shares_parameters(loaded):
            raise ValueError(f"pruner {spec} needs trained queries, but {loaded} was loaded; load the policy with it")
        if spec.name == "random" and loaded.has_parameters:
            raise ValueError(
                f"pruner 'random' keeps as many tokens as LightVLA would, which is no control for {loaded}"
            )
        self.model.set_pruner(spec)
        self.model.pruner.load_state_dict(trained.state_dict() if spec.has_parameters else {})
        self._clock.remove()
        self._clock = _StageClock(self.model)

    def description(self) -> dict[str, Any]:
        """What this policy is, for results and reports."""
        config = self.model.config
        return {
            "checkpoint": str(self.checkpoint.path),
            "pruner": str(config.pruner_spec),
            "action_head": self.action_head.kind,
            "use_film": config.use_film,
            "action_readout": config.action_readout,
            "unnorm_key": self.unnorm_key,
            "center_crop": self.transform.center_crop,
            "image_size": self.transform.image_size,
            "num_images": self.transform.num_images,
            "use_proprio": self.transform.use_proprio,
            "num_visual_tokens": self.model.num_visual_tokens,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "robot": self.robot.to_json(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "device_name": _device_name(self.model.device),
            "assumptions": list(self.checkpoint.assumptions),
        }


def _either(dtype: torch.dtype | str | None, older: torch.dtype | str | None) -> torch.dtype | str | None:
    """`dtype`, or what was given under its older name. Raises TypeError where both were."""
    if dtype is not None and older is not None:
        raise TypeError(f"dtype={dtype} and torch_dtype={older} mean the same; pass dtype alone")
    return older if dtype is None else dtype


def _load_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `LoadOptions` takes. Raises TypeError for unknown options, ValueError for an unknown robot."""
    if unknown := sorted(set(options) - set(LOAD_OPTIONS)):
        raise TypeError(
            f"unknown options {unknown} of Policy.from_pretrained; known: device, dtype, unnorm_key, pruner, "
            f"action_readout, center_crop, engine, {', '.join(LOAD_OPTIONS)}, revision, token"
        )
    checked = dict(options)
    if isinstance(robot := checked.get("robot"), str):
        checked["robot"] = get_robot(robot)
    elif not isinstance(robot, RobotSpec | None):
        raise ValueError(f"robot {robot!r} is neither a RobotSpec nor the name of one")
    return checked


def choose_unnorm_key(directory: Path, unnorm_key: str | None) -> str:
    """The dataset whose statistics apply. Raises ValueError listing the known ones."""
    known = sorted(read_statistics(directory))
    if unnorm_key is None and len(known) == 1:
        return known[0]
    if unnorm_key not in known:
        listed = ", ".join(known) or "none: the checkpoint has no dataset_statistics.json"
        raise ValueError(f"unnorm_key={unnorm_key!r} names no dataset of {directory}; known: {listed}")
    return unnorm_key


def check_observation(observation: Observation, robot: RobotSpec, transform: PolicyTransform) -> None:
    """Raises ValueError naming the key, what came and what the robot's policy expects."""
    needed = [*robot.cameras[: transform.num_images], *([robot.state_key] if transform.use_proprio else [])]
    if missing := [key for key in needed if key not in observation]:
        raise ValueError(f"observation lacks {missing}; robot {robot.name!r} needs {needed}, got {sorted(observation)}")
    for key in robot.cameras[: transform.num_images]:
        image = np.asarray(observation[key])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"observation[{key!r}] is {image.dtype} {image.shape}; expected uint8 (H, W, 3) RGB in 0..255"
            )
    if transform.use_proprio:
        state = np.asarray(observation[robot.state_key])
        if state.shape != (robot.proprio_dim,):
            raise ValueError(
                f"observation[{robot.state_key!r}] has shape {state.shape}; expected ({robot.proprio_dim},)"
            )
        if not np.isfinite(state).all():
            raise ValueError(f"observation[{robot.state_key!r}] holds NaN or infinity: {state.tolist()}")


class _StageClock:
    """Seconds spent in the vision, pruner and LLM modules of a model, by forward hooks.

    A pruner inside the vision backbone or the LLM counts there too.
    """

    def __init__(self, model: Any) -> None:
        self.seconds: dict[str, float] = {}
        stages: dict[str, tuple[nn.Module, nn.Module]] = {
            "vision": (model.vision_backbone, model.projector),
            "pruner": (model.pruner, model.pruner),
            "llm": (model.language_model.model.layers[0], model.language_model.model.norm),
        }
        self._handles = []
        for name, (first, last) in stages.items():
            self._handles.append(first.register_forward_pre_hook(lambda module, args, name=name: self._start(name)))
            self._handles.append(last.register_forward_hook(lambda module, args, output, name=name: self._stop(name)))

    def reset(self) -> None:
        self.seconds = {}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) - _now()  # diffusion runs the LLM several times

    def _stop(self, name: str) -> None:
        self.seconds[name] += _now()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
