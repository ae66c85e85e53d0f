"""What one process of a benchmark holds: a policy, its modules once per pruner over the same weights, calls."""

import dataclasses
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from prismatic.benchmark.config import REFERENCE, Setting
from prismatic.models.batch import Session
from prismatic.models.precision import check_device, choose_dtype
from prismatic.policy import Policy, PolicyOutput

OBSERVATIONS = 8
"""Different ones, which the calls of every arm go through in the same order."""
SENTENCE = "put the black bowl on the wooden plate"


@dataclass(frozen=True)
class Job:
    """What a process is to hold.

    Attributes:
        setting: engine, dtype, threads.
        pruners: in the flag grammar.
        checkpoint, preset, tokens, device, instruction, camera_size: as the flags.
    """

    setting: Setting
    pruners: tuple[str, ...]
    checkpoint: str = ""
    preset: str = ""
    tokens: int = 0
    device: str = "cpu"
    instruction: str = ""
    camera_size: int = 256

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Job":
        """Of `dataclasses.asdict`."""
        return cls(**{**data, "setting": Setting(**data["setting"]), "pruners": tuple(data["pruners"])})


class Acting(Protocol):
    """A policy, or what acts as one."""

    def act_batch(self, observations: Any, instructions: Any) -> PolicyOutput:
        """As `Policy.act_batch`."""


def open_policy(job: Job) -> Policy:
    """The job's eager policy, with the pruner that it comes with.

    Raises FileNotFoundError and ValueError as `Policy.from_pretrained`.
    """
    device = check_device(job.device)
    dtype = choose_dtype(job.setting.dtype or None, device).dtype
    if not job.preset:
        return Policy.from_pretrained(job.checkpoint, device=device, dtype=dtype, engine="eager")
    from prismatic.benchmark.random_policy import SIZES, policy_of, random_checkpoint

    return policy_of(random_checkpoint(SIZES[job.preset], device, dtype))


def as_engine(policy: Policy, engine: str) -> Acting:
    """What computes an eager policy's actions by that engine, over the same weights."""
    if engine == REFERENCE:
        from prismatic.benchmark.reference import ReferencePolicy

        return ReferencePolicy(policy)
    return policy if engine == "eager" else Policy(policy.checkpoint, policy.transform, policy.unnorm_key, engine)


def with_pruner(policy: Policy, pruner: str, tokens: int) -> Policy:
    """An eager policy over the same weights that prunes so; with `tokens`, LightVLA keeps exactly as many.

    Raises ValueError for a pruner that does not fit, and for more tokens than there are.
    """
    from prismatic.benchmark.fixed_tokens import KeepExactly
    from prismatic.benchmark.reference import sharing_copy

    model = sharing_copy(policy.model)
    other = Policy(dataclasses.replace(policy.checkpoint, model=model), policy.transform, policy.unnorm_key, "eager")
    other.set_pruner(pruner)
    if tokens > model.num_visual_tokens:
        raise ValueError(
            f"--tokens {tokens}: the policy has {model.num_visual_tokens} visual tokens; give as many or fewer"
        )
    if tokens and model.config.pruner_spec.name == "lightvla":
        multiplicity = model.config.pruner_spec.option("multiplicity")
        model.pruner = KeepExactly(tokens, model.num_visual_tokens, model.device, multiplicity)
    return other


