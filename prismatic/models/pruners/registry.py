"""The names of pruners, and the flag grammar `name:key=value,key=value`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from prismatic.models.pruners import (
    divprune,
    fastv,
    grid,
    grids,
    learnable_queries,
    random,
    static_reuse,
    text_similarity,
)
from prismatic.models.pruners.kind import MULTIPLICITY, NOISE, PrunerKind, Whole
from prismatic.models.sites import ModelSizes, Site
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner

_LIGHTVLA = PrunerKind(
    "lightvla",
    lambda options, sizes: TokenPruner(options["multiplicity"], min_tokens=options.get("min_tokens", 0)),
    {"multiplicity": MULTIPLICITY, "noise": NOISE, "min_tokens": Whole()},
    {"multiplicity": "weighted", "noise": "uniform"},
    trainable=True,
)
_NONE = PrunerKind("none", lambda options, sizes: KeepAllTokens(), trainable=True)
_MODULES = (learnable_queries, grids, random, grid, text_similarity, divprune, fastv, static_reuse)
"""Each declares its pruner as `KIND`."""
_PRUNERS = {kind.name: kind for kind in (_LIGHTVLA, _NONE, *(module.KIND for module in _MODULES))}

_SHARED = ("multiplicity", "site", "layer", "queries", "min_tokens", "tokens", "keep")
"""Options that inference must have as training had them."""
_PUBLISHED = {"multiplicity": "set"}
"""How checkpoints without a record are meant."""


@dataclass(frozen=True)
class PrunerSpec:
    """A pruner by name with its options, as flags and `config.json` carry it.

    Options of `lightvla`: `multiplicity` (weighted, set), `noise` (uniform, gumbel, none: training only),
    `min_tokens` (fewest tokens that stay). Each of the others says its options in its own module, as `KIND`; those that
    keep a given number of tokens call it `tokens`, or `keep` as a share of those there are.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "PrunerSpec":
        """From the flag grammar. Raises ValueError naming what was not understood and what is known."""
        name, _, rest = text.strip().partition(":")
        options = {}
        for item in filter(None, rest.split(",")):
            key, separator, value = item.partition("=")
            if not separator:
                raise ValueError(f"pruner option {item!r} in {text!r} has no value; write {name}:key=value,key=value")
            if (key := key.strip()) in options:
                raise ValueError(f"pruner option {key!r} stands twice in {text!r}; give it once")
            options[key] = _parse_value(value.strip())
        spec = cls(name, options)
        spec.check()
        return spec

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PrunerSpec":
        """From `config.json`'s `pruner` key. Raises ValueError for what is none."""
        if not isinstance(data, Mapping) or "name" not in data:
            raise ValueError(f"config.json: pruner {data!r} is no pruner; expected {{'name': 'lightvla'}} or no key")
        spec = cls(data["name"], {key: value for key, value in data.items() if key != "name"})
        spec.check()
        return spec

    def to_json(self) -> dict[str, Any]:
        """For `config.json`."""
        return {"name": self.name, **self.options}

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name

    def check(self) -> None:
        """Raises ValueError on an unknown name, option or value."""
        if not isinstance(self.name, str) or self.name not in _PRUNERS:
            raise ValueError(f"unknown pruner {self.name!r}; known: {', '.join(sorted(_PRUNERS))}")
        known = self._kind.choices
        for key, value in self.options.items():
            if key not in known:
                raise ValueError(f"pruner {self.name!r} has no option {key!r}; it has: {', '.join(known) or 'none'}")
            if (objection := known[key].objection(value)) is not None:
                raise ValueError(f"pruner option {key}={value}{objection}")
        if {"tokens", "keep"} <= set(self.options):
            raise ValueError(f"pruner {self}: tokens and keep say the same thing; give one of them")
        _ = self.site

    @property
    def _kind(self) -> PrunerKind:
        return _PRUNERS[self.name]

    @property
    def _complete(self) -> dict[str, Any]:
        return {**self._kind.defaults, **self.options}

    @property
    def site(self) -> Site:
        """Where it prunes. Raises ValueError for options that contradict each other."""
        return self._kind.site(self._complete)

    @property
    def has_parameters(self) -> bool:
        """Whether the pruner is trained itself, and so part of a checkpoint's weights."""
        return self._kind.parameters is not None

    @property
    def needs_sizes(self) -> bool:
        """Whether it depends on the model's sizes if the pruner fits, and how it is built."""
        return self._kind.check is not None

    @property
    def num_queries(self) -> int | None:
        """Number of learnable queries; None: every visual token is one, or the pruner knows no queries."""
        return int(self.option("queries")) if "queries" in self._kind.choices else None

    @property
    def parameters_text(self) -> str | None:
        """What the pruner trains: "128 queries"; None where it trains nothing."""
        return None if self._kind.parameters is None else "{} {}".format(*self._kind.parameters(self._complete))

    def tokens(self, num_visual: int) -> int | None:
        """How many of `num_visual` tokens stay, where the options alone say it. Raises ValueError where K is more."""
        return None if self._kind.tokens is None else self._kind.tokens(self._complete, num_visual)

    def shares_parameters(self, other: "PrunerSpec") -> bool:
        """Whether the other's parameters are meant for this one."""
        return self.parameters_text == other.parameters_text and (
            not self.has_parameters or (self.name, self.site) == (other.name, other.site)
        )

    def check_runs_beside(self, loaded: "PrunerSpec") -> None:
        """Raises ValueError where a policy that was loaded with the other pruner cannot be switched to this one."""
        if self.has_parameters and not self.shares_parameters(loaded):
            raise ValueError(
                f"pruner {self} needs trained parameters, but {loaded} was loaded; load a policy trained with it"
            )
        if self.name == "random" and "tokens" not in self.options and loaded.has_parameters:
            raise ValueError(
                f"pruner 'random' goes by what LightVLA would keep, which is no control for {loaded}; "
                "say a number: random:tokens=16"
            )

    def check_fits(self, sizes: ModelSizes) -> None:
        """Raises ValueError for a site that the model does not have, or for more tokens than there are."""
        try:
            if self._kind.check is not None:
                self._kind.check(self._complete, sizes)
        except ValueError as error:
            raise ValueError(f"pruner {self}: {error}") from error

    def build(self, sizes: ModelSizes | None = None) -> nn.Module:
        """The pruner as a module; parameters are new.

        Args:
            sizes: of the model, where the pruner needs them (`needs_sizes`).

        Raises ValueError where the pruner does not fit the model.
        """
        if sizes is not None:
            self.check_fits(sizes)
        elif self.needs_sizes:
            raise ValueError(f"pruner {self} depends on the model's sizes; build it with the model's sizes")
        return self._kind.build(self._complete, sizes)

    def over(self, options: Mapping[str, Any]) -> "PrunerSpec":
        """This pruner with further options where it says nothing itself; those that say one thing go together."""
        unsaid = {key: value for key, value in options.items() if key in self._kind.choices}
        for together in (("site", "layer"), ("tokens", "keep")):
            if any(key in self.options for key in together):
                unsaid = {key: value for key, value in unsaid.items() if key not in together}
        return PrunerSpec(self.name, {**unsaid, **self.options})

    @property
    def noise(self) -> str:
        """The kind of noise on training scores."""
        return str(self.option("noise", "none"))

    def option(self, key: str, otherwise: Any = 0) -> Any:
        """The value of an option, where it is not given the pruner's default, and `otherwise` where it has none."""
        return self._complete.get(key, otherwise)


