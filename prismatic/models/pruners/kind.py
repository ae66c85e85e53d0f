"""What a pruner's module tells the registry about it: its name, its options, its site, how it is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prismatic.models.sites import ModelSizes, Projector, Site

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Whole:
    """A whole number, at least so much."""

    at_least: int = 0

    def objection(self, value: Any) -> str | None:
        """What is wrong with a value, as the sentence goes on behind it; None where nothing is."""
        if type(value) is not int or value < 0:
            return f": expected a whole number, {self.at_least} or more"
        return None if value >= self.at_least else f": expected at least {self.at_least}"


@dataclass(frozen=True)
class Share:
    """A number above 0, up to 1."""

    def objection(self, value: Any) -> str | None:
        """As `Whole.objection`."""
        return None if type(value) in (int, float) and 0 < value <= 1 else ": expected a number above 0, up to 1"


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def objection(self, value: Any) -> str | None:
        """As `Whole.objection`."""
        return None if value in self.words else f" is not one of {', '.join(self.words)}"


Choice = Whole | Share | OneOf
NOISE_KINDS = ("uniform", "gumbel", "none")
NOISE = OneOf(NOISE_KINDS)
MULTIPLICITY = OneOf(("weighted", "set"))


class TrainedPruner(nn.Module):
    """A pruner with parameters of its own, which are part of a checkpoint's weights."""

    def reset_parameters(self) -> None:
        """New parameters, as training begins with them."""
        raise NotImplementedError


@dataclass(frozen=True)
class PrunerKind:
    """A pruner by its name. The options that its functions get are complete: `defaults` stand where nothing was said.

    Attributes:
        name: as flags and `config.json` call it.
        build: makes the module, of a model of those sizes; None where nobody knows them, for kinds that need none.
        choices: its options with the values that they may have.
        defaults: what holds, and what training records, where neither a flag nor the checkpoint says it.
        site: where it prunes. Raises ValueError for options that contradict each other.
        parameters: of a kind that is trained itself, how many of what it has: (128, "queries").
        trainable: whether a run may train with it; else it is for evaluation.
        check: raises ValueError where it does not fit a model; None: it fits all, and needs no sizes.
        tokens: how many of V visual tokens stay, where the options alone say it.
    """

    name: str
    build: Callable[[Options, ModelSizes | None], nn.Module]
    choices: Mapping[str, Choice] = field(default_factory=dict)
    defaults: Options = field(default_factory=dict)
    site: Callable[[Options], Site] = lambda options: Projector()
    parameters: Callable[[Options], tuple[int, str]] | None = None
    trainable: bool = False
    check: Callable[[Options, ModelSizes], None] | None = None
    tokens: Callable[[Options, int], int] | None = None
