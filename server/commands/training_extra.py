"""The packages of the `training` extra, imported only once a command line is checked."""

from __future__ import annotations

import importlib
import logging
from types import ModuleType

from fusionserve.server.command_errors import CommandError

_OURS = "fusionserve"


def import_training(module: str) -> ModuleType:
    """`fusionserve.training.<module>`. Raises CommandError that names what is not installed."""
    # bitsandbytes warns, as it is imported, of what it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        # Importing torch takes seconds: it waits until the settings are checked.
        return importlib.import_module(f"{_OURS}.training.{module}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == _OURS:
            raise
        raise CommandError(
            f"{package} is not installed; this command needs: pip install 'fusionserve[training]'"
        ) from error
