"""Sizes that are prepared once, so that few shapes cover all that comes."""

from bisect import bisect_left
from dataclasses import dataclass

MULTIPLE = 16
"""Of sequence lengths: a mask's rows then need no padding of their own in fused attention."""


def round_up(number: int, multiple: int = MULTIPLE) -> int:
    """The next multiple that is not smaller."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Buckets:
    """Numbers of kept tokens that are prepared.

    Attributes:
        sizes: ascending; the last one is V. Empty: every number as it comes, and nothing is padded.
    """

    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, num_visual: int, batch: int) -> "Buckets":
        """For V tokens: fine steps where pruned policies lie, coarse ones above and for batches, which are rarer."""
        steps = (*range(16, 129, 16), *range(160, 257, 32)) if batch == 1 else range(64, 257, 64)
        return cls((*(step for step in steps if step < num_visual), num_visual))

    def fit(self, number: int) -> int:
        """The smallest prepared size that holds `number`."""
        return self.sizes[bisect_left(self.sizes, number)] if self.sizes else number

    def context_width(self, width: int) -> int:
        """Of the tokens behind the visual ones: with BOS a multiple of 16, so that every S is one."""
        return round_up(1 + width) - 1 if self.sizes else width

    def batch(self, size: int) -> int:
        """Rows that are prepared for so many: the next power of two."""
        return 1 << (size - 1).bit_length() if self.sizes else size
