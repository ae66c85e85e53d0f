"""The flags of `lightvla serve`, and what can be said against them without a model. Imports nothing heavy."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

CONVENTIONS = ("lightvla", "openpi")
OUT_OF_BOUNDS = ("flag", "clip", "allow")
LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
KEY_VARIABLE = "LIGHTVLA_API_KEY"
LEAST_KEY_LENGTH = 16
"""Characters of a key; shorter ones are guessed."""


@dataclass
class ServerConfig:
    """Serve a policy: openpi's WebSocket protocol, OpenVLA-OFT's POST /act, and a page on which to watch it."""

    # Policy
    pretrained_checkpoint: str = ""  # checkpoint folder or hub id
    unnorm_key: str | None = None  # dataset whose statistics apply; None: the only one
    pruner: str | None = None  # overrides the checkpoint's: `none`, `lightvla:multiplicity=set`
    action_readout: str | None = None  # aligned or tail; None: as the checkpoint says
    center_crop: bool | None = None  # central 0.9 of the area; None: where the policy was trained with augmentation
    action_head: str = "auto"  # l1, diffusion, discrete, autoregressive; auto: what the folder holds
    use_film: bool | None = None  # it was trained with FiLM; None: as the checkpoint says
    num_images_in_input: int | None = None  # cameras the policy reads; None: as the checkpoint says, else 2
    use_proprio: bool | None = None  # whether it reads the robot's state; None: where its projector's file is there
    load_in_8bit: bool = False  # quantize the language model, on a GPU with bitsandbytes
    load_in_4bit: bool = False  # the same, smaller
    load_in_fp8: bool = False  # the language model in fp8 by torchao: faster, on GPUs of compute capability 8.9 and up
    device: str = "auto"  # auto, cpu or cuda
    dtype: str | None = None  # bfloat16, float16, float32; None: bfloat16 on GPUs and CPUs that are faster in it
    engine: str = "auto"  # eager, compiled; auto: compiled where the policy allows it

    # Address
    host: str = "127.0.0.1"  # any other than this machine's own needs a key
    port: int = 8000  # 0: any free one, which the log names
    ssl_certfile: Path | None = None  # certificate (PEM), with --ssl_keyfile; None: without TLS
    ssl_keyfile: Path | None = None  # its private key; None: without TLS
    api_key_file: Path | None = None  # holds the key that clients must send; None: LIGHTVLA_API_KEY, if it is set
    allowed_hosts: str = ""  # names, with commas, by which clients may call beside --host, of a proxy for example

    # Protocol
    convention: str = "lightvla"  # lightvla or openpi: names and gripper on the WebSocket
    out_of_bounds: str = "flag"  # flag, clip or allow: actions outside the training data's bounds
    bounds_tolerance: float = 0.05  # share of a dimension's range by which an action may lie outside without a word

    # Batches and limits
    max_batch_size: int = 8  # requests that wait together are answered at once, at most so many
    batch_wait_ms: float = 2.0  # how long a request waits for others while other clients are connected
    max_queue: int = 64  # requests that may wait; others are refused
    max_connections: int = 128  # clients at once
    max_message_mb: float = 16.0  # of one request
    max_side: int = 4096  # pixels of a picture's longer side
    max_pixels: int = 4_000_000  # of one picture
    max_instruction_bytes: int = 2048  # in UTF-8
    max_rate: float = 100.0  # requests per second and client
    idle_s: float = 1800.0  # a connection that asks nothing for so long is closed
    shutdown_s: float = 30.0  # how long requests that were begun may take when the server is told to end

    # Watching
    record: Path | None = None  # folder for episode records of all that is answered; None: nothing is recorded
    page: bool = True  # whether GET / shows the page on which to watch
    log_format: str = "text"  # text, or json: an object a line
    log_level: str = "info"  # debug (a line per answer), info, warning or error


@dataclass(frozen=True)
class Secrets:
    """What the server keeps to itself: the key that clients must send, or None.

    Attributes:
        api_key: compared in constant time, and never logged.
    """

    api_key: str | None = None

    def __repr__(self) -> str:
        return f"Secrets(api_key={'set' if self.api_key else 'none'})"


def is_this_machine(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_secrets(config: ServerConfig) -> Secrets:
    """The key from its file, else from the environment; never from the command line, which every process can read.

    Raises:
        ValueError: for a file that cannot be read, a key that is too short or cannot stand in a header, and an address
            other than this machine's without one.
    """
    found, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
    if config.api_key_file is not None:
        where = f"--api_key_file {config.api_key_file}"
        try:
            found = config.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise ValueError(f"{where} cannot be read ({reason}); expected a file with the key") from error
        if not found:
            raise ValueError(f"{where} is empty; write a key of {LEAST_KEY_LENGTH} characters or more into it")
    if found:
        if len(found) < LEAST_KEY_LENGTH:
            raise ValueError(
                f"the key of {where} has {len(found)} characters; expected {LEAST_KEY_LENGTH} or more: make one by "
                "`python -c 'import secrets; print(secrets.token_urlsafe(32))'`"
            )
        if not (found.isascii() and found.isprintable()) or " " in found:
            raise ValueError(f"the key of {where} has characters other than printable ASCII without spaces")
        return Secrets(found)
    if not is_this_machine(config.host):
        raise ValueError(
            f"--host {config.host} can be reached from other machines, and there is no key: write one into a file for "
            f"--api_key_file, or set {KEY_VARIABLE}; or leave --host at 127.0.0.1"
        )
    return Secrets()


def check(config: ServerConfig) -> None:
    """What can be said against the flags before a port is taken and a model read.

    Raises ValueError naming the flag, its value and what was expected.
    """
    if not config.pretrained_checkpoint:
        raise ValueError("--pretrained_checkpoint is missing: give the folder or hub id of a policy")
    for flag, known in {
        "convention": CONVENTIONS,
        "out_of_bounds": OUT_OF_BOUNDS,
        "log_format": LOG_FORMATS,
        "log_level": LOG_LEVELS,
    }.items():
        if (word := getattr(config, flag)) not in known:
            raise ValueError(f"--{flag} {word}: expected one of {', '.join(known)}")
    if not 0 <= config.port <= 65535:
        raise ValueError(f"--port {config.port}: expected 0 to 65535")
    least = dict.fromkeys(("max_batch_size", "max_queue", "max_connections", "max_side", "max_pixels"), 1)
    for flag, number in {**least, "max_instruction_bytes": 1, "batch_wait_ms": 0, "bounds_tolerance": 0}.items():
        if not number <= (given := getattr(config, flag)) < float("inf"):
            raise ValueError(f"--{flag} {given}: expected a number from {number}")
    for flag in ("max_message_mb", "max_rate", "idle_s", "shutdown_s"):
        if not 0 < (given := getattr(config, flag)) < float("inf"):
            raise ValueError(f"--{flag} {given}: expected a number above 0")
    if config.record is not None and config.record.exists() and not config.record.is_dir():
        raise ValueError(f"--record {config.record}: there is a file of that name; expected a folder")
    check_certificate(config)


def check_certificate(config: ServerConfig) -> None:
    """Raises ValueError where certificate and key are not both there, cannot be read, or do not belong together."""
    certificate, key = config.ssl_certfile, config.ssl_keyfile
    if (certificate is None) != (key is None):
        given, lacking = ("ssl_certfile", "ssl_keyfile") if key is None else ("ssl_keyfile", "ssl_certfile")
        raise ValueError(
            f"--{given} {certificate or key} needs --{lacking} beside it: TLS takes a certificate and its key"
        )
    if certificate is None or key is None:
        return
    for flag, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        if not path.is_file():
            raise ValueError(f"--{flag} {path}: there is no such file")
    try:
        # An empty password instead of a prompt at the terminal, which a service has none of.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ValueError(
            f"--ssl_certfile {certificate} and --ssl_keyfile {key} cannot be used ({error}): expected a certificate "
            "and its own private key as PEM files, the key without a password"
        ) from error
