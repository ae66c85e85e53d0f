"""The names of pruners, and the flag grammar `name:key=value,key=value`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prismatic.models.pruners.random import RandomTokens
from prismatic.models.token_pruner import KeepAllTokens, TokenPruner

NOISE_KINDS = ("uniform", "gumbel", "none")


@dataclass(frozen=True)
class PrunerSpec:
    """A pruner by name with its options, as flags and `config.json` carry it.

    Options of `lightvla`: `multiplicity` (weighted, set), `noise` (uniform, gumbel, none: training only),
    `min_tokens` (fewest tokens that stay). Options of `random`: `seed`, `multiplicity`, `min_tokens`.
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
            options[key.strip()] = _parse_value(value.strip())
        spec = cls(name, options)
        spec.check()
        return spec

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PrunerSpec":
        """From `config.json`'s `pruner` key."""
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
        if self.name not in _PRUNERS:
            raise ValueError(f"unknown pruner {self.name!r}; known: {', '.join(sorted(_PRUNERS))}")
        known = _PRUNERS[self.name][1]
        for key, value in self.options.items():
            if key not in known:
                raise ValueError(f"pruner {self.name!r} has no option {key!r}; it has: {', '.join(known) or 'none'}")
            if known[key] is None and not (type(value) is int and value >= 0):
                raise ValueError(f"pruner option {key}={value}: expected a whole number, 0 or more")
            if (allowed := known[key]) is not None and value not in allowed:
                raise ValueError(f"pruner option {key}={value} is not one of {', '.join(map(str, allowed))}")

    def build(self) -> nn.Module:
        """The pruner as a module."""
        return _PRUNERS[self.name][0](self.options)

    def following(self, recorded: Mapping[str, Any] | None) -> "PrunerSpec":
        """This pruner for inference, with what it must share with training taken from `config.json`'s `pruner`.

        Options given here win. Without a record tokens weigh as a set, which is what published checkpoints mean.
        """
        shared = {"multiplicity": "set"} | {key: value for key, value in (recorded or {}).items() if key in _SHARED}
        taken = {key: value for key, value in shared.items() if key in _PRUNERS[self.name][1]}
        return PrunerSpec(self.name, {**taken, **self.options})

    @property
    def noise(self) -> str:
        """The kind of noise on training scores."""
        return str(self.options.get("noise", "uniform")) if self.name == "lightvla" else "none"


def _parse_value(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if value.lstrip("-").isdigit() else value


def _lightvla(options: Mapping[str, Any]) -> nn.Module:
    return TokenPruner(options.get("multiplicity", "weighted"), min_tokens=options.get("min_tokens", 0))


def _random(options: Mapping[str, Any]) -> nn.Module:
    multiplicity = options.get("multiplicity", "weighted")
    return RandomTokens(options.get("seed", 0), multiplicity, options.get("min_tokens", 0))


_SHARED = ("multiplicity", "min_tokens")
_MULTIPLICITY = ("weighted", "set")
_PRUNERS: dict[str, tuple[Callable[[Mapping[str, Any]], nn.Module], dict[str, tuple[Any, ...] | None]]] = {
    "lightvla": (_lightvla, {"multiplicity": _MULTIPLICITY, "noise": NOISE_KINDS, "min_tokens": None}),
    "none": (lambda options: KeepAllTokens(), {}),
    "random": (_random, {"seed": None, "multiplicity": _MULTIPLICITY, "min_tokens": None}),
}
