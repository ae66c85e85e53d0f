"""What can be said against the demo's flags at its start, by the names that they have here."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.robot.libero.evaluation.checks import MAX_RESOLUTION, MAX_SEED
from experiments.robot.libero.settings.flags import parse_indices
from experiments.robot.libero.simulator.renderer import MIN_RESOLUTION
from experiments.robot.libero.simulator.surroundings import is_writable
from lightvla.demo.settings import STAGES, TASKS, DemoConfig

_STATES = 50
"""Initial states that LIBERO has of each task."""
_WIDEST_M = 0.3
"""As far as `Displacement` moves anything."""


@dataclass(frozen=True)
class _Expected:
    """What a flag's value must be, in words and as a question."""

    words: str
    holds: Callable[[Any], bool]


def _number(low: float, high: float, words: str | None = None) -> _Expected:
    said = words or (f"{low} to {high}" if math.isfinite(high) else f"{low} or more")
    return _Expected(said, lambda value: low <= value <= high)


def _demos(text: str) -> bool:
    words = text.split(",")
    return len(words) in (1, len(TASKS.split(","))) and all(w.strip().isdigit() and int(w) > 0 for w in words)


_COUNT = _number(1, math.inf)
_SEED = _number(0, MAX_SEED)
_EXPECTED = {
    "stage": _Expected(f"one of all, {', '.join(STAGES)}", lambda stage: stage in ("all", *STAGES)),
    "num_processes": _COUNT,
    "num_demos_per_task": _Expected("a number from 1 on, or three of them joined by commas, one for each task", _demos),
    "wide_starts_m": _Expected(f"more than 0, up to {_WIDEST_M}", lambda value: 0 < value <= _WIDEST_M),
    "wide_starts_train_m": _number(0, _WIDEST_M, f"0 (standard starts alone) to {_WIDEST_M}"),
    "wide_starts_share": _number(0, 1),
    "resolution": _number(MIN_RESOLUTION, MAX_RESOLUTION),
    "unpruned_steps": _COUNT,
    "max_steps": _COUNT,
    "batch_size": _COUNT,
    "seed": _SEED,
    "starts_seed": _SEED,
    "suffix": _Expected(
        "letters, digits, - and _ (a part of folders' names)", lambda s: bool(re.fullmatch(r"[\w-]*", s))
    ),
}
"""By flag; the others are looked at below."""


def check_flags(config: DemoConfig) -> None:
    """Raises ValueError naming the flag, its value and what was expected."""
    for flag, expected in _EXPECTED.items():
        if not expected.holds(value := getattr(config, flag)):
            raise ValueError(f"--{flag} {value}: expected {expected.words}")
    train, held_out = (_states(getattr(config, flag), flag) for flag in ("train_states", "held_out_states"))
    if both := sorted(set(train) & set(held_out)):
        raise ValueError(
            f"--held_out_states {config.held_out_states} and --train_states {config.train_states} share state "
            f"{both[0]}; held-out states are those that are not trained on, choose others"
        )
    if not is_writable(config.output_dir):
        raise ValueError(f"--output_dir {config.output_dir}: no folder that can be written; choose another")


def _states(text: str, flag: str) -> list[int]:
    states = parse_indices(text, flag)
    if max(states) >= _STATES:
        raise ValueError(f"--{flag} {text}: LIBERO's tasks have initial states 0 to {_STATES - 1}")
    return states
