"""Whether a run is well: what every process watches, and what is done about values that are not finite."""

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from prismatic.checkpoints.saving import load_training_state
from prismatic.training.config import FinetuneConfig
from prismatic.training.data import Frames
from prismatic.training.distributed import Ranks
from prismatic.training.parallel.shards import own_part, total_norm
from prismatic.training.runs.saving import Saver

log = logging.getLogger(__name__)

ON_NAN = ("stop", "skip", "rollback")
"""What may be done about a loss or gradient that is not finite."""
MOST_SKIPPED = 10
"""Steps left out in a row. One bad batch, or a precision that overflows now and then, is over sooner; weights that are
spoilt never recover."""
MOST_ROLLBACKS = 3
"""Returns to the same checkpoint. Each meets other samples; where three fail, it is not the samples."""
NAMED = 8
"""Samples that an error names, of a batch that may hold hundreds."""

SPIKE_WINDOWS = 20
"""Windows of metrics whose median is what the loss usually is: 200 steps at the default `--log_freq`."""
SPIKE_LEAST = 10
"""A median of fewer says too little, and the loss still falls fast then."""
SPIKE_SPREADS = 8.0
"""Median absolute deviations; of a normal distribution one value in some ten million lies so far above its median."""

COLLAPSED_TOKENS = 4.0
"""Per sample, on average. Collapsed runs keep two or three; trained policies some 78 of 512 on LIBERO."""
COLLAPSED_LINES = 20
"""Lines of metrics in a row: a dip while the noise is strong passes sooner."""


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """() the norm of all gradients as one vector, on their device; what is not finite in one of them shows in it.

    All processes call it: where gradients are divided among them, it is that of the whole.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return total_norm(torch.nn.utils.get_total_norm([own_part(gradient) for gradient in gradients]), gradients[0])


class Health:
    """What is done about steps whose loss or gradient is not finite. Every process decides the same.

    Attributes:
        skipped: steps that were left out since the run was started or resumed.
        rollbacks: returns to a checkpoint since then.
    """

    def __init__(self, config: FinetuneConfig, ranks: Ranks, saver: Saver, frames: Frames):
        self.skipped = 0
        self.rollbacks = 0
        self._config = config
        self._ranks = ranks
        self._saver = saver
        self._training = saver.training
        self._frames = frames
        self._in_a_row = 0
        self._last_skipped = -1
        self._returns: Counter[int] = Counter()

    @property
    def facts(self) -> dict[str, int]:
        """What the metrics tell, where the flags ask for it."""
        counted = {"skip": {"skipped_steps": self.skipped}, "rollback": {"rollbacks": self.rollbacks}}
        return counted.get(self._config.on_nan, {})

    def treat(self, frames: Sequence[Sequence[int]], losses: Sequence[float], norm: float) -> bool:
        """Do what `--on_nan` says about the step that is being taken; its gradients are not applied.

        Every process calls it. After a rollback the run stands at its last checkpoint, but its position is behind the
        bad step, from where the batches go on.

        Args:
            frames: numbers of the training frames of each micro-step of this process.
            losses: of the micro-steps.
            norm: of the gradient.

        Returns:
            Whether the run was rolled back; else the step is skipped.

        Raises:
            FloatingPointError: the run stops: names step, samples, last checkpoint and remedies.
        """
        what = self._describe(frames, losses, norm)
        if self._config.on_nan == "skip":
            self._skip(what)
            return False
        if self._config.on_nan == "rollback":
            self._roll_back(what)
            return True
        raise self._stopped(what, "--on_nan skip leaves such steps out, --on_nan rollback goes on behind them")

    def _describe(self, frames: Sequence[Sequence[int]], losses: Sequence[float], norm: float) -> str:
        """The value that is not finite and the samples it is of: of the batches whose loss is not, else of all."""
        odd = [(loss, batch) for loss, batch in zip(losses, frames, strict=True) if not math.isfinite(loss)]
        suspects = [batch for _, batch in odd] or frames
        mine = [str(self._frames.place(index)) for batch in suspects for index in batch]
        found = self._ranks.gather((odd[0][0] if odd else None, mine))
        odd_losses = [loss for loss, _ in found if loss is not None]
        names = [name for loss, theirs in found for name in theirs if loss is not None or not odd_losses]
        value = f"the loss is {odd_losses[0]}" if odd_losses else f"the norm of the gradient is {norm}"
        others = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
        return f"{value} at step {self._training.step + 1}, for {', '.join(names[:NAMED])}{others}"

    def _skip(self, what: str) -> None:
        step = self._training.step
        self._in_a_row = self._in_a_row + 1 if self._last_skipped == step - 1 else 1
        if self._in_a_row > MOST_SKIPPED:
            raise self._stopped(
                what, f"{MOST_SKIPPED} steps before it were skipped, too, so more of that does not help"
            )
        self.skipped += 1
        self._last_skipped = step
        log.warning("skipped: %s", what)

    def _roll_back(self, what: str) -> None:
        training, config = self._training, self._config
        behind = training.position + config.samples_per_step(self._ranks.world_size)
        with self._ranks.together(OSError, FloatingPointError):
            self._saver.writer.wait()  # one may be being written
        folder = self._last_checkpoint()
        if folder is None:
            raise self._stopped(what, "--on_nan rollback needs one (--save_freq)")
        with self._ranks.together(ValueError, OSError):
            state = load_training_state(folder)
        self._returns[state["step"]] += 1
        if self._returns[state["step"]] > MOST_ROLLBACKS:
            raise self._stopped(what, f"{MOST_ROLLBACKS} returns to it have led to the like, so more do not help")
        training.load_state_dict(state)
        training.position = behind
        self.rollbacks += 1
        log.warning("rolled back: %s; going on from %s (step %d) behind these samples", what, folder, training.step)

    def _last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint of the run that is not ahead of it; what the main process finds holds for all."""
        saved = self._saver.folder.saved() if self._ranks.is_main else {}
        past = [folder for step, folder in saved.items() if step <= self._training.step]
        return self._ranks.gather(past[-1] if past else None)[0]

    def _stopped(self, what: str, more: str) -> FloatingPointError:
        self._saver.leave()  # one may be being written
        config, folder = self._config, self._last_checkpoint()
        place = "there is no checkpoint yet" if folder is None else f"the last checkpoint is {folder}"
        return FloatingPointError(
            f"{what}. Nothing of that step was applied or saved; {place}. Lower --learning_rate "
            f"({config.learning_rate}) or set --max_grad_norm 1, and go on with --resume True --run_id_override "
            f"{config.run_id}; or begin anew with --precision fp32; {more}"
        )


