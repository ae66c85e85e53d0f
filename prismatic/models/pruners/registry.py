"""The names of pruners, and the flag grammar `name:key=value,key=value`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from prismatic.models.pruners.learnable_queries import LearnableQueries
from prismatic.models.pruners.random import RandomTokens
from prismatic.models.sites import LlamaLayer, ModelSizes, Projector, Site, VisionBlock, check_site, site_width
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner

NOISE_KINDS = ("uniform", "gumbel", "none")
STAR = "lightvla_star"


@dataclass(frozen=True)
class PrunerSpec:
    """A pruner by name with its options, as flags and `config.json` carry it.

    Options of `lightvla`: `multiplicity` (weighted, set), `noise` (uniform, gumbel, none: training only),
    `min_tokens` (fewest tokens that stay). Options of `random`: `seed`, `multiplicity`, `min_tokens`. Options of
    `lightvla_star`: `site` (projector, or vision and llama with their `layer`), `queries`, `noise`, `min_tokens`.
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
        known = _PRUNERS[self.name].choices
        for key, value in self.options.items():
            if key not in known:
                raise ValueError(f"pruner {self.name!r} has no option {key!r}; it has: {', '.join(known) or 'none'}")
            if known[key] is None and not (type(value) is int and value >= 0):
                raise ValueError(f"pruner option {key}={value}: expected a whole number, 0 or more")
            if (allowed := known[key]) is not None and value not in allowed:
                raise ValueError(f"pruner option {key}={value} is not one of {', '.join(map(str, allowed))}")
        if self.options.get("queries") == 0:
            raise ValueError("pruner option queries=0: expected at least 1")
        _ = self.site

    @property
    def site(self) -> Site:
        """Where it prunes. Raises ValueError for a site without its layer, or a layer without its site."""
        site, layer = self.option("site", "projector"), self.options.get("layer")
        if site == "projector":
            if layer is not None:
                raise ValueError(f"pruner option layer={layer}: give the site too, site=vision or site=llama")
            return Projector()
        if layer is None:
            raise ValueError(f"pruner option site={site}: give the layer too, site={site},layer=2")
        return VisionBlock(layer) if site == "vision" else LlamaLayer(layer)

    @property
    def has_parameters(self) -> bool:
        """Whether the pruner is trained itself, and so part of a checkpoint's weights."""
        return self.name == STAR

    @property
    def num_queries(self) -> int | None:
        """Number of learnable queries; None: every visual token is one."""
        return int(self.option("queries")) if self.name == STAR else None

    def shares_parameters(self, other: "PrunerSpec") -> bool:
        """Whether the other's parameters are meant for this one."""
        ours, theirs = (spec.has_parameters and (spec.site, spec.num_queries) for spec in (self, other))
        return ours == theirs

    def check_fits(self, sizes: ModelSizes) -> None:
        """Raises ValueError for a site that the model does not have, or for more queries than visual tokens."""
        try:
            check_site(self.site, sizes)
        except ValueError as error:
            raise ValueError(f"pruner {self}: {error}") from error
        if self.num_queries is not None and self.num_queries > sizes.num_visual:
            raise ValueError(
                f"pruner {self}: {self.num_queries} queries cannot pick more than the {sizes.num_visual} visual tokens "
                f"there are; set queries={sizes.num_visual} or fewer"
            )

    def build(self, sizes: ModelSizes | None = None) -> nn.Module:
        """The pruner as a module; parameters are new.

        Args:
            sizes: of the model, which a pruner with parameters needs.

        Raises ValueError where the pruner does not fit the model.
        """
        if sizes is not None:
            self.check_fits(sizes)
        elif self.has_parameters:
            raise ValueError(f"pruner {self} has parameters; build it with the model's sizes")
        return _PRUNERS[self.name].build(self, sizes)

    def over(self, options: Mapping[str, Any]) -> "PrunerSpec":
        """This pruner with further options where it says nothing itself; site and layer go together."""
        unsaid = {key: value for key, value in options.items() if key in _PRUNERS[self.name].choices}
        if "site" in self.options:
            unsaid = {key: value for key, value in unsaid.items() if key not in ("site", "layer")}
        return PrunerSpec(self.name, {**unsaid, **self.options})

    @property
    def noise(self) -> str:
        """The kind of noise on training scores."""
        return str(self.option("noise", "none"))

    def option(self, key: str, otherwise: Any = 0) -> Any:
        """The value of an option, where it is not given the pruner's default, and `otherwise` where it has none."""
        return self.options.get(key, _PRUNERS[self.name].defaults.get(key, otherwise))


def _parse_value(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if re.fullmatch(r"-?[0-9]{1,18}", value) else value


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
    given = PrunerSpec.parse(flag) if isinstance(flag, str) else flag
    if purpose == "training":
        spec = given or trained or PrunerSpec("lightvla")
        if spec.name == "random":
            raise ValueError(
                "pruner 'random' is a control for evaluation; train with --pruner lightvla or --pruner none"
            )
        inherited = trained.options if trained is not None and trained.name == spec.name else {}
        return spec.over(PrunerSpec(spec.name, inherited).over(_PRUNERS[spec.name].defaults).options)
    if given is None:
        return trained or PrunerSpec("lightvla", dict(_PUBLISHED))
    # Settings of another kind mean nothing here.
    of_kind = trained.options if trained is not None and trained.has_parameters == given.has_parameters else {}
    return given.over(_PUBLISHED | {key: of_kind[key] for key in _SHARED if key in of_kind})


def _lightvla(spec: PrunerSpec, sizes: ModelSizes | None) -> nn.Module:
    return TokenPruner(spec.option("multiplicity"), min_tokens=spec.option("min_tokens"))


def _random(spec: PrunerSpec, sizes: ModelSizes | None) -> nn.Module:
    return RandomTokens(spec.option("seed"), spec.option("multiplicity"), spec.option("min_tokens"))


def _star(spec: PrunerSpec, sizes: ModelSizes | None) -> nn.Module:
    assert sizes is not None and spec.num_queries is not None
    return LearnableQueries(spec.site, spec.num_queries, site_width(spec.site, sizes), spec.option("min_tokens"))


@dataclass(frozen=True)
class _Kind:
    """A pruner's name stands for this.

    Attributes:
        build: makes the module.
        choices: its options with the values they may have; None: whole numbers.
        defaults: what training records where neither a flag nor the checkpoint says it.
    """

    build: Callable[[PrunerSpec, ModelSizes | None], nn.Module]
    choices: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_SHARED = ("multiplicity", "site", "layer", "queries", "min_tokens")
"""Options that inference must have as training had them."""
_PUBLISHED = {"multiplicity": "set"}
"""How checkpoints without a record are meant."""
_MULTIPLICITY = ("weighted", "set")
_SITES = ("projector", "vision", "llama")
_PRUNERS = {
    "lightvla": _Kind(
        _lightvla,
        {"multiplicity": _MULTIPLICITY, "noise": NOISE_KINDS, "min_tokens": None},
        {"multiplicity": "weighted", "noise": "uniform"},
    ),
    STAR: _Kind(
        _star,
        {"site": _SITES, "layer": None, "queries": None, "noise": NOISE_KINDS, "min_tokens": None},
        {"site": "projector", "queries": 128, "min_tokens": 0, "noise": "uniform"},
    ),
    "none": _Kind(lambda spec, sizes: KeepAllTokens()),
    "random": _Kind(
        _random,
        {"seed": None, "multiplicity": _MULTIPLICITY, "min_tokens": None},
        {"seed": 0, "multiplicity": "weighted"},
    ),
}
