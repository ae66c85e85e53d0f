"""What policies are called in tables, verdicts and reports: as a person would write it.

A checkpoint of the hub is its id and revision, never the place in a cache that it was downloaded to; one of this
machine the end of its path.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from experiments.robot.libero.results.results import Results
from experiments.robot.libero.settings.controls import TOKEN_CONTROLS

REVISION_DIGITS = 7
"""As many digits of a revision as the hub and git show."""

_SAYS_NOTHING = re.compile(
    r"(latest|last|best|final|checkpoints?|ckpts?|chkpts?|models?|merged|weights|policy|pretrained_model)"
    r"([-_.]?\d+)?|step[-_]?\d+|\d+",
    re.IGNORECASE,
)
"""Names of folders that are the same in many runs: the folder above says more."""

_KINDS = ("8bit", "4bit", "fp8")
_SELDOM_SAID = ("read-out", "quantization", "head", "dtype", "crop", "images")


def hub_name(path: str) -> str | None:
    """`user/name@abc1234` for a folder in a cache of the hub, `.../models--user--name/snapshots/HASH`; else None."""
    return _hub_name(path, REVISION_DIGITS)


def _hub_name(path: str, digits: int) -> str | None:
    parts = PurePath(path).parts
    for place, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[place + 1] == "snapshots":
            name = f"{'/'.join(part.split('--')[1:])}@{parts[place + 2][:digits]}"
            return "/".join([name, *parts[place + 3 :]])
    return None


def checkpoint_name(path: str) -> str:
    """A checkpoint's short name: of the hub with its revision, else the last folder, or two where one says nothing."""
    if (name := hub_name(path)) is not None:
        return name
    parts = [part for part in PurePath(path).parts if part not in ("/", ".", "..")]
    while len(parts) > 2 and all(_SAYS_NOTHING.fullmatch(part) for part in parts[-2:]):
        del parts[-2]  # RUN/checkpoints/latest: the run's name is further up
    return "/".join(parts[-2:] if parts and _SAYS_NOTHING.fullmatch(parts[-1]) else parts[-1:]) or path


def policy_name(policy: Mapping[str, Any]) -> str:
    """The short name of a described policy (`Results.policy`): its checkpoint's, or the address of its server."""
    checkpoint = policy.get("checkpoint")
    return checkpoint_name(str(checkpoint)) if checkpoint else str(policy.get("policy_url") or "an unnamed policy")


def policy_names(results: Sequence[Results]) -> list[str]:
    """A short name for the policy of each: its checkpoint or server, pruner (LightVLA's unsaid) and control.

    Where different policies would share a name it says what tells them apart: where their checkpoints lie, the pruner's
    options, the read-out, the precision, the action head. Results that even so have one name are one policy's.
    """
    facts = [_identity(result) for result in results]
    short = [_name(own, own["place"]) for own in facts]
    found = []
    for own, name in zip(facts, short, strict=True):
        namesakes = [other for other, others in zip(facts, short, strict=True) if others == name]
        differing = [part for part in own if len({other[part] for other in namesakes}) > 1]
        places = list(dict.fromkeys(other["place"] for other in namesakes))
        found.append(_name(own, own["place"], differing, places))
    return found


def distinct_names(sides: Sequence[Sequence[Results]], paths: Sequence[Sequence[str]]) -> list[str]:
    """A name for each side: its policy's, or where those are equal the folder of its first file."""
    names = policy_names([side[0] for side in sides])
    if len(set(names)) == len(names):
        return names
    folders = [Path(files[0]).resolve() for files in paths]
    names = [(folder if folder.is_dir() else folder.parent).name for folder in folders]
    return names if len(set(names)) == len(names) else ["first", "second"]


def _identity(result: Results) -> dict[str, str]:
    """What makes a policy this one, as text."""
    policy, config = result.policy, result.config
    checkpoint = policy.get("checkpoint")
    control = str(config.get("control") or "none")
    pruner, _, options = str(policy.get("pruner") or "lightvla").partition(":")
    # The seed of such a control is the evaluation's: several of them are runs of one policy.
    kept = [option for option in options.split(",") if control not in TOKEN_CONTROLS or not option.startswith("seed=")]
    steps = policy.get("num_diffusion_steps_inference") or config.get("num_diffusion_steps_inference")
    denoising = f"with {steps} denoising steps" if policy.get("action_head") == "diffusion" else ""
    return {
        "place": _place(checkpoint) if checkpoint else str(policy.get("policy_url") or "policy"),
        "pruner": ":".join(filter(None, (pruner, ",".join(kept)))),
        "read-out": f"{policy.get('action_readout') or 'unknown'} read-out",
        "quantization": next(
            (kind for kind in ("8bit", "4bit", "fp8") if config.get(f"load_in_{kind}")), "not quantized"
        ),
        "head": " ".join(filter(None, (f"{policy.get('action_head') or 'unknown'} head", denoising))),
        "dtype": str(policy.get("dtype") or "unknown dtype"),
        "crop": "centre crop" if policy.get("center_crop") else "no centre crop",
        "images": f"images per policy query: {policy.get('num_images') or 'unknown'}",
        "control": control,
    }


def _name(identity: Mapping[str, str], place: str, in_full: Collection[str] = (), namesakes: Sequence[str] = ()) -> str:
    """`small`, `small (random tokens)`: not `small, random tokens`, which in a sentence would be two."""
    pruner, control = identity["pruner"], identity["control"]
    short = pruner.partition(":")[0]
    said = [short] if short != "lightvla" and control not in TOKEN_CONTROLS else []
    name = _apart(place, namesakes) if "place" in in_full else _place_name(place)
    particulars = [
        *([pruner] if "pruner" in in_full else said),
        *(identity[part] for part in _SELDOM_SAID if part in in_full),
        *([control.replace("_", " ")] if control != "none" else []),
    ]
    return f"{name} ({', '.join(particulars)})" if particulars else name


def _place(checkpoint: str) -> str:
    """Where a checkpoint lies; of the hub its id and whole revision, wherever the cache is."""
    return _hub_name(checkpoint, 40) or str(PurePath(checkpoint))


def _place_name(place: str) -> str:
    name, at, revision = place.partition("@")
    if at and len(revision.partition("/")[0]) == 40:
        return f"{name}@{revision[:REVISION_DIGITS]}{revision[40:]}"
    return place.partition("://")[2] or checkpoint_name(place)


def _apart(place: str, namesakes: Sequence[str]) -> str:
    """At most two parts of a path that tell it from its namesakes: the last, and the lowest that does, `a/…/small`."""
    if "://" in place or _place_name(place) != checkpoint_name(place):
        return place
    parts, others = PurePath(place).parts, [PurePath(other).parts for other in namesakes if other != place]
    for back in range(2, len(parts) + 1):
        if all(len(other) < back or other[-back] != parts[-back] for other in others):
            return f"{parts[-back]}/{'…/' * (back > 2)}{parts[-1]}"
    return place
