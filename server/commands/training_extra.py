"""The packages of the `training` extra, imported only once a command line is checked."""

from __future__ import annotations

import logging
from types import ModuleType

from fusionserve.server.commands.extras import import_from_extra


def import_training(module: str) -> ModuleType:
    """`fusionserve.training.<module>`. Raises CommandError that names what is not installed."""
    # bitsandbytes warns, as it is imported, of what it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Importing torch takes seconds: it waits until the settings are checked.
    return import_from_extra("training", module)
