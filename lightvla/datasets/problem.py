"""What is said of something wrong with a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass

from lightvla.datasets.reading import Place


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        name: of the problem, two or three words.
        found: what, with numbers and the first place.
        meaning: for a policy that is trained on it.
        remedy: what to do.
        places: some episodes and steps where it is to be seen.
    """

    name: str
    found: str
    meaning: str
    remedy: str
    places: Sequence[Place] = ()
