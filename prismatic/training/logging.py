"""What a run tells while it runs: a progress bar, JSON lines, TensorBoard, a tracker, its report."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prismatic.atomic_files import write_atomically
from prismatic.pictures.images import Picture, encode_png
from prismatic.training.config import FinetuneConfig
from prismatic.training.distributed import Ranks
from prismatic.training.health import Signs
from prismatic.training.preemption import Preempted
from prismatic.training.runs.files import METRICS_FILE
from prismatic.training.runs.record import record_end
from prismatic.training.step import StepMetrics
from prismatic.training.telling.live import LiveReport
from prismatic.training.telling.peaks import peak_memory
from prismatic.training.telling.trackers import Trackio, Wandb
from prismatic.training.telling.values import Values, flat

log = logging.getLogger(__name__)

SAMPLED = "sampled_l1"
LINE_INTERVAL_S = 30.0
"""Without a terminal, a log line at most this often stands in for the bar."""


class Window:
    """Metrics of the micro-steps since the last flush. Nothing is copied from the device before that."""

    def __init__(self) -> None:
        self._pending: list[StepMetrics] = []

    def add(self, metrics: StepMetrics) -> None:
        """Take in one micro-step of this process."""
        self._pending.append(metrics)

    def clear(self) -> None:
        """Forget what was taken in since the last flush."""
        self._pending = []

    def flush(self, ranks: Ranks) -> Values:
        """Means over all micro-steps, samples and processes since the last flush; every process must call it.

        Nothing where there was none, as after skipped steps.

        Keys: `loss`, `l1_current`, `l1_next`, `tokens_kept` (per sample; also `_min`, `_max`), `tokens_kept_per_image`
        (list in camera order), `host_peak_gb` and, on a GPU, `device_peak_gb`: the most memory that any process has
        held since it began.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return {}
        kept = torch.cat([metrics.kept for metrics in pending]).float()
        scalars = [
            torch.stack([torch.stack((m.loss, m.current_l1, m.next_l1)) for m in pending]).mean(0),
            kept.mean(0),
        ]
        per_sample = kept.sum(1)
        mean = ranks.mean(torch.cat(scalars)).tolist()
        memory = peak_memory(ranks.device)
        highest = torch.cat((torch.stack((-per_sample.min(), per_sample.max())), kept.new_tensor([*memory.values()])))
        low, high, *peaks = ranks.max(highest).tolist()
        return {
            "loss": mean[0],
            "l1_current": mean[1],
            "l1_next": mean[2],
            "tokens_kept": sum(mean[3:]),
            "tokens_kept_min": -low,
            "tokens_kept_max": high,
            "tokens_kept_per_image": mean[3:],
            **dict(zip(memory, peaks, strict=True)),
        }


