"""The loop: batches to steps, steps to metrics, validations and checkpoints."""

import errno
import itertools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import draccus
import torch
from torch.nn.parallel import DistributedDataParallel

from prismatic.atomic_files import write_atomically
from prismatic.command_line import named_by_node, speaks_for_node
from prismatic.training.build import Run, agreed_resumption, build, check_finished, open_run
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import ElsewhereError
from prismatic.training.distributed import ranks as join_ranks
from prismatic.training.heads import diffusion_draws
from prismatic.training.health import gradient_norm
from prismatic.training.loading import TooManyBadSamples, num_val_batches, train_batches, val_batches
from prismatic.training.logging import RunLog
from prismatic.training.preemption import Preempted
from prismatic.training.preflight import preflight
from prismatic.training.pruning import score_noise
from prismatic.training.runs.folder import RunFolder
from prismatic.training.runs.record import record_start
from prismatic.training.runs.resuming import find_resumption
from prismatic.training.schedules import noise_scale
from prismatic.training.step import StepMetrics, learning_rate, seed_dropout, to_device
from prismatic.training.telling.values import Named, Values
from prismatic.training.watching.watch import Callback, Watch
from prismatic.vla.datasets.stored.episode import UnreadableImage

log = logging.getLogger(__name__)


class BadInput(ValueError):
    """Flags, a checkpoint or data that cannot be trained with; the message says what to change.

    Attributes:
        others_wait: this process has found that by itself; those on other nodes know nothing of it (`withdraw`).
    """

    def __init__(self, message: str, others_wait: bool = False) -> None:
        super().__init__(message)
        self.others_wait = others_wait


def finetune(config: FinetuneConfig, callbacks: Sequence[Callback] = ()) -> Path | None:
    """Fine-tune as the flags say; every process of a `torchrun` calls this.

    Args:
        config: the flags.
        callbacks: called between steps, with the policy as it is.

    Returns:
        The folder of the last checkpoint; None after a dry run.

    Raises:
        BadInput: before the first step, for whatever is wrong with flags, checkpoint, data or folders; later, for more
            stored pictures that cannot be decoded than the flags allow, and a checkpoint that cannot be written.
        FloatingPointError: for a loss or gradient that is not finite, where the flags do not say to go on, and for
            such a weight.
        Preempted: when a signal asked the run to end, and it has saved.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    try:
        preflight(config)
    except (ValueError, OSError) as error:
        raise BadInput(named_by_node(str(error)), others_wait=True) from error
    with join_ranks(config.device, timedelta(minutes=config.save_timeout_minutes)) as ranks, ExitStack() as stack:
        try:
            with ranks.together(ValueError, OSError):  # all have passed their checks
                if ranks.is_main and not config.dry_run:
                    stack.enter_context(RunFolder(config.run_dir).held())
            if config.dry_run:
                open_run(config, ranks, find_resumption(config, ranks.world_size))
                return None
            resumption = agreed_resumption(config, ranks)
            if resumption is not None and resumption.finished:
                check_finished(config, ranks, resumption)
                log.info("the run is finished: %s", resumption.folder)
                return resumption.folder
            run = build(config, ranks, resumption)
            if resumption is not None:
                resumption.release()
                if ranks.is_main:
                    RunFolder(config.run_dir).go_back_to(resumption.step)
        except (ValueError, OSError) as error:
            raise BadInput(named_by_node(str(error))) from error
        except ElsewhereError as error:  # names its node itself
            raise BadInput(str(error)) from error
        try:
            return train(run, callbacks)
        except OSError as error:
            raise BadInput(named_by_node(_told(error, config))) from error


def train(run: Run, callbacks: Sequence[Callback] = ()) -> Path:
    """Run all steps that are left; returns the folder of the last checkpoint. Raises as `finetune`."""
    config, training = run.config, run.training
    if run.ranks.is_main:
        write_atomically(config.run_dir / "finetune.yaml", str(draccus.dump(config)))
        place = (run.ranks.world_size, run.ranks.device.type)
        record_start(config, training.facts, run.data.robot, training.step, *place, run.changes)
        count = sum(parameter.numel() for parameter in training.trained.values())
        precision = "bf16" if run.module.bf16 else "fp32"
        log.info("training %.2f M parameters on %d x %s in %s", count / 1e6, *place, precision)
    model = training.checkpoint.model
    fixed_number = model.config.pruner_spec.tokens(model.num_visual_tokens)
    with RunLog(config, run.ranks, training.step, may_collapse=fixed_number is None) as run_log:
        try:
            # Closed at once, with the processes that read, which else live until the error is forgotten.
            with run.stop.listening(), closing(train_batches(run)) as batches:
                return _train(run, run_log, batches, callbacks)
        except UnreadableImage as error:
            raise _end(run, error) from error
        except ElsewhereError as error:
            raise BadInput(str(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise _end(run, error, "Its memory may not have sufficed: pass a smaller --num_workers") from error
        finally:
            run.saver.leave()


def _train(run: Run, run_log: RunLog, batches: Iterator[dict[str, Any]], callbacks: Sequence[Callback]) -> Path:
    config, training, saver = run.config, run.training, run.saver
    began = time.perf_counter()
    watch = Watch(run, run_log, callbacks)
    run_log.exclude(time.perf_counter() - began)
    batches = settled_buckets(run, batches)
    stopped = False
    while training.step < config.max_steps and not stopped:
        facts = train_step(run, batches, run_log)
        run_log.step(training.step, facts)
        began = time.perf_counter()
        last = training.step == config.max_steps
        due = run.ranks.is_main and saver.is_due(training.step)
        stopped, due, failed = run.ranks.any([run.stop.signal is not None, due, saver.failed])
        saves = due or last or stopped or failed
        validates = training.step % config.val_freq == 0 or last or (saves and config.keep_best)
        loss = None
        if run.val_data is not None and validates and not stopped:
            values, stopped = validate(run)
            if not stopped:
                loss = values.get("loss")
                run_log.validation(training.step, values)
            saves = saves or stopped
        if saves:
            saver.save(loss, wait=last or stopped)
        if not stopped:
            watch.look()
        run_log.exclude(time.perf_counter() - began)
    if stopped and training.step < config.max_steps:
        raise Preempted(_first_signal(run), training.step)
    return config.checkpoint_dir(training.step)


def _first_signal(run: Run) -> str:
    """The name of the signal that the first of the processes that were asked got."""
    return next(filter(None, run.ranks.gather(run.stop.signal)))


def _told(error: OSError, config: FinetuneConfig) -> str:
    """What the file system said, with what to do where it was said without a word more."""
    if error.errno == errno.ENOSPC and "disk is full" not in str(error):
        return f"the disk of {config.run_dir} is full ({error}); make room there, and the same command goes on"
    return str(error)


def _end(
    run: Run, error: Exception, remedy: str = "Write it again; --resume True then goes on from the last checkpoint"
) -> BadInput:
    """What is left to do and say where pictures cannot be read: the steps taken are saved, where all processes end."""
    all_end = run.ranks.world_size == 1 or isinstance(error, TooManyBadSamples)
    if all_end and run.training.step > 0:
        run.saver.save(wait=True)
    words = named_by_node(f"{error}. {remedy}")
    if not all_end and not speaks_for_node():
        log.error("%s", words)  # the others have met no such picture
    return BadInput(words)


def settled_buckets(run: Run, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same batches, behind a pass forward and back that changes nothing, where several processes train.

    Behind its first one DistributedDataParallel lays gradients out anew, in the order in which they come; and what more
    than two processes add up is rounded by its place. So every start would have one step that another had not.
    """
    if not isinstance(run.parallel, DistributedDataParallel):
        return batches
    run.module.train()
    first = next(batches)
    draws = diffusion_draws(run.module.action_head, run.config.seed, first["positions"])
    loss, _ = run.parallel(to_device({**first, **draws}, run.ranks.device))
    loss.backward()
    run.training.optimizer.zero_grad(set_to_none=True)
    return itertools.chain([first], batches)