class Subject:
    """Policies by the place of their pruner, made when they are first asked for.

    Attributes:
        job: what was asked for.
        policy: as it was loaded, eager; nothing runs it but to look at its parts.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.setting.threads:
            torch.set_num_threads(job.setting.threads)
        self.policy = open_policy(job)
        self._eager: dict[int, Policy] = {}
        self._acting: dict[int, Acting] = {}
        self._sessions: dict[int, Session] = {}

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the policy computes in."""
        return self.policy.model.dtype

    def eager(self, place: int) -> Policy:
        """The eager policy with that pruner, whose parts the formulas count."""
        if place not in self._eager:
            self._eager[place] = with_pruner(self.policy, self.job.pruners[place], self.job.tokens)
        return self._eager[place]

    def acting(self, place: int) -> Acting:
        """What is measured."""
        if place not in self._acting:
            self._acting[place] = as_engine(self.eager(place), self.job.setting.engine)
        return self._acting[place]

    @cached_property
    def instruction(self) -> str:
        """What every call is told."""
        if self.job.instruction or not self.job.preset:
            return self.job.instruction or SENTENCE
        from prismatic.benchmark.random_policy import PROMPT_TOKENS, instruction_of

        return instruction_of(PROMPT_TOKENS)

    @cached_property
    def observations(self) -> list[dict[str, np.ndarray]]:
        """What the calls are shown, the same in every process."""
        return made_up_observations(self.policy, OBSERVATIONS, self.job.camera_size)

    def prepare(self, place: int) -> None:
        """What an engine does before its first action; those that prepare nothing do nothing."""
        acting = self.acting(place)
        if self.job.setting.engine not in (REFERENCE, "eager") and isinstance(acting, Policy):
            acting.warm_up(self.instruction)

    def ran(self, place: int) -> dict[str, Any]:
        """What runs the arm in truth, as `Policy.description` tells it."""
        acting = self.acting(place)
        return acting.description()["engine"] if isinstance(acting, Policy) else {"name": self.job.setting.engine}

    def begin(self, place: int) -> None:
        """Let the next call of an arm be a session's second one, where its pruner has sessions."""
        acting = self.acting(place)
        if isinstance(acting, Policy) and acting.uses_sessions:
            self._sessions.pop(place, None)
            self.act(place, 0)

    def act(self, place: int, number: int) -> PolicyOutput:
        """Call `number` of an arm."""
        look, acting = self.observations[number % len(self.observations)], self.acting(place)
        if isinstance(acting, Policy) and acting.uses_sessions:
            session = self._sessions.setdefault(place, acting.new_session())
            return acting.act_batch([look], [self.instruction], [session])
        return acting.act_batch([look], [self.instruction])

    def call(self, place: int, number: int) -> dict[str, Any]:
        """As `act`: seconds by stage, kept tokens and actions as plain data.

        Stages are the policy's, `model` (all but preprocessing), and `cpu`: what all threads of the process computed in
        the whole call, which other processes do not make longer by taking the cores.
        """
        _ = self.observations, self.instruction
        before = time.process_time()
        output = self.act(place, number)
        cpu = time.process_time() - before
        timing = output.timing
        return {
            "seconds": {**timing, "model": timing["total"] - timing["preprocessing"], "cpu": cpu},
            "kept": int(output.selection.distinct()[0]),
            "actions": output.actions[0].tolist(),
        }


def made_up_observations(policy: Policy, number: int, side: int) -> list[dict[str, np.ndarray]]:
    """As in a rollout: pictures of coloured squares, the same in all but for a patch of them that moves on.

    States lie between the first and last percentile of the training data's.
    """
    draw, robot = np.random.default_rng(0), policy.robot
    proprio = policy.transform.statistics.get("proprio")
    low, high = (np.array(proprio[key]) for key in ("q01", "q99")) if proprio else (-np.ones(robot.proprio_dim), 1.0)
    coarse = -(-side // 8)

    scenes = {camera: draw.integers(256, size=(coarse, coarse, 3), dtype=np.uint8) for camera in robot.cameras}
    moving = draw.integers(256, size=(4, 4, 3), dtype=np.uint8)

    def picture(camera: str, step: int) -> np.ndarray:
        blocks = scenes[camera].copy()
        shape = blocks[:4, step : step + 4].shape
        blocks[:4, step : step + 4] = moving[: shape[0], : shape[1]]
        return blocks.repeat(8, 0).repeat(8, 1)[:side, :side].copy()

    return [
        {**{camera: picture(camera, step) for camera in robot.cameras}, robot.state_key: draw.uniform(low, high)}
        for step in range(number)
    ]