class Sink(Protocol):
    """Takes named values of a step."""

    def write(self, step: int, values: Mapping[str, Any]) -> None: ...

    def write_picture(self, step: int, name: str, picture: Picture) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one object per line. Lines behind `resume_step` (of a run that went further) are dropped."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        self._open(resume_step)

    def _open(self, step: int) -> None:
        kept = []
        if step and self._path.exists():
            for number, line in enumerate(self._path.read_text(errors="replace").splitlines(), 1):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(f"{line}\n")
                except (ValueError, TypeError, KeyError):  # the last one of a killed run, or somebody's edit
                    log.warning("%s, line %d, holds no step, and is dropped", self._path, number)
        write_atomically(self._path, "".join(kept))
        self._file = self._path.open("a", buffering=1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def write_picture(self, step: int, name: str, picture: Picture) -> None:
        """Nothing: lines hold numbers."""

    def rewind(self, step: int) -> None:
        """Drop the lines behind `step`, whose successors are taken again."""
        self._file.close()
        self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Scalars for TensorBoard.

    The event file is written record by record: torch's own writer imports TensorFlow wherever that is installed.
    """

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._write(file_version="brain.Event:2")
        if resume_step:
            self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """TensorBoard drops what was told of steps behind `step`, by an earlier, longer run or before a rollback."""
        self._write(step=step + 1, session_log=self._start)

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add every value as a scalar."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in flat(values).items()]
        self._write(step=step, summary=self._summary(value=scalars))

    def write_picture(self, step: int, name: str, picture: Picture) -> None:
        """Add the picture, uint8 (H, W, 3), as a PNG."""
        height, width, channels = picture.shape
        content = encode_png(picture, optimize=False)
        image = self._summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def close(self) -> None:
        """Close the file."""
        self._records.close()


def make_sinks(config: FinetuneConfig, resume_step: int) -> list[tuple[int, Sink]]:
    """The sinks of the main process with how often (in steps) each is written."""
    sinks: list[tuple[int, Sink]] = [(config.log_freq, JsonLines(config.run_dir / METRICS_FILE, resume_step))]
    directory = config.tensorboard_log_dir or config.run_dir / "tensorboard"
    try:
        sinks.append((config.tensorboard_log_freq, TensorBoard(directory, resume_step)))
    except ImportError:
        log.warning("tensorboard is not installed, so no curves are written for it: pip install 'lightvla[train]'")
    if config.tracking == "wandb":
        sinks.append((config.wandb_log_freq, Wandb(config, resume_step)))
    if config.tracking == "trackio":
        sinks.append((config.wandb_log_freq, Trackio(config, resume_step)))
    return sinks


class RunLog:
    """Collects the metrics of every step and passes them on when they are due.

    Used as a context manager; every process makes one, the main process writes. `may_collapse` as in `Signs`.
    """

    def __init__(self, config: FinetuneConfig, ranks: Ranks, start_step: int, may_collapse: bool = True) -> None:
        self.config = config
        self.ranks = ranks
        frequencies = {config.log_freq, config.tensorboard_log_freq}
        frequencies |= {config.wandb_log_freq} if config.tracking != "none" else set()
        self._windows = {frequency: Window() for frequency in sorted(frequencies)}
        self._sinks = make_sinks(config, start_step) if ranks.is_main else []
        self._report = LiveReport(config.run_dir, config.report_minutes) if ranks.is_main else None
        self._step = start_step
        self._signs = Signs(may_collapse)
        self._started = dict.fromkeys(self._windows, (start_step, time.perf_counter()))
        self._waited = dict.fromkeys(self._windows, 0.0)
        self._sampled: dict[int, float] = {}
        self._last_line = 0.0
        self._bar = Progress(
            TextColumn("fine-tuning"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=get_console(),
            refresh_per_second=4,
            expand=True,
            disable=not (ranks.is_main and get_console().is_terminal),
        )
        self._task = self._bar.add_task("fine-tuning", total=config.max_steps, completed=start_step, told="starting")

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        for _, sink in self._sinks:
            try:
                sink.close()
            except OSError as problem:  # a full disk, which ended the run; the others are to be closed, too
                log.warning("what was told last may be missing in %s: %s", type(sink).__name__, problem)
        if self._report is not None:
            try:
                record_end(self.config.run_dir, self._step, *_ending(error))
            except (OSError, ValueError) as problem:  # what ended the run comes first
                log.warning("how the run ended is not written down: %s", problem)
            self._report.close()

    def add(self, metrics: StepMetrics, waited: float) -> None:
        """Take in one micro-step, which waited that many seconds for its data."""
        for frequency, window in self._windows.items():
            window.add(metrics)
            self._waited[frequency] += waited

    def step(self, step: int, facts: Mapping[str, Any]) -> None:
        """Finish step `step` (1, 2, ...); `facts` (numbers, or tensors of one) are told along with the metrics.

        `sampled_l1`, which few steps have, is told with the next line.
        """
        self._step = step
        facts = dict(facts)
        if (sampled := facts.pop(SAMPLED, None)) is not None:
            self._sampled = dict.fromkeys(self._windows, float(sampled))
        self._bar.update(self._task, completed=step)
        last = step == self.config.max_steps
        due = [frequency for frequency in self._windows if step % frequency == 0 or step == 1 or last]
        for frequency in due:
            values = self._windows[frequency].flush(self.ranks) | {name: float(fact) for name, fact in facts.items()}
            values |= self._speed(frequency, step)
            if frequency in self._sampled:
                values[SAMPLED] = self._sampled.pop(frequency)
            if frequency == self.config.log_freq and "loss" in values:
                values |= self._signs.read(step, values)
            for sink_frequency, sink in self._sinks:
                if sink_frequency == frequency:
                    sink.write(step, values)
            if frequency == self.config.log_freq and "loss" in values:
                self._tell(step, values, force=last)
        if self._report is not None and self.config.log_freq in due:
            self._report.write()

    def rewind(self, step: int) -> None:
        """Go on as if behind finished step `step`; what was told of later ones is dropped."""
        for window in self._windows.values():
            window.clear()
        self._started = dict.fromkeys(self._windows, (step, time.perf_counter()))
        self._waited = dict.fromkeys(self._windows, 0.0)
        self._step = step
        self._bar.update(self._task, completed=step)
        for _, sink in self._sinks:
            sink.rewind(step)

    def _speed(self, frequency: int, step: int) -> Values:
        """Seconds per step and samples per second since the last call for this frequency."""
        began, since = self._started[frequency]
        now, steps = time.perf_counter(), step - began
        step_time = (now - since) / steps
        values = {
            "step_time_s": step_time,
            "data_wait_s": self._waited[frequency] / steps,
            "samples_per_s": self.config.samples_per_step(self.ranks.world_size) / step_time,
        }
        self._started[frequency], self._waited[frequency] = (step, now), 0.0
        return values

    def _tell(self, step: int, values: Values, force: bool) -> None:
        told = (
            f"loss {values['loss']:.4f}  tokens {values['tokens_kept']:.1f}  lr {values['learning_rate']:.1e}  "
            f"{values['samples_per_s']:.0f} samples/s"
        )
        self._bar.update(self._task, told=told)
        now = time.perf_counter()
        if self.ranks.is_main and self._bar.disable and (force or now - self._last_line > LINE_INTERVAL_S):
            self._last_line = now
            left = (self.config.max_steps - step) * values["step_time_s"]
            log.info("step %d/%d  %s  %.0f s left", step, self.config.max_steps, told, left)

    def validation(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the result of a validation after step `step`, under names that begin with `val_`."""
        named = {f"val_{name}": value for name, value in values.items()}
        for _, sink in self._sinks:
            sink.write(step, named)
        if self.ranks.is_main:
            log.info("step %d  validation loss %.4f  tokens %.1f", step, values["loss"], values["tokens_kept"])

    def values(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what was found out apart from training, such as a success rate, to every sink."""
        for _, sink in self._sinks:
            sink.write(step, values)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """Hand a picture, uint8 (H, W, 3), to the sinks that show pictures."""
        for _, sink in self._sinks:
            sink.write_picture(step, name, picture)

    def exclude(self, seconds: float) -> None:
        """Do not count `seconds` (of validating, drawing or saving) as time of steps."""
        self._started = {key: (step, since + seconds) for key, (step, since) in self._started.items()}


def _ending(error: BaseException | None) -> tuple[str, str]:
    """How a run has ended, and the words for it, as `record_end` takes them."""
    if error is None:
        return "finished", ""
    if isinstance(error, Preempted):
        return "preempted", error.signal
    if isinstance(error, KeyboardInterrupt):
        return "preempted", "SIGINT"
    expected = isinstance(error, ValueError | OSError | FloatingPointError)
    return "error", str(error) if expected else f"{type(error).__name__}: {error}"
