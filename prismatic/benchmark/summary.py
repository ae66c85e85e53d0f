"""What the table says of an arm: medians, quantiles, ratios with their intervals, share of the floor, agreement."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from prismatic.benchmark.accounting import agree, floor_seconds
from prismatic.benchmark.measure import Measured

_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: of medians, with a bootstrapped 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high == 1:
            return "1"
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio_of(slower: Sequence[float], faster: Sequence[float], seed: int = 0) -> Ratio:
    """Median of `slower` over that of `faster`.

    The times of one round stand at one place of both and are drawn together, so that what else the machine did in a
    round does not widen the interval.

    Args:
        slower: seconds of each round.
        faster: of the same rounds.
        seed: of the draws.
    """
    a, b = np.asarray(slower, float), np.asarray(faster, float)
    rounds = np.random.default_rng(seed).integers(len(a), size=(_RESAMPLES, len(a)))
    drawn = np.median(a[rounds], 1) / np.median(b[rounds], 1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


@dataclass(frozen=True)
class Summary:
    """A row.

    Attributes:
        measured: what it is of.
        p50, p95: seconds of the model's part of a call, from prepared inputs to actions on the CPU.
        fastest: seconds of the quickest call, which a busy machine changes least.
        computing: median seconds that the process's threads computed in a whole call.
        computing_than_first_engine, computing_than_first_arm: as the two ratios below, of `computing`.
        preparing: median seconds of making the inputs.
        kept: visual tokens, fewest and most over the calls.
        tokens_set: whether their number was given.
        than_first_engine: how many times as fast as the command's first engine at equal pruner, dtype and threads;
            None where that does not run this pruner.
        than_first_arm: as the first engine with the first pruner, at equal dtype and threads.
        flops, flops_counted: by the formula, and by torch's counter; None where it sees nothing, inside CUDA graphs.
        weight_bytes: that an action reads.
        floor: seconds in which the device could compute the action.
        memory: bytes at the peak, or None.
        cold: seconds from process start to first action by part, medians, or None.
        off: largest difference of actions from the first engine's, in the robot's units, or None.
    """

    measured: Measured
    p50: float
    p95: float
    fastest: float
    computing: float
    computing_than_first_engine: Ratio | None
    computing_than_first_arm: Ratio
    preparing: float
    kept: tuple[int, int]
    tokens_set: bool
    than_first_engine: Ratio | None
    than_first_arm: Ratio
    flops: int
    flops_counted: int | None
    weight_bytes: int
    floor: float
    memory: int | None
    cold: dict[str, float] | None
    off: float | None

    @property
    def counter_agrees(self) -> bool:
        """Whether formula and counter tell the same work; true where nothing could be counted."""
        return self.flops_counted is None or agree(self.flops, self.flops_counted)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what `Measured` holds already."""
        ratios = {name: value for name, value in self.__dict__.items() if "than_first" in name}
        plain = {name: value for name, value in self.__dict__.items() if name not in ("measured", *ratios)}
        return {
            **plain,
            **{name: None if ratio is None else ratio.__dict__ for name, ratio in ratios.items()},
            "counter_agrees": self.counter_agrees,
            "share_of_floor": self.floor / self.p50,
        }


def seconds_of(measured: Measured, stage: str = "model") -> list[float]:
    """Of each call."""
    return [call["seconds"][stage] for call in measured.calls]


def summarize(found: Sequence[Measured], tokens: int) -> list[Summary]:
    """A row per arm, in order; `tokens` as the flag."""
    return [_summary(each, found, tokens) for each in found]


def _summary(each: Measured, found: Sequence[Measured], tokens: int) -> Summary:
    setting = each.arm.setting
    group = [m for m in found if (m.arm.setting.threads, m.arm.setting.dtype) == (setting.threads, setting.dtype)]
    engine = found[0].arm.setting.engine
    same = next((m for m in group if (m.arm.place, m.arm.setting.engine) == (each.arm.place, engine)), None)
    times, kept = seconds_of(each), [call["kept"] for call in each.calls]
    account = each.account
    floor = floor_seconds(
        account["flops_needed"], account["weight_bytes_needed"], each.ceilings["flops"], each.ceilings["bytes"]
    )
    return Summary(
        each,
        p50=median(times),
        p95=float(np.quantile(times, 0.95)),
        fastest=min(times),
        computing=median(seconds_of(each, "cpu")),
        computing_than_first_engine=ratio_of(seconds_of(same, "cpu"), seconds_of(each, "cpu")) if same else None,
        computing_than_first_arm=ratio_of(seconds_of(group[0], "cpu"), seconds_of(each, "cpu")),
        preparing=median(seconds_of(each, "preprocessing")),
        kept=(min(kept), max(kept)),
        tokens_set=bool(tokens) and each.arm.pruner.partition(":")[0] == "lightvla",
        than_first_engine=ratio_of(seconds_of(same), times) if same else None,
        than_first_arm=ratio_of(seconds_of(group[0]), times),
        flops=sum(account["flops"].values()),
        flops_counted=account["flops_counted"],
        weight_bytes=sum(account["weight_bytes"].values()),
        floor=floor,
        memory=int(median(m["peak"] for m in each.memory)) if each.memory else None,
        cold={name: median(c[name] for c in each.cold) for name in each.cold[0]} if each.cold else None,
        off=_difference(each, same) if same else None,
    )


def _difference(ours: Measured, theirs: Measured) -> float:
    """The largest of their actions, over all calls."""
    pairs = zip(ours.calls, theirs.calls, strict=True)
    return float(max(np.abs(np.subtract(a["actions"], b["actions"])).max() for a, b in pairs))
