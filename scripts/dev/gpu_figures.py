"""Figures of a check on a device: told line by line, kept for a JSON file; how to time calls and count their work."""

import gc
import importlib.util
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

WARM_UP = 3
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass
class Figure:
    """One value.

    Attributes:
        value: a number, a text or a list.
        unit: of the number.
        wanted: what the value must be, in words; empty where it is only told.
        ok: whether it is that; None where it is only told.
    """

    value: Any
    unit: str = ""
    wanted: str = ""
    ok: bool | None = None


@dataclass
class Section:
    """A part of the check, with its figures by name, the seconds it took and the tracebacks of its errors, if any."""

    name: str
    limit_s: float
    figures: dict[str, Figure] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    def tell(self, name: str, value: Any, unit: str = "", at_most: float | None = None) -> None:
        """Keep a figure and print it; with `at_most` it is a test, which NaN does not pass."""
        ok = None if at_most is None else bool(value <= at_most)
        self._keep(name, Figure(value, unit, "" if at_most is None else f"at most {at_most:g}", ok))

    def test(self, name: str, value: Any, wanted: str, ok: bool) -> None:
        """Keep and print a figure that is right or wrong."""
        self._keep(name, Figure(value, "", wanted, bool(ok)))

    def _keep(self, name: str, figure: Figure) -> None:
        self.figures[name] = figure
        value = f"{figure.value:.4g}" if isinstance(figure.value, float) else str(figure.value)
        verdict = {None: "", True: f"ok ({figure.wanted})", False: f"WRONG ({figure.wanted})"}[figure.ok]
        print(f"  {name:<58} {value} {figure.unit:<4} {verdict}".rstrip(), flush=True)

    def attempt(self, work: Callable[[], Any]) -> None:
        """Do a part of the section's work; an error of it is kept, and the section goes on."""
        try:
            work()
        except TimeoutError:
            raise
        except Exception:
            self.fail()

    def fail(self) -> None:
        """Keep and print the traceback of the error that is being handled."""
        found = traceback.format_exc()
        self.error = found if self.error is None else f"{self.error}\n{found}"
        print(found, flush=True)

    @property
    def wrong(self) -> list[str]:
        """Names of the figures that are not what they must be."""
        return [name for name, figure in self.figures.items() if figure.ok is False]

    def to_json(self) -> dict[str, Any]:
        """With the figures as plain data."""
        return asdict(self)


def run_section(section: Section, work: Callable[[Section], None]) -> None:
    """Do the section's work within its time; an error ends it alone, and its traceback is kept and printed."""
    print(f"{section.name} (at most {section.limit_s:.0f} s)", flush=True)
    began = time.perf_counter()
    try:
        with _limited(section.limit_s):
            work(section)
    except Exception:
        section.fail()
    section.seconds = time.perf_counter() - began
    free_memory()
    print(f"  {section.seconds:.1f} s", flush=True)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the block once the time is over, where the system has such alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"the section's {seconds:.0f} s are over; what is missing was not reached")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # again and again: torch's compiler takes an error for its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits(section: Section, name: str, work: Callable[[], None]) -> bool:
    """Whether the work found enough memory; tells where it did not."""
    try:
        work()
        return True
    except torch.cuda.OutOfMemoryError:
        pass  # the error holds the frames, and so the tensors, until it is left
    free_memory()
    section.tell(name, "out of memory")
    return False


def clock(work: Callable[[], Any], repeats: int, seconds: float = 4.0, warm_up: int = WARM_UP) -> list[float]:
    """Milliseconds of each call, sorted, until the GPU has done it too.

    Args:
        work: what to measure.
        repeats: calls that are measured; fewer, but three at least, where they take longer than `seconds`.
        seconds: see `repeats`.
        warm_up: calls before that do not count.
    """
    for _ in range(warm_up):
        work()
    times: list[float] = []
    synchronize()
    end = time.perf_counter() + seconds
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() < end):
        began = time.perf_counter()
        work()
        synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)


def quantile(ordered: list[float], share: float) -> float:
    """The value at that share of a sorted list."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def tell_times(section: Section, name: str, times: list[float]) -> float:
    """Tell the median and the 95 % quantile; returns the median."""
    section.tell(f"{name}, p50", quantile(times, 0.5), "ms")
    section.tell(f"{name}, p95", quantile(times, 0.95), "ms")
    return quantile(times, 0.5)


def tell_work(section: Section, name: str, work: Callable[[], Any]) -> None:
    """What one call gives a GPU to do and how often it waits for it. Nothing without one."""
    if not torch.cuda.is_available():
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events: Any = profile.events() or []
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in on_device if not event.name.startswith(("Memcpy", "Memset"))]
    section.tell(f"{name}, kernels", len(kernels))
    section.tell(f"{name}, device busy", sum(e.time_range.elapsed_us() for e in on_device) / 1e3, "ms")
    section.tell(f"{name}, copies to the host", sum("DtoH" in event.name for event in on_device))
    section.tell(f"{name}, kernel launches", sum(event.name in LAUNCHES for event in events))
    section.tell(f"{name}, runtime waits", sum(event.name in WAITS for event in events))
    by_kernel: Counter[str] = Counter()
    for event in kernels:
        by_kernel[event.name] += event.time_range.elapsed_us()
    longest = [f"{us / 1e3:.2f} ms {kernel[:90]}" for kernel, us in by_kernel.most_common(6)]
    section.tell(f"{name}, longest kernels", longest)


def tell_waits(section: Section, name: str, work: Callable[[], Any]) -> None:
    """Where in the code one call waits for a GPU, and how often. Nothing without one."""
    if not torch.cuda.is_available():
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    )
    section.tell(f"{name}, waits for the device", sum(places.values()))
    section.tell(f"{name}, places of the waits", [f"{place} x {times}" for place, times in places.most_common(12)])


def peak_gb(work: Callable[[], Any]) -> float:
    """The most GPU memory that tensors held during a call, in 10^9 bytes; without a GPU the process's peak so far."""
    if not torch.cuda.is_available():
        work()
        return resident_gb()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9


def resident_gb() -> float:
    """The most memory that this process has held, in 10^9 bytes; 0 on systems that do not tell."""
    if importlib.util.find_spec("resource") is None:
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def allocated_gb() -> float:
    """GPU memory that tensors hold now, in 10^9 bytes; 0 without a GPU."""
    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
