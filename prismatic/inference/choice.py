"""Which engine runs a policy."""

import logging

from prismatic.inference.compiled import CompiledEngine, why_not
from prismatic.inference.engine import EagerEngine, Engine, Parts, check_engine

logger = logging.getLogger(__name__)


def build_engine(name: str, parts: Parts) -> Engine:
    """The engine of that name over a policy's parts.

    Raises ValueError for an unknown name. `compiled` takes what it can and says in `describe` where it cannot.
    """
    check_engine(name)
    if name == "eager":
        return EagerEngine(parts)
    if name == "compiled" and (reason := why_not(parts)) is not None:
        logger.warning("engine compiled runs this policy eagerly: %s", reason)
    return CompiledEngine(parts)