class SpikeDetector:
    """Flags a loss far above what it was of late.

    A spike is a loss of more than twice the median of the last `SPIKE_WINDOWS`, and more than `SPIKE_SPREADS` of their
    median absolute deviations above it: the first lets a run be whose loss hardly moves, the second one whose loss
    jumps anyway. After a lasting rise the median follows, and nothing more is flagged.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOWS)

    def usual(self, loss: float) -> float | None:
        """Take in the loss of a window: the median before it where it is a spike, else None."""
        recent = list(self._recent)
        self._recent.append(loss)
        if len(recent) < SPIKE_LEAST:
            return None
        middle = median(recent)
        spread = median(abs(value - middle) for value in recent)
        return middle if loss > max(2 * middle, middle + SPIKE_SPREADS * spread) else None


class CollapseDetector:
    """Says once that the pruner has kept fewer than `COLLAPSED_TOKENS` for `COLLAPSED_LINES` lines of metrics."""

    def __init__(self) -> None:
        self._lines = 0

    def has_collapsed(self, tokens_kept: float) -> bool:
        """Take in a line's mean of kept tokens; True at the line that completes the count."""
        if self._lines < COLLAPSED_LINES:
            self._lines = self._lines + 1 if tokens_kept < COLLAPSED_TOKENS else 0
            return self._lines == COLLAPSED_LINES
        return False


class Signs:
    """Reads the lines of metrics, and warns.

    Args:
        may_collapse: whether the pruner itself finds how many tokens stay.
    """

    def __init__(self, may_collapse: bool = True) -> None:
        self._may_collapse = may_collapse
        self._spikes = SpikeDetector()
        self._collapse = CollapseDetector()

    def read(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """What a line with `loss` and `tokens_kept` says further: `loss_spike`, 1 where its loss is one, and, in the
        line at which the pruner has collapsed, `collapsed`, 1."""
        if (usual := self._spikes.usual(values["loss"])) is not None:
            log.warning("step %d: the loss is %.4f, of late it was %.4f: a spike", step, values["loss"], usual)
        signs = {"loss_spike": 0.0 if usual is None else 1.0}
        if self._may_collapse and self._collapse.has_collapsed(values["tokens_kept"]):
            signs["collapsed"] = 1.0
            log.warning(
                "step %d: the pruner keeps %.1f tokens per sample, fewer than %g for %d lines of metrics: it has "
                "collapsed. Fine-tune with --pruner none first and prune from that checkpoint, lower --learning_rate, "
                "or set --pruner lightvla:min_tokens=20",
                step, values["tokens_kept"], COLLAPSED_TOKENS, COLLAPSED_LINES,
            )  # fmt: skip
        return signs
