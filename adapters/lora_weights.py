"""The weights of one adapter as they are served: rank rows per module, scaling folded in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleLoRA:
    """The low-rank change of one module: y += expand^T (shrink x + shrink_bias).

    `expand` holds s * B, transposed into rows. A bias of B (`lora_bias`) is one more rank row: zeros in
    `shrink`, 1 in `shrink_bias`, s * b_B in `expand`. With `magnitude` (DoRA) the module gives
    y = c (W0 x + the change) + b0 with c = magnitude / |W0 + s B A| by output row. For the embedding x is the
    one-hot of the token, so d_in is the vocabulary.
    """

    shrink: Tensor  # [rank, d_in]
    expand: Tensor  # [rank, d_out]
    shrink_bias: Tensor | None = None  # [rank]
    magnitude: Tensor | None = None  # [d_out], float32
    scaling: float = 1.0  # s

    @property
    def rank(self) -> int:
        """Rank rows, the row of a bias included."""
        return self.shrink.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.shrink, self.expand, self.shrink_bias, self.magnitude)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: the cached properties need a place
class LoRAWeights:
    """An adapter's checked content, in private memory; nobody writes to its tensors after loading.

    `digest` is the sha256 (hex) of the weights file. `replacements` are whole weights that stand in for the
    base's (modules_to_save of the LM head or the embedding), `replaced_biases` the biases of such heads.
    """

    digest: str
    modules: Mapping[str, ModuleLoRA]  # by module path
    replacements: Mapping[str, Tensor]  # by module path, [vocab, hidden]
    replaced_biases: Mapping[str, Tensor] = field(default_factory=dict)  # by module path, [vocab]
    unused_bytes: int = 0  # taken of the host beside the tensors, where memory comes in powers of two

    @cached_property
    def scalings_digest(self) -> str:
        """sha256 (hex) of every module's path and scaling, which the configuration says and `digest` does not cover."""
        lines = (f"{path} {module.scaling.hex()}\n" for path, module in sorted(self.modules.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def max_rank(self) -> int:
        """The most rank rows in one module; 0 if there are only replacements."""
        return max((module.rank for module in self.modules.values()), default=0)

    @cached_property
    def nbytes(self) -> int:
        """Bytes it takes on the host."""
        low_rank = sum(module.nbytes for module in self.modules.values())
        whole = (*self.replacements.values(), *self.replaced_biases.values())
        return low_rank + sum(tensor.nbytes for tensor in whole) + self.unused_bytes

    @cached_property
    def has_magnitudes(self) -> bool:
        """True for DoRA."""
        return any(module.magnitude is not None for module in self.modules.values())

    @cached_property
    def is_low_rank_only(self) -> bool:
        """True if rank rows say everything, so that it may take part in blends and fusions."""
        return not self.replacements and not self.has_magnitudes

    @cached_property
    def target_modules(self) -> tuple[str, ...]:
        """The last names of the modules it changes, sorted, each once: "q_proj", "v_proj"."""
        paths = (*self.modules, *self.replacements)
        return tuple(sorted({path.rpartition(".")[2] for path in paths}))
