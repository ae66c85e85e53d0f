"""Serve a policy: openpi's WebSocket protocol, OpenVLA-OFT's POST /act, metrics, a page to watch.

    lightvla serve --pretrained_checkpoint runs/my-run--10000_chkpt
    lightvla serve --pretrained_checkpoint FOLDER --host 0.0.0.0 --api_key_file key.txt

What can be said against the flags is said before the model is read, and the address is taken then, too; it can be
connected to when the policy is warm. Ends with 0 behind SIGTERM and 130 behind Ctrl+C, when what was begun is answered;
with 2 where flags, address or checkpoint cannot be used.
"""

import logging
import signal
import socket
import tempfile
from pathlib import Path

from fastapi import APIRouter

from experiments.robot.libero.results.provenance import collect_versions
from prismatic.command_status import STOPPED, UNUSABLE, print_error
from prismatic.models.precision import check_device
from prismatic.models.quantization import KINDS, check_quantization
from prismatic.policy import Policy
from prismatic.recordings.served import ServerRecorder, facts_of, one_moment
from prismatic.serving.logs import set_up_logging
from prismatic.serving.page.live import LiveFeed
from prismatic.serving.page.routes import page_router
from prismatic.serving.server.application import build_application
from prismatic.serving.server.events import Watcher
from prismatic.serving.server.run import PolicyServer, take_address
from prismatic.serving.server.served import ServedPolicy
from prismatic.serving.settings import Secrets, ServerConfig, check, read_secrets

logger = logging.getLogger(__name__)


def command(config: ServerConfig) -> int:
    """What the command line runs; returns the exit status."""
    try:
        check(config)
        set_up_logging(config.log_format, config.log_level)
        secrets = read_secrets(config)
        _check_folder(config.record)
        with take_address(config) as bound:
            server = _build(config, secrets, bound)
            ended_by = server.serve_forever()
    except (ValueError, OSError, RuntimeError) as error:
        print_error(error)
        return UNUSABLE
    except KeyboardInterrupt:
        print_error("stopped before it served")
        return STOPPED
    return STOPPED if ended_by == signal.SIGINT else 0


def _check_folder(folder: Path | None) -> None:
    """Makes the records' folder. Raises ValueError where that, or writing there, cannot be done."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--record {folder} cannot be written to ({error.strerror or error}); give another folder"
        ) from error


def load_policy(config: ServerConfig) -> Policy:
    """The policy that the flags name.

    Raises FileNotFoundError, ValueError as `Policy.from_pretrained`, and where flags contradict each other.
    """
    return Policy.from_pretrained(
        config.pretrained_checkpoint,
        device=check_device(config.device),
        dtype=config.dtype,
        unnorm_key=config.unnorm_key,
        pruner=config.pruner,
        action_readout=config.action_readout,
        center_crop=config.center_crop,
        engine=config.engine,
        num_images_in_input=config.num_images_in_input,
        use_proprio=config.use_proprio,
        head=None if config.action_head == "auto" else config.action_head,
        use_film=config.use_film,
        quantization=_quantization(config),
    )


def _build(config: ServerConfig, secrets: Secrets, bound: socket.socket) -> PolicyServer:
    """The server of a warm policy."""
    logger.info("loading %s", config.pretrained_checkpoint)
    served = ServedPolicy(load_policy(config), config)
    logger.info("warm for batches of 1 to %d after %.1f s", config.max_batch_size, served.warm_up())
    watchers, routers = watching(config, served)
    return PolicyServer(build_application(served, config, watchers, routers, secrets), config, bound)


def watching(config: ServerConfig, served: ServedPolicy) -> tuple[list[Watcher], list[APIRouter]]:
    """The recorder and the page, as the flags say. Raises OSError where the records' folder cannot be made."""
    versions = collect_versions()
    watchers: list[Watcher] = []
    routers: list[APIRouter] = []
    if config.record is not None:
        logger.info("what is answered is recorded in %s", config.record)
        watchers.append(ServerRecorder(config.record, lambda: facts_of(served.info(), versions)))
    if config.page:
        feed = LiveFeed()
        watchers.append(feed)
        routers.append(page_router(feed, lambda event: one_moment(event, facts_of(served.info(), versions))))
    return watchers, routers


def _quantization(config: ServerConfig) -> str | None:
    """`8bit`, `4bit`, `fp8` or None. Raises ValueError where flags contradict each other or the machine cannot."""
    kinds = [kind for kind in KINDS if getattr(config, f"load_in_{kind}")]
    if len(kinds) > 1:
        flags = " and ".join(f"--load_in_{kind}" for kind in kinds)
        raise ValueError(f"{flags} exclude each other; give one of them")
    if kinds:
        check_quantization(kinds[0])
    return kinds[0] if kinds else None
