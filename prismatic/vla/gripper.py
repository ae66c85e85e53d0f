"""How stored actions tell a gripper to open and close. Conventions differ by a sign, and no number proves which it is.

A policy's own gripper is 1 open, 0 closed.
"""

from dataclasses import dataclass

import numpy as np

_NEAR = 0.1  # share of the range: so close to one of its ends counts as there
_STILL = 0.01  # share of the range: who moves no more does not move
_BEYOND = 0.05  # share of the range by which stored values may lie outside of it


@dataclass(frozen=True)
class Gripper:
    """A convention of the gripper, the last value of an action. Called with actions it makes it 1 open, 0 closed.

    Attributes:
        name: as `Gripper.parse` takes it.
        closed: stored value of the closed gripper.
        open: stored value of the open one; what lies between is mapped linearly.
        opposite: where the stored values go on behind `open`, to here, and mean open still (LIBERO: -1).
    """

    name: str
    closed: float
    open: float
    opposite: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Gripper":
        """One of `GRIPPERS` by name, or `width:CLOSED,OPEN` with the stored values of both.

        Raises ValueError listing the choices.
        """
        if text in GRIPPERS:
            return GRIPPERS[text]
        kind, _, values = text.partition(":")
        try:
            closed, opened = (float(value) for value in values.split(","))
        except ValueError:
            closed = opened = float("nan")
        if kind != "width" or not np.isfinite([closed, opened]).all() or closed == opened:
            raise ValueError(f"--gripper {text!r}: expected {CHOICES}")
        return cls(text, closed, opened)

    @property
    def stored_range(self) -> tuple[float, float]:
        """Lowest and highest value that this convention stores."""
        ends = (self.closed, self.open if self.opposite is None else self.opposite)
        return min(ends), max(ends)

    def __call__(self, actions: np.ndarray) -> np.ndarray:
        """Stored (..., A) actions -> a float32 copy with the gripper in [0, 1], 1 open."""
        mapped = np.array(actions, dtype=np.float32)
        value = np.clip(mapped[..., -1], min(self.closed, self.open), max(self.closed, self.open))
        mapped[..., -1] = (self.closed - value) / np.float32(self.closed - self.open) + np.float32(0)  # no -0
        return mapped

    def reaches_both_ends(self, stored: np.ndarray) -> bool:
        """Whether (N,) stored values go from one end of the convention's range to the other, and not beyond."""
        low, high = self.stored_range
        near, beyond = _NEAR * (high - low), _BEYOND * (high - low)
        return bool(low - beyond <= stored.min() <= low + near and high - near <= stored.max() <= high + beyond)

    def check(self, stored: np.ndarray) -> str | None:
        """Compare (N,) stored values of a whole dataset with the convention.

        Returns:
            None where they reach both ends; a sentence where the gripper never moves, or a width stays inside.

        Raises:
            ValueError: a dataset of this convention holds no such values; says which it holds.
        """
        low, high = self.stored_range
        least, most = float(stored.min()), float(stored.max())
        span = high - low
        found = f"stored values run from {least:g} to {most:g}; {self.name!r} means {low:g} to {high:g}"
        if least < low - _BEYOND * span or most > high + _BEYOND * span:
            raise ValueError(f"{found}. {suggestion(stored)}")
        if self.reaches_both_ends(stored):
            return None
        still = most - least <= _STILL * span
        if not still and self.name in GRIPPERS:
            raise ValueError(f"{found}. {suggestion(stored)}")
        return f"{found}, so the policy learns {'one position' if still else 'a part'} of the gripper's range only"


GRIPPERS = {
    "libero": Gripper("libero", closed=1.0, open=0.0, opposite=-1.0),
    "open1": Gripper("open1", closed=0.0, open=1.0),
    "closed1": Gripper("closed1", closed=1.0, open=0.0),
}
"""Conventions by name. `libero` is the simulator's: -1 open, +1 closed, mapped to `1 - clip(a, 0, 1)` as published."""

CHOICES = (
    "libero (-1 open, +1 closed), open1 (1 open, 0 closed), closed1 (1 closed, 0 open) or width:CLOSED,OPEN (the "
    "stored values of both, such as width:0,0.08)"
)


def unsaid_gripper(actions: np.ndarray) -> np.ndarray:
    """For datasets of which nobody has said how they store the gripper. Raises ValueError with what could be meant."""
    stored = np.asarray(actions)[..., -1]
    raise ValueError(
        "nothing says how the gripper is stored, and a wrong guess opens it where it should close: the last value of "
        f"the actions runs from {stored.min():g} to {stored.max():g}. {suggestion(stored)}"
    )


def suggestion(stored: np.ndarray) -> str:
    """The flags that fit stored values, with what each means, as an imperative sentence."""
    least, most = float(stored.min()), float(stored.max())
    if least == most:
        return f"Pass --gripper with {CHOICES}"
    fitting = [name for name, gripper in GRIPPERS.items() if np.allclose(gripper.stored_range, (least, most), atol=0.1)]
    flags = [f"--gripper {name} where {GRIPPERS[name].closed:g} is closed" for name in fitting]
    ends = [(least, most), (most, least)]
    if fitting == ["libero"]:
        ends = ends[:1]  # the other one is libero's
    elif fitting:
        ends = []
    flags += [f"--gripper width:{closed:g},{opened:g} where {closed:g} is closed" for closed, opened in ends]
    return f"Pass {' or '.join(flags)} (in a DatasetSpec: map_actions=Gripper.parse('...'))"
