"""From an adapter directory to weights that may be served, or to the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.adapters.artifact_directory import ArtifactDirectory
from fusionserve.adapters.artifact_errors import bad_tensor, quoted, unsupported
from fusionserve.adapters.base_modules import BaseModules
from fusionserve.adapters.lora_config import check_base_model, read_lora_config
from fusionserve.adapters.lora_layout import LoRALayout, lay_out
from fusionserve.adapters.lora_plan import LoRAPlan, ModulePlan, TensorRole, plan_lora
from fusionserve.adapters.lora_weights import LoRAWeights, ModuleLoRA
from fusionserve.adapters.safetensors_file import SafetensorsFile, TensorSpec, read_ahead, tensor_in
from fusionserve.errors import ArtifactError, CapacityError
from fusionserve.kernels.measured_copy import copy_measured, pieces

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")

# No trained value comes near it, and two such factors times an activation are still finite in float32.
MAX_MAGNITUDE = 1e6


def pageable_memory(num_bytes: int) -> Tensor:
    """As torch allocates it."""
    return torch.empty(num_bytes, dtype=torch.uint8)


def no_bias(path: str) -> Tensor:
    """Of a base whose LM head has none."""
    raise LookupError(f"{path} has no bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPolicy:
    """What the server asks of every adapter it loads."""

    dtype: torch.dtype  # the one the adapter pool computes in
    max_rank: int  # rank rows in one module
    allow_base_mismatch: bool = False
    new_memory: Callable[[int], Tensor] = pageable_memory  # uint8 [bytes], for its rank rows
    taken_bytes: Callable[[int], int] = int  # what so many bytes of it take of the host


def load_lora_weights(
    directory: ArtifactDirectory,
    base: BaseModules,
    *,
    policy: LoadPolicy,
    budget_bytes: int,
    base_weight: Callable[[str], Tensor],
    base_step: Callable[[str], float] = lambda path: 0.0,
    base_bias: Callable[[str], Tensor] = no_bias,
) -> LoRAWeights:
    """Reads, checks and converts the adapter in `directory`; nothing of it is executed or trusted.

    `base_weight(path)` gives the base's own weight of the embedding or the LM head, to compare copies with, and
    `base_step(path)` by how much its numbers may be off the checkpoint's, where it is held in few bits;
    `base_bias(path)` gives the bias of an LM head that has one.
    Names, shapes, ranks and sizes are checked before data is read; then two blocks of the file are held beside
    what is kept, a megabyte or a single larger tensor each.

    Raises ArtifactError with the reason and, where one is at fault, the tensor's name; CapacityError
    (ADAPTER_TOO_BIG) if it takes more than `budget_bytes`; UnavailableError if the storage fails.
    """
    config = read_lora_config(directory)
    if not policy.allow_base_mismatch:
        check_base_model(config, (base.model_name, *base.checkpoint_names))
    _refuse_pickle(directory)
    with directory.open_file(WEIGHTS_FILE, missing_reason="WEIGHTS_MISSING") as opened:
        read_ahead(opened)
        file = SafetensorsFile(opened)
        plan = plan_lora(file.header, config, base)
        layout = lay_out(file.header, plan, policy.dtype)
        _check_size(plan, layout, policy, budget_bytes)
        return _Assembly(plan, layout, policy, base_weight, base_step, base_bias).run(file)


def read_plan(directory: ArtifactDirectory, base: BaseModules) -> LoRAPlan:
    """What the adapter in `directory` would take, from its configuration and header alone. Raises ArtifactError."""
    config = read_lora_config(directory)
    with directory.open_file(WEIGHTS_FILE, missing_reason="WEIGHTS_MISSING") as opened:
        return plan_lora(SafetensorsFile(opened).header, config, base)


def _refuse_pickle(directory: ArtifactDirectory) -> None:
    if directory.has_file(WEIGHTS_FILE):
        return
    for name in PICKLE_FILES:
        if directory.has_file(name):
            raise ArtifactError(
                f"{name} is a pickle, which can run code when it is read; save the adapter as {WEIGHTS_FILE}",
                reason="PICKLE_REFUSED",
            )


def _check_size(plan: LoRAPlan, layout: LoRALayout, policy: LoadPolicy, budget_bytes: int) -> None:
    if plan.max_rows > policy.max_rank:
        raise ArtifactError(
            f"the adapter takes {plan.max_rows} rank rows in a module, the server allows {policy.max_rank}",
            reason="RANK_TOO_LARGE",
            metadata={"rank": str(plan.max_rows), "max_rank": str(policy.max_rank)},
        )
    needed = plan.count_bytes(policy.dtype) + _unused_bytes(layout, policy)
    if needed > budget_bytes:
        raise CapacityError(
            f"the adapter takes {needed} bytes, the server's budget for adapters is {budget_bytes}",
            reason="ADAPTER_TOO_BIG",
            metadata={"bytes": str(needed), "budget_bytes": str(budget_bytes)},
        )


def _unused_bytes(layout: LoRALayout, policy: LoadPolicy) -> int:
    num_bytes = layout.num_numbers * policy.dtype.itemsize
    return policy.taken_bytes(num_bytes) - num_bytes


class _Assembly:
    """Takes a file block by block and puts each tensor into the served form of its module."""

    def __init__(
        self,
        plan: LoRAPlan,
        layout: LoRALayout,
        policy: LoadPolicy,
        base_weight: Callable[[str], Tensor],
        base_step: Callable[[str], float],
        base_bias: Callable[[str], Tensor],
    ) -> None:
        self._dtype = policy.dtype
        self._base_step = base_step
        self._base_weight, self._base_bias = base_weight, base_bias
        self._plan, self._layout = plan, layout
        self._unused_bytes = _unused_bytes(layout, policy)
        self._rows = policy.new_memory(layout.num_numbers * policy.dtype.itemsize).view(policy.dtype)
        self._modules = {path: self._place(path, module) for path, module in plan.modules.items()}
        self._replacements: dict[str, Tensor] = {}
        self._replaced_biases: dict[str, Tensor] = {}

    def _place(self, path: str, plan: ModulePlan) -> ModuleLoRA:
        """The module's parts; the row of a bias is last, and its part of `shrink` and `shrink_bias` is set."""
        num_rows, d_in, d_out = plan.num_rows, plan.module.d_in, plan.module.d_out
        place, rows, bias = self._layout.places[path], self._rows, None
        shrink = rows.as_strided((num_rows, d_in), (d_in, 1), place.shrink)
        expand = rows.as_strided((num_rows, d_out), (d_out, 1), place.expand)
        if place.shrink_bias is not None:
            bias = rows[place.shrink_bias : place.shrink_bias + num_rows].zero_()
            shrink[-1], bias[-1] = 0, 1
        magnitude = torch.empty(d_out) if TensorRole.MAGNITUDE in plan.parts else None
        return ModuleLoRA(
            shrink=shrink, expand=expand, shrink_bias=bias, magnitude=magnitude, scaling=plan.scaling
        )

    def run(self, file: SafetensorsFile) -> LoRAWeights:
        rows = self._rows.view(torch.uint8)
        for data, block in zip(file.read_blocks(), self._layout.blocks, strict=True):
            for spec, largest in zip(block.copied, block.copies.run(data, rows), strict=True):
                _check_magnitude(spec, largest)
            for spec in block.others:
                self._take(spec, tensor_in(data, spec, block.start))
        return LoRAWeights(
            digest=file.digest(),
            modules=self._modules,
            replacements=self._replacements,
            replaced_biases=self._replaced_biases,
            unused_bytes=self._unused_bytes,
        )

    def _take(self, spec: TensorSpec, tensor: Tensor) -> None:
        """What are no rank rows."""
        path, role = self._plan.places[spec.name]
        if role is TensorRole.BASE_COPY:
            _check_copy(spec, tensor, self._base_weight(path), self._base_step(path))
        elif role is TensorRole.BIAS_COPY:
            _check_copy(spec, tensor, self._base_bias(path), 0.0)
        elif role in (TensorRole.REPLACEMENT, TensorRole.BIAS_REPLACEMENT):
            kept = self._replacements if role is TensorRole.REPLACEMENT else self._replaced_biases
            self._keep(kept, path, spec, tensor)
        else:
            magnitude = self._modules[path].magnitude
            assert role is TensorRole.MAGNITUDE and magnitude is not None
            _check_magnitude(spec, copy_measured(magnitude, tensor))

    def _keep(self, kept: dict[str, Tensor], path: str, spec: TensorSpec, tensor: Tensor) -> None:
        if path in kept:
            _check_repeated(spec, tensor, kept[path])
            return
        kept[path] = torch.empty(tensor.shape, dtype=self._dtype)
        _check_magnitude(spec, copy_measured(kept[path], tensor))


