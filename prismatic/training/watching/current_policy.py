"""The policy that a run has at the moment: its own parts and averaged weights, neither copied nor saved."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prismatic.inference.engine import Answer
from prismatic.models.batch import Call
from prismatic.policy import Policy
from prismatic.training.step import TrainableVLA, to_device

if TYPE_CHECKING:
    from prismatic.training.build import Run


@dataclass(frozen=True)
class TrainingEngine:
    """Answers by the modules that are being trained, in the precision that they are trained in."""

    module: TrainableVLA
    device: torch.device

    def answer(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        """As `Engine.answer`."""
        # What modules keep of a call, such as tables that they make once, must be of use in training.
        with torch.inference_mode(False):
            predicted, selection = self.module.predict(to_device(batch, self.device), call)
        return Answer(predicted, selection)

    def warming_up(self) -> AbstractContextManager[None]:
        """As `Engine.warming_up`."""
        return nullcontext()

    def describe(self) -> dict[str, Any]:
        """As `Engine.describe`."""
        return {"name": "training", "bf16": self.module.bf16}


def averaged(run: "Run") -> AbstractContextManager[None]:
    """Within the block the modules hold the averaged weights, where the run averages: those that are saved."""
    return run.training.average.applied() if run.training.average else nullcontext()


@contextmanager
def current_policy(run: "Run") -> Iterator[Policy]:
    """Within the block, what inference would be with the present weights, with the first dataset's statistics.

    Other datasets' are in its `norm_stats`; `Policy` makes another one of its `checkpoint` and `engine`.
    """
    config, checkpoint = run.config, run.training.checkpoint
    key = next(iter(run.data.statistics))
    transform = checkpoint.transform(key, center_crop=config.image_aug, use_proprio=config.use_proprio)
    with averaged(run):
        yield Policy(checkpoint, transform, key, TrainingEngine(run.module, run.ranks.device))
    run.module.train()
