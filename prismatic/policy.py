"""`Policy`: observations and instructions in, chunks of actions out."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prismatic.checkpoints.components import NO_HEAD
from prismatic.checkpoints.directory import Checkpoint, load_checkpoint
from prismatic.checkpoints.files import check_complete, check_statistics, read_config, resolve
from prismatic.checkpoints.options import LoadOptions, assumed_original, choose_unnorm_key, either, load_options
from prismatic.checkpoints.weight_files import num_values
from prismatic.extern.hf.configuration_prismatic import check_action_readout, check_switch
from prismatic.inference.choice import build_engine
from prismatic.inference.engine import Engine, Parts, check_engine
from prismatic.models.autoregressive import AUTOREGRESSIVE, check_decodable
from prismatic.models.batch import Call, Session
from prismatic.models.contract import ActionHead
from prismatic.models.diffusion import DiffusionActionHead
from prismatic.models.precision import check_device, choose_dtype
from prismatic.models.pruners.blanking import checked_blankings
from prismatic.models.pruners.registry import PrunerSpec, as_spec, resolve_pruner
from prismatic.models.stage_clock import StageClock
from prismatic.models.token_pruner import TokenSelection
from prismatic.stored_files import component_file
from prismatic.vla.datasets.collate import collate
from prismatic.vla.preparation import Preparation
from prismatic.vla.request import Blanking, Observation, read_request
from prismatic.vla.robots import RobotSpec
from prismatic.vla.transform import PolicyTransform

logger = logging.getLogger(__name__)


@dataclass
class PolicyOutput:
    """Attributes:
    actions: (B, chunk, action_dim) float64 in the robot's units; LIBERO's gripper is 1 = open, 0 = closed.
    selection: the visual tokens that the LLM saw; under diffusion in its last pass, since each picks anew.
    timing: seconds of this call and its stages: preprocessing (on the CPU), vision (backbone and projector), pruner,
        llm (all passes under diffusion) and total. No time counts in two stages; the head, copies and what lies between
        are in the total only.
    """

    actions: np.ndarray
    selection: TokenSelection
    timing: dict[str, float] = field(default_factory=dict)


class Policy:
    """A loaded checkpoint that acts. Make one by `Policy.from_pretrained`.

    Several threads may call `act` and `act_batch` at once; `set_pruner` needs them to be done.

    Attributes:
        model, action_head, proprio_projector, processor: the parts, for those who need them.
        norm_stats: dataset statistics by dataset.
        transform: from observation to model inputs.
        unnorm_key: the dataset whose statistics apply.
    """

    def __init__(
        self, checkpoint: Checkpoint, transform: PolicyTransform, unnorm_key: str, engine: str | Engine = "auto"
    ) -> None:
        if checkpoint.action_head is None:
            raise FileNotFoundError(NO_HEAD.format(checkpoint.path))
        self.checkpoint = checkpoint
        self.model = checkpoint.model.eval()
        self._trained_pruner = (self.model.config.pruner_spec, self.model.pruner)
        checkpoint.action_head.eval()
        self._parts = Parts(self.model, checkpoint.action_head, checkpoint.proprio_projector)
        self.engine = build_engine(engine, self._parts) if isinstance(engine, str) else engine
        self.processor = checkpoint.processor
        self.norm_stats = checkpoint.dataset_statistics
        self.transform = transform
        self.unnorm_key = unnorm_key
        self._preparation = Preparation(transform)
        self._dtype_reason = "as the parts came"
        _warn_of_spinning_threads(self.model.device)

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
        engine: str = "auto",
        **options: Any,
    ) -> "Policy":
        """Load a checkpoint directory or hub id.

        Args:
            path_or_hub_id: what to load.
            device: where to run.
            dtype: a dtype or its name, "bfloat16", "float16" or "float32"; None or "auto": bfloat16 on a GPU, and on a
                CPU where that is clearly faster (measured) or float32 weights would not fit, else float32.
            unnorm_key: dataset whose statistics apply; may be left out where there is only one.
            pruner: overrides the checkpoint's, e.g. "none", "lightvla:multiplicity=set".
            action_readout: "aligned" (as trained) or "tail" (as the LightVLA research code infers).
            center_crop: None follows the checkpoint, and crops where it does not say.
            engine: how the model is run: "eager", "compiled" (`prismatic.inference.compiled`), or "auto": compiled
                on a GPU, and on a CPU where it pays.
            options: `num_images_in_input`, `use_proprio`, `robot` (a name too), `head`, `use_film`, `quantization`,
                `attention`, `num_diffusion_steps_train` of `LoadOptions`; `revision` and `token` of the hub;
                `torch_dtype`, the older name of dtype.

        A folder that looks like an original OpenVLA checkpoint (`extern.hf.original.why_original`) is run as one, where
        no `head` is given: one action per query, (1, action_dim). What was assumed is logged and stays in
        `checkpoint.assumptions`.

        Raises:
            FileNotFoundError: naming what is not there.
            TypeError: listing the options, for an unknown one.
            ValueError: for a value that is none of its choices, for files that are damaged or do not fit together, and
                for several images where a folder looks like an original OpenVLA checkpoint.
        """
        hub = {key: options.pop(key) for key in ("revision", "token") if key in options}
        device = check_device(device)
        wanted = either(dtype, options.pop("torch_dtype", None))
        choose_dtype(wanted, "cuda")  # raises for an unknown one
        load = load_options(options)
        spec = as_spec(pruner)
        _check_choices(engine, action_readout, center_crop)
        directory = resolve(path_or_hub_id, **hub)
        key, original = _check_folder(directory, unnorm_key, load)
        chosen = choose_dtype(wanted, device, num_values(check_complete(directory)))
        name = str(chosen.dtype).removeprefix("torch.")
        logger.info("running in %s on %s (%s); dtype chooses another", name, device, chosen.reason)
        load_as = LoadOptions(device, chosen.dtype, spec, action_readout, **load)
        checkpoint = load_checkpoint(directory, load_as)
        if original is not None:
            checkpoint.assumptions.insert(0, original)
            logger.warning("%s: %s", directory, original)
        _warn_of_unused_steps(checkpoint, load_as)
        policy = cls(checkpoint, checkpoint.transform(key, _crop_in_force(checkpoint, center_crop)), key, engine)
        policy._dtype_reason = chosen.reason
        return policy

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What `copy` and `pickle` ask for. Raises TypeError: locks, graphs and kernels are of this object alone."""
        raise TypeError(
            f"a Policy is neither copied nor pickled; load it once more where it is needed: "
            f"Policy.from_pretrained({str(self.checkpoint.path)!r}, ...)"
        )

    @property
    def robot(self) -> RobotSpec:
        """The robot this policy drives."""
        return self.model.robot

    @property
    def action_head(self) -> ActionHead:
        """Reads actions off the model's hidden rows; may be replaced."""
        return self._parts.action_head

    @action_head.setter
    def action_head(self, head: ActionHead) -> None:
        self._parts.action_head = head

    @property
    def proprio_projector(self) -> nn.Module | None:
        """Makes a token of the state, where the policy reads it; may be replaced."""
        return self._parts.proprio_projector

    @proprio_projector.setter
    def proprio_projector(self, projector: nn.Module | None) -> None:
        self._parts.proprio_projector = projector

    def new_session(self) -> Session:
        """A memory for one episode, to be given with each of its queries; pruners that keep none make no use of it."""
        return Session()

    @property
    def uses_sessions(self) -> bool:
        """Whether the present pruner remembers anything from one query of a session to the next."""
        return "memories" in getattr(self.model.pruner, "needs", ())

    def act(self, observation: Observation, instruction: str | bytes, session: Session | None = None) -> np.ndarray:
        """One observation -> (chunk, action_dim) actions. See `act_batch` for what is taken and checked."""
        return self.act_batch([observation], [instruction], [session]).actions[0]

    @torch.inference_mode()
    def act_batch(
        self,
        observations: Sequence[Observation],
        instructions: Sequence[str | bytes],
        sessions: Sequence[Session | None] | None = None,
        seeds: Sequence[int] | None = None,
        blankings: Sequence[Blanking | None] | None = None,
    ) -> PolicyOutput:
        """Several observations at once; samples do not influence each other.

        Images of several observations are prepared at once, on as many threads as the process may use cores, those of
        one on the calling thread; the model takes as many threads as torch is given.

        Args:
            observations: each with the robot's camera keys, uint8 (H, W, 3), and its state key, (P,): arrays, tensors,
                lists, PIL pictures.
            instructions: as many sentences.
            sessions: from `new_session`, one per observation, of the episode that it belongs to, or None: for pruners
                with a memory (`static_reuse`). Without one a query stands for itself.
            seeds: a whole number per observation, of what is random about the actions (diffusion's starting noise, the
                control `random`); None draws from torch's generator. With seeds an answer depends on its own request
                alone.
            blankings: one per observation, or None: which kept tokens lose their content, to see if it is needed.

        Raises:
            ValueError: naming what is wrong with the lists, or the observation's key, what came and what was expected.
            FloatingPointError: the model computed NaN or infinity; names the stage where it began.
        """
        observations, instructions, seeds = read_request(observations, instructions, sessions, seeds)
        blanked = checked_blankings(blankings, len(observations), self.model)
        start = time.perf_counter()
        samples = self._preparation.samples(self.transform, observations, instructions)
        batch = collate(samples, self.transform.pad_token_id)
        prepared = time.perf_counter()
        clock = StageClock(self.model.device)
        memory = self._begin(sessions, instructions)
        answer = self.engine.answer(batch, Call(None, seeds, clock, memory, blankings=blanked))
        normalized = answer.predicted.cpu().numpy()
        actions = self.transform.unnormalize_actions(normalized)
        if not (np.isfinite(actions).all() and _finite(answer.selection.scores)):
            raise FloatingPointError(self._where_not_finite(batch, normalized))
        for session in filter(None, sessions or ()):
            session.end_query()
        timing = {"preprocessing": prepared - start, **clock.seconds(), "total": time.perf_counter() - start}
        return PolicyOutput(actions, answer.selection, timing)

    def warm_up(self, instruction: str = "do nothing", batch_size: int = 1) -> float:
        """Query once for nothing: what the first query of a process takes longer is then nobody's latency.

        An engine prepares for prompts as long as this one's and for as many observations at once: under `compiled` on
        a GPU all graphs are captured here, which the log follows. Returns the seconds it took.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size {batch_size!r}: expected a whole number of observations, at least 1")
        began, transform = time.perf_counter(), self.transform
        draw = np.random.default_rng(0)  # pictures that nobody warns of
        cameras, size = self.robot.cameras[: transform.num_images], (256, 256, 3)
        proprio = transform.statistics.get("proprio", {})
        observation: dict[str, Any] = {camera: draw.integers(256, size=size, dtype=np.uint8) for camera in cameras}
        observation[self.robot.state_key] = np.array(proprio.get("mean", np.zeros(self.robot.proprio_dim)))
        with self.engine.warming_up():
            seeds = list(range(batch_size))  # so that nothing is drawn from torch's generator
            self.act_batch([observation] * batch_size, [instruction] * batch_size, seeds=seeds)
        return time.perf_counter() - began

    def _begin(
        self, sessions: Sequence[Session | None] | None, instructions: Sequence[str | bytes]
    ) -> Sequence[Session | None] | None:
        """Those sessions that the pruner makes use of, with the query begun; None where it makes none."""
        if not self.uses_sessions or not any(sessions or ()):
            return None
        for session, instruction in zip(sessions or (), instructions, strict=True):
            if session is not None:
                session.begin_query(self.model.pruner, instruction)
        return sessions

    def _where_not_finite(self, batch: Mapping[str, torch.Tensor], normalized: np.ndarray) -> str:
        """What to say of NaN or infinity: the first stage whose result has one."""
        key, embed = self.unnorm_key, self.model.get_input_embeddings()
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        encoded = self.model.encode(**inputs, proprio_projector=self.proprio_projector)
        first_pass = self.model.run(encoded)  # without noisy actions, which passes of a diffusion head may have spoilt
        stages = (
            (encoded.visual.tokens, "vision", "the vision backbone or its projector"),
            (encoded.state_token, "state", f"the proprio projector, or the statistics {key!r} of the state"),
            (embed(encoded.input_ids), "llm", "the token embeddings"),
            (first_pass.selection.scores, "pruner", str(self.model.config.pruner_spec)),
            (first_pass.rows, "llm", "the language model's layers"),
            (torch.from_numpy(normalized), "head", f"the {self.action_head.kind} action head"),
        )
        found = next(((name, part) for result, name, part in stages if not _finite(result)), None)
        name, part = found or ("un-normalisation", f"the statistics {key!r} of the actions")
        return (
            f"the policy computed NaN or infinity; it begins in stage {name!r}: {part}. Weights or statistics of "
            f"{self.checkpoint.path} are damaged (lightvla inspect looks at the folder), or "
            f"{self.model.dtype} overflows"
        )

    def model_inputs(self, observation: Observation, instruction: str | bytes) -> dict[str, Any]:
        """One observation as the model takes it; the same keys as a training sample, without actions."""
        return self._preparation.samples(self.transform, [observation], [instruction])[0]

    def set_pruner(self, spec: str | PrunerSpec) -> None:
        """Run with another pruner from now on (`none`, `random:seed=3`); what it leaves unsaid is as in training.

        Raises ValueError for a pruner with parameters other than those that were loaded.
        """
        spec = resolve_pruner(spec, self.checkpoint.config_json.get("pruner"), "inference")
        loaded, trained = self._trained_pruner
        if self.action_head.kind == AUTOREGRESSIVE:
            check_decodable(spec.name)
        spec.check_runs_beside(loaded)
        self.model.set_pruner(spec)
        self.model.pruner.load_state_dict(trained.state_dict() if spec.has_parameters else {})

    def description(self) -> dict[str, Any]:
        """What this policy is, for results and reports."""
        config, head = self.model.config, self.action_head
        steps = {}
        if isinstance(head, DiffusionActionHead):
            steps["num_diffusion_steps_train"] = head.num_train_steps
            steps["num_diffusion_steps_inference"] = head.num_inference_steps
        return {
            **steps,
            "checkpoint": str(self.checkpoint.path),
            "pruner": str(config.pruner_spec),
            "action_head": head.kind,
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
            "dtype_reason": self._dtype_reason,
            "device": str(self.model.device),
            "device_name": _device_name(self.model.device),
            "assumptions": list(self.checkpoint.assumptions),
            "engine": self.engine.describe(),
        }


def _check_choices(engine: str, action_readout: str | None, center_crop: bool | None) -> None:
    """Raises ValueError for a value that is none of its choices."""
    check_engine(engine)
    if action_readout is not None:
        check_action_readout(action_readout)
    check_switch("center_crop", center_crop)


def _check_folder(directory: Path, unnorm_key: str | None, load: dict[str, Any]) -> tuple[str, str | None]:
    """What can be said against a checkpoint before gigabytes of weights are read.

    Returns:
        The dataset whose statistics apply; why it is taken for an original OpenVLA checkpoint, where it is.

    Raises:
        FileNotFoundError, ValueError: as `Policy.from_pretrained`.
    """
    check_complete(directory)
    config_json, config = read_config(directory)
    key = choose_unnorm_key(directory, unnorm_key)
    original = assumed_original(directory, config_json, load)
    has_projector = component_file(directory, "proprio_projector") is not None
    reads_state = has_projector and load.get("use_proprio") is not False
    check_statistics(directory, key, load.get("robot") or config.robot_spec, reads_state)
    return key, original


def _warn_of_unused_steps(checkpoint: Checkpoint, options: LoadOptions) -> None:
    if options.num_diffusion_steps_train and not isinstance(checkpoint.action_head, DiffusionActionHead):
        logger.warning(
            "num_diffusion_steps_train is of diffusion heads, and %s has a head of kind %s: it is not used",
            checkpoint.path,
            "none" if checkpoint.action_head is None else checkpoint.action_head.kind,
        )


def _crop_in_force(checkpoint: Checkpoint, center_crop: bool | None) -> bool:
    """The flag, else what the checkpoint records, else True, which is then an assumption."""
    if center_crop is None and (center_crop := checkpoint.model.config.center_crop) is None:
        checkpoint.assumptions.append("config.json records no center_crop: assumed True")
        center_crop = True
    return bool(center_crop)


def _warn_of_spinning_threads(device: torch.device) -> None:
    """Says what cannot be set any more once torch is imported. Set later, the variable silences this and helps not."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        logger.warning(
            "torch computes on %d threads that spin while they wait: beside busy processes single calls can take "
            "seconds. Start Python with OMP_WAIT_POLICY=PASSIVE, or call torch.set_num_threads(1)",
            threads,
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())
