"""How the end effector moved in a rollout: jerk, which tells a shaky success from a smooth one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def rms_jerk(positions: ArrayLike, rate_hz: float) -> float | None:
    """Root mean square of the jerk, the third derivative of a position, in m/s^3.

    With p_0 .. p_T the positions after each control step and h = 1 / rate, jerk is the third difference

        j_k = (p_{k+3} - 3 p_{k+2} + 3 p_{k+1} - p_k) / h^3,   RMS = sqrt(mean_k |j_k|^2)

    Minimum jerk as the measure of smooth movement of a hand: Flash and Hogan, "The coordination of arm movements" (J.
    Neuroscience 5, 1985). The positions are those that the arm reached, not those that were commanded: the controller
    clips and filters commands, and what wears a robot out is how it moves.

    Args:
        positions: (T + 1, 3) of the end effector in metres, the first one before the first action.
        rate_hz: control steps per second.

    Returns:
        None for fewer than four positions.
    """
    third = np.diff(np.asarray(positions, np.float64), n=3, axis=0) * rate_hz**3
    return float(np.sqrt((third**2).sum(axis=1).mean())) if len(third) else None