def train_step(run: Run, batches: Iterator[dict[str, Any]], run_log: RunLog) -> dict[str, Any]:
    """One optimiser step over `grad_accumulation_steps` micro-batches; returns the facts to tell.

    Where `--on_nan rollback` undoes steps, the step is the first one behind the checkpoint.

    Raises:
        FloatingPointError: the loss or gradient is not finite; all processes raise it, nothing of the step is applied.
        TooManyBadSamples: likewise, for pictures that cannot be decoded.
    """
    while (facts := _try_step(run, batches, run_log)) is None:
        run_log.rewind(run.training.step)
    return facts


def _try_step(run: Run, batches: Iterator[dict[str, Any]], run_log: RunLog) -> dict[str, Any] | None:
    """As `train_step`; None after a rollback."""
    config, training, optimizer = run.config, run.training, run.training.optimizer
    run.module.train()
    schedule_steps = training.facts.schedule_steps
    rate = learning_rate(config, training.step, schedule_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    scale = noise_scale(training.step, schedule_steps, config.noise_end_fraction, config.noise_schedule)
    micro_steps = [_micro_step(run, batches, scale, number) for number in range(config.grad_accumulation_steps)]
    norm = gradient_norm(training.trained.values())
    *losses, length = torch.stack([*(step.metrics.loss.float() for step in micro_steps), norm]).tolist()
    is_odd = not all(map(math.isfinite, (*losses, length)))
    any_odd, any_unreadable = run.ranks.any([is_odd, run.bad_samples.are_new])
    if any_unreadable:
        run.bad_samples.settle()
    facts: dict[str, Any] = {"learning_rate": rate, "noise_scale": scale if run.noise != "none" else 0.0}
    if any_odd:
        optimizer.zero_grad(set_to_none=True)
        if run.health.treat([step.frames for step in micro_steps], losses, length):
            return None
    else:
        facts["grad_norm"] = length
        for step in micro_steps:
            run_log.add(step.metrics, step.waited)
        if config.use_diffusion and (training.step == 0 or (training.step + 1) % config.diffusion_sample_freq == 0):
            assert micro_steps[-1].batch is not None
            facts["sampled_l1"] = run.module.sampled_l1(micro_steps[-1].batch)
        _update(run, norm)
    training.step += 1
    training.position += config.samples_per_step(run.ranks.world_size)
    if training.average is not None and not any_odd:
        training.average.update(training.step)
    return facts | {"bad_samples": len(run.bad_samples), **run.health.facts}


@dataclass(frozen=True)
class _MicroStep:
    """What one micro-step leaves behind besides gradients.

    Attributes:
        frames: numbers of its training frames.
        metrics: of its batch.
        waited: seconds that it waited for data.
        batch: of the last micro-step of a step; the others' are let go.
    """

    frames: list[int]
    metrics: StepMetrics
    waited: float
    batch: dict[str, Any] | None


def _micro_step(run: Run, batches: Iterator[dict[str, Any]], scale: float, number: int) -> _MicroStep:
    """Add the gradients of the next batch."""
    config, model = run.config, run.training.checkpoint.model
    began = time.perf_counter()
    batch = next(batches)
    queries = model.config.pruner_spec.num_queries
    noise = score_noise(run.noise, config.seed, batch["positions"], model.num_visual_tokens, scale, queries)
    batch |= diffusion_draws(run.module.action_head, config.seed, batch["positions"])
    waited = time.perf_counter() - began
    batch = to_device(batch, run.ranks.device)
    noise = None if noise is None else noise.to(run.ranks.device, non_blocking=True)
    seed_dropout(config.seed, run.training.step, number, run.ranks.rank)
    is_last = number == config.grad_accumulation_steps - 1
    # Gradients are exchanged once per optimiser step.
    with run.parallel.no_sync() if isinstance(run.parallel, DistributedDataParallel) and not is_last else nullcontext():
        loss, metrics = run.parallel(batch, noise)
        (loss / config.grad_accumulation_steps).backward()
    return _MicroStep(batch["indices"], metrics, waited, batch if is_last else None)


def _update(run: Run, norm: torch.Tensor) -> None:
    """Apply the gradients, whose norm is `norm`."""
    if run.config.max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(run.training.trained.values(), run.config.max_grad_norm, norm)
    run.training.optimizer.step()
    run.training.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validate(run: Run) -> tuple[Values, bool]:
    """Means over the held-out frames, as inference computes: the centre of the pictures where training crops at random,
    no noise, no straight-through rows, averaged weights.

    Every process takes its share, and all stop when one has computed for `val_time_limit` seconds or was asked to end.

    Returns:
        `loss`, `l1_current`, `l1_next`, `tokens_kept`, `frames`, and the L1 of every action dimension (lists) over the
        chunk, `l1_dimensions`, and in its first action, `l1_current_dimensions`; whether a process was asked to end.
    """
    assert run.val_data is not None
    deadline = time.monotonic() + run.config.val_time_limit
    names = run.data.robot.action_names
    total = torch.zeros(5 + 2 * len(names), dtype=torch.float64, device=run.ranks.device)
    average = run.training.average
    stopped = False
    run.module.eval()
    batches, own = val_batches(run, run.val_data)
    with average.applied() if average else nullcontext():
        for number in range(num_val_batches(run, run.val_data)):
            batch = next(batches, None)
            if batch is not None:
                batch |= diffusion_draws(run.module.action_head, run.config.seed, batch["positions"])
                _, metrics = run.module(to_device(batch, run.ranks.device))
                frames = len(batch["positions"]) if number < own else 0
                kept = metrics.kept.sum(1).double().mean()
                means = torch.stack([metrics.loss, metrics.current_l1, metrics.next_l1, kept, torch.ones_like(kept)])
                total += torch.cat([means, metrics.l1_dimensions.flatten()]).double() * frames
            late, stopped = run.ranks.any([time.monotonic() > deadline, run.stop.signal is not None])
            if late or stopped:
                break
    run.module.train()
    (any_unreadable,) = run.ranks.any([run.bad_samples.are_new])
    if any_unreadable:
        run.bad_samples.settle()
    total = run.ranks.sum(total)
    frames_seen = float(total[4])
    loss, l1_current, l1_next, tokens_kept, _, *l1 = (total / frames_seen).tolist()
    values = {"loss": loss, "l1_current": l1_current, "l1_next": l1_next, "tokens_kept": tokens_kept}
    first, others = l1[: len(names)], l1[len(names) :]
    length = run.data.robot.chunk_length
    whole = [(one + (length - 1) * other) / length for one, other in zip(first, others, strict=True)]
    by_name = {"l1_dimensions": Named(names, whole), "l1_current_dimensions": Named(names, first)}
    return {**values, "frames": frames_seen, **by_name}, stopped
