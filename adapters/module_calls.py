"""Which modules a forward pass calls, in what order, and with how many tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


class ModuleCalls:
    """While entered, counts the input rows of each module at `paths`; `num_rows` is in the order of the first calls."""

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.num_rows: dict[str, int] = {}  # by path; 0 for a module called twice
        self._model = model
        self._paths = tuple(paths)

    def __enter__(self) -> ModuleCalls:
        self._handles = [
            self._model.get_submodule(path).register_forward_pre_hook(self._note(path))
            for path in self._paths
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            elements = inputs[0].numel()
            rows = elements if isinstance(module, nn.Embedding) else elements // inputs[0].shape[-1]
            self.num_rows[path] = 0 if path in self.num_rows else rows

        return hook
