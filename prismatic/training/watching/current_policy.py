"""The policy that a run has at the moment: its own parts and averaged weights, neither copied nor saved."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from prismatic.inference.engine import Answer
from prismatic.models.batch import Call
from prismatic.policy import Policy
from prismatic.training.distributed import Ranks
from prismatic.training.step import TrainableVLA, to_device

if TYPE_CHECKING:
    from prismatic.training.build import Run


@dataclass(frozen=True)
class TrainingEngine:
    """Answers by the modules that are being trained, in the precision that they are trained in.

    All processes compute every answer, since weights may be spread over them; the others `help_out`.
    """

    module: TrainableVLA
    ranks: Ranks

    def answer(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        """As `Engine.answer`, in the main process."""
        self.ranks.broadcast((dict(batch), call.seeds))
        return self._compute(batch, call)

    def help_out(self) -> None:
        """In the other processes: compute what the main one does, until it is `done`."""
        while (asked := self.ranks.broadcast(None)) is not None:
            batch, seeds = asked
            self._compute(batch, Call(seeds=seeds))

    def done(self) -> None:
        """In the main process: there is nothing more to answer."""
        self.ranks.broadcast(None)

    def _compute(self, batch: Mapping[str, torch.Tensor], call: Call) -> Answer:
        # What modules keep of a call, such as tables that they make once, must be of use in training.
        with torch.inference_mode(False):
            predicted, selection = self.module.predict(to_device(batch, self.ranks.device), call)
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
def current_policy(run: "Run") -> Iterator[Policy | None]:
    """Within the block, in the main process, what inference would be with the present weights and the statistics of the
    first dataset; every process must enter it, and the others get None once the main one has left it.

    Other datasets' statistics are in its `norm_stats`; `Policy` makes another one of its `checkpoint` and `engine`.
    """
    engine = TrainingEngine(run.module, run.ranks)
    with averaged(run):
        if not run.ranks.is_main:
            engine.help_out()
            yield None
            return
        config, checkpoint = run.config, run.training.checkpoint
        key = next(iter(run.data.statistics))
        transform = checkpoint.transform(key, center_crop=config.image_aug, use_proprio=config.use_proprio)
        try:
            yield Policy(checkpoint, transform, key, engine)
        finally:
            engine.done()
            run.module.train()
