"""Which modules an adapter is put on."""

from __future__ import annotations

from fusionserve.adapters.base_modules import ModuleKind
from fusionserve.errors import TrainingError
from fusionserve.training.frozen_base import FrozenBase

_KINDS = (ModuleKind.LINEAR, ModuleKind.CONV1D)


def choose_targets(base: FrozenBase, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Last names of modules, sorted; all linear ones of the layers if none is wanted.

    Raises TrainingError for a name that no linear module of the layers has.
    """
    modules = base.modules.by_path.items()
    names = {path.rpartition(".")[2] for path, module in modules if module.kind in _KINDS}
    for name in wanted:
        if name not in names:
            raise TrainingError(
                f"{base.name} has no module {name!r} to adapt; it has {', '.join(sorted(names))}"
            )
    return tuple(sorted(wanted or names))
