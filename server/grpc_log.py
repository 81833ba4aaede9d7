"""What gRPC may log of a call.

Of each name and value in a call's metadata that is not UTF-8 it logs the bytes and a stack, before a token is asked
for: anybody could fill the log, and a malformed token would stand in it.
"""

from __future__ import annotations

import logging

_LOGGER = logging.getLogger("grpc._cython.cygrpc")
_OF_METADATA = "Invalid encoding on "


def keep_metadata_out() -> None:
    """Has gRPC, in all of this process, log nothing of metadata that is no text."""
    _LOGGER.addFilter(_tells_no_metadata)


def _tells_no_metadata(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_OF_METADATA)
