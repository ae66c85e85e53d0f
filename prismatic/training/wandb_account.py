"""Whether Weights & Biases can be written to, found out before anything long; and flags that say nothing without it."""

import importlib.util
import netrc
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_SHORTEST_KEY = 40
_REMEDY = "run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and send the run later by `wandb sync`"


def check_wandb(flag: str = "--use_wandb True") -> None:
    """Weights & Biases can be written to by the process that logs. Asks no question and no server.

    Args:
        flag: what asks for it.

    Raises:
        ValueError: when the package is missing, or there is no login and the mode needs one.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"{flag} needs wandb: pip install 'lightvla[train]'")
    if os.environ.get("RANK", "0") != "0":
        return
    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in _MODES:
        raise ValueError(f"{flag}: WANDB_MODE={mode!r} is unknown; unset it, or choose of {', '.join(_MODES)}")
    import wandb

    try:
        settings = wandb.setup().settings
    except Exception as error:  # another variable, or a settings file, holds what it may not
        words = " ".join(str(error).split())
        raise ValueError(f"{flag}: the settings of Weights & Biases cannot be read: {words}") from error
    key = os.environ.get("WANDB_API_KEY") or settings.api_key
    if settings.mode in _WITHOUT_ACCOUNT or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    if key and len(key.rpartition("-")[2]) < _SHORTEST_KEY and key.count(".") != 2:
        raise ValueError(
            f"{flag}: the API key in WANDB_API_KEY has {len(key)} characters; expected at least "
            f"{_SHORTEST_KEY}; {_REMEDY}"
        )
    if not key and not _has_netrc_login(settings.base_url):
        raise ValueError(f"{flag}: nobody is logged in to Weights & Biases here; {_REMEDY}")


def _has_netrc_login(base_url: str) -> bool:
    """Whether `wandb login` has left a key for the server."""
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in filter(Path.is_file, (Path(os.path.expanduser(name)) for name in files)):
        try:
            entries = netrc.netrc(file)
        except (netrc.NetrcParseError, OSError):
            continue
        server = urlsplit(base_url).netloc
        hosts = _HOSTS if server in _HOSTS else (server,)  # one service under an old and a new name
        if any(host in entries.hosts for host in hosts):
            return True
    return False


def without_effect(config: Any) -> Sequence[str]:
    """What to say of flags about Weights & Biases that were given without a tracker that heeds them."""
    given = [
        f"--{field.name}"
        for field in fields(config)
        if field.name.startswith("wandb_") and getattr(config, field.name) != field.default
    ]
    if not given or config.tracking != "none":
        return []
    return [f"{', '.join(given)} without --use_wandb True: nothing is logged to Weights & Biases"]