def _check_repeated(spec: TensorSpec, repeated: Tensor, kept: Tensor) -> None:
    """Of a replacement that the file has twice, either must give what is served."""
    for theirs, ours in zip(pieces(repeated), pieces(kept), strict=True):
        if not torch.equal(theirs.to(ours.dtype), ours):
            raise bad_tensor(
                "UNEXPECTED_TENSOR", spec.name, "it differs from the other replacement of its module"
            )


def _check_magnitude(spec: TensorSpec, largest: float) -> None:
    """Raises unless all values are finite and sane in the dtype they are served in."""
    if not largest <= MAX_MAGNITUDE:  # NaN fails this too
        problem = f"it has values that are not finite or over {MAX_MAGNITUDE:g}"
        raise bad_tensor("NOT_FINITE", spec.name, problem)


def _check_copy(spec: TensorSpec, copy: Tensor, base: Tensor, base_step: float) -> None:
    """PEFT writes the base's weights beside an adapted embedding; others would change the base for all.

    Both may have been rounded from one original, so they may differ by a rounding step of the coarser dtype, and by
    `base_step` where the base's is quantized.
    """
    step = 0.0 if copy.dtype == base.dtype else max(torch.finfo(copy.dtype).eps, torch.finfo(base.dtype).eps)
    for theirs, ours in zip(pieces(copy), pieces(base.detach().contiguous()), strict=True):
        if not torch.allclose(
            theirs.float(), ours.cpu().float(), rtol=step, atol=max(step * 1e-4, base_step)
        ):
            raise unsupported(f"tensor {quoted(spec.name)} is a resized or changed copy of the base's")
