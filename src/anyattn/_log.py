"""The one logger. ``ANYATTN_LOG=info`` (or debug, warning ...) sends it to standard error."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("anyattn")
logger.addHandler(logging.NullHandler())


def configure() -> None:
    """Honour ``ANYATTN_LOG``: a level's name. Anything else is said once, and ignored."""
    wanted = os.environ.get("ANYATTN_LOG", "").strip().upper()
    if not wanted:
        return
    level = logging.getLevelName(wanted)
    known = isinstance(level, int)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("anyattn: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level if known else logging.INFO)
    if not known:
        logger.warning("ANYATTN_LOG=%s is no level; use debug, info, warning or error. Taking info.", wanted)
