"""How a server writes its log: lines for people, or an object a line for machines."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

_FIELDS = ("request_id", "connection", "code", "timing")
"""What a record may carry beside its words."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, what the record carries, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """Time, level and message, with what a client sent kept inside its line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, whose control characters are shown and not obeyed."""
        return "".join(
            sign if sign.isprintable() else sign.encode("unicode_escape").decode()
            for sign in super().formatMessage(record)
        )


def set_up_logging(kind: str, level: str) -> None:
    """Send the log of this process to stderr, as `--log_format` and `--log_level` say."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
