"""The packages of an extra, imported only once a command line is checked."""

from __future__ import annotations

import importlib
from types import ModuleType

from fusionserve.server.command_errors import CommandError

_OURS = "fusionserve"


def import_from_extra(layer: str, module: str) -> ModuleType:
    """`fusionserve.<layer>.<module>`. Raises CommandError that names what is not installed of the extra `layer`."""
    try:
        return importlib.import_module(f"{_OURS}.{layer}.{module}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == _OURS:
            raise
        raise CommandError(
            f"{package} is not installed; this command needs: pip install 'fusionserve[{layer}]'"
        ) from error