def _parse_value(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if re.fullmatch(r"-?[0-9]{0,18}\.[0-9]{1,18}", value):
        return float(value)
    return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value


def as_spec(pruner: str | PrunerSpec | None) -> PrunerSpec | None:
    """From the flag grammar, or as it is. Raises ValueError for what is no pruner."""
    if pruner is None or isinstance(pruner, PrunerSpec):
        return pruner
    if not isinstance(pruner, str):
        raise ValueError(f"pruner {pruner!r}: expected a name with options, such as 'lightvla:multiplicity=set'")
    return PrunerSpec.parse(pruner)


def resolve_pruner(
    flag: str | PrunerSpec | None, recorded: Mapping[str, Any] | None, purpose: Literal["training", "inference"]
) -> PrunerSpec:
    """The pruner that runs: the flag's, else the recorded one, else LightVLA; options in the same order of precedence.

    Args:
        flag: what was asked for, in the flag grammar too.
        recorded: what `config.json` holds under `pruner`; None where it holds none, as in published checkpoints.
        purpose: in training everything follows the record of the same pruner, then the defaults here: a checkpoint
            without a record was trained weighted, so weighted is what training goes on with. In inference only what
            must be as in training follows it, and without a record tokens weigh as a set, which is what published
            checkpoints mean. The control `random` is a pruner for inference that follows LightVLA's record.

    Raises ValueError for what is no pruner, and for one that cannot be trained.
    """
    trained = PrunerSpec.from_json(recorded) if recorded is not None else None
    given = as_spec(flag)
    if purpose == "training":
        spec = given or trained or PrunerSpec("lightvla")
        kind = _PRUNERS[spec.name]
        if not kind.trainable:
            names = sorted(name for name, other in _PRUNERS.items() if other.trainable)
            raise ValueError(f"pruner {spec.name!r} is for evaluation; train with one of --pruner {', '.join(names)}")
        inherited = trained.options if trained is not None and trained.name == spec.name else {}
        return spec.over(PrunerSpec(spec.name, inherited).over(kind.defaults).options)
    if given is None:
        return trained or PrunerSpec("lightvla", dict(_PUBLISHED))
    # Settings of another kind mean nothing here.
    of_kind = trained.options if trained is not None and trained.has_parameters == given.has_parameters else {}
    return given.over(_PUBLISHED | {key: of_kind[key] for key in _SHARED if key in of_kind})
