"""A base's linear modules in NF4 with double quantization (QLoRA, arXiv 2305.14314), held by bitsandbytes.

    W = code[q] * scale     q: 4 bits per weight; a scale per 64 weights of a row, itself in 8 bits; code: 16 levels

Training and serving hold the same modules this way: every linear module but the LM head and routers, and but those
whose inputs are not whole blocks. Embeddings, norms and biases keep their type. Products are in bfloat16, or as
`compute_in_float32` says.

On CPUs with bfloat16 instructions bitsandbytes has a product over another layout of the same four bits, with the scales
in bfloat16, and by itself changes to it at a module's first evaluation. Serving wants that, at a time of its choosing:
`repack`. Training cannot have it: `keep_layout`.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusionserve.adapters.routers import router_paths

NONE, NF4 = "none", "nf4"
_PACKAGES = ("accelerate", "bitsandbytes")
_BLOCK = 64  # weights per scale
_PACKED_OUTPUTS = 32  # outputs that lie together in the layout of `repack`


def quantization_options(quantize: str, model_config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is to be told for "none" or "nf4" and a model of this configuration.

    Raises ImportError with the package and the extra that brings it, ValueError for another word.
    """
    if quantize == NONE:
        return {}
    if quantize != NF4:
        raise ValueError(f"base weights can be quantized as {NF4}, not as {quantize}")
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{NF4} needs {package}, which is not installed: pip install 'fusionserve[nf4]'"
            )
    # As it is imported it advises to install a package that fetches compiled code from a model hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_advice)
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=_full_modules(model_config),
    )
    return {"quantization_config": config}


def is_nf4(module: nn.Module) -> bool:
    """True if the module's weight is held in four bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def nf4_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules held in four bits, by path."""
    return {path: module for path, module in model.named_modules() if is_nf4(module)}


def misshapen_weights(model: PreTrainedModel) -> list[str]:
    """Names of four-bit weights of another shape than their module's; transformers checks all others as it loads."""
    return [
        f"{path}.weight"
        for path, module in nf4_modules(model).items()
        if _shape(module) != _own_shape(module)
    ]


def keep_layout(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from changing the layout, ever.

    No gradient passes through the other one, so every training step behind an evaluation would be wrong without a sign.
    """
    for module in nf4_modules(model).values():
        _forbid_repacking(module)


def compute_in_float32(model: PreTrainedModel) -> None:
    """Dequantizes to float32 for each product.

    Products in bfloat16 would round activations that are in float32, and turn differences in their last digits, which
    the company in a batch makes, into differences of tokens.
    """
    keep_layout(model)
    for module in nf4_modules(model).values():
        module.compute_dtype = torch.float32  # type: ignore[assignment]


@torch.no_grad()
def repack(model: PreTrainedModel) -> None:
    """Changes the layout for good where processor and shape allow it; the rest stays in the one it has.

    `model` must be in evaluation. Afterwards no forward pass changes any weight.
    """
    for module in nf4_modules(model).values():
        num_outputs, num_inputs = _shape(module)
        if num_outputs % _PACKED_OUTPUTS:
            _forbid_repacking(module)
        else:
            module(torch.zeros(1, num_inputs, dtype=torch.bfloat16))


@torch.no_grad()
def dequantized_weight(module: nn.Module) -> Tensor:
    """The weight [d_out, d_in] that a four-bit module computes with, in either layout."""
    weight: Any = module.weight
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        return _unpack(weight.data, state)
    # Imported here: bitsandbytes looks for devices as it is imported, which only who uses it should wait for.
    from bitsandbytes.functional import dequantize_4bit

    dequantized: Tensor = dequantize_4bit(weight.data, state)
    return dequantized


def _full_modules(model_config: PreTrainedConfig) -> list[str] | None:
    """Paths of routers, of modules whose rows are not whole blocks, and of the head; None, the usual choice, if there
    are none but the head.

    bitsandbytes 0.50 quantizes the weights of such rows rightly but reads them back with the scales of other blocks on
    CPUs with AVX-512: every product would be wrong by a third, without a sign.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    routers = router_paths(model)
    full = [
        path
        for path, module in model.named_modules()
        if module is not head and (path in routers or _num_inputs(module) % _BLOCK)
    ]
    return full + [path for path, module in model.named_modules() if module is head] if full else None


def _num_inputs(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        num_inputs: int = module.nx
        return num_inputs
    return module.in_features if isinstance(module, nn.Linear) else 0


def _unpack(packed: Tensor, state: Any) -> Tensor:
    """Undoes the layout of `repack`: packed [d_out, d_in / 2], scales [d_in / 64, d_out].

    Within 32 outputs and two inputs, the low halves of 32 bytes hold the first 16 outputs, the high halves the others.
    """
    num_outputs, num_inputs = state.shape
    num_chunks, num_pairs = num_outputs // _PACKED_OUTPUTS, num_inputs // 2
    chunks = packed.reshape(num_chunks, num_pairs, _PACKED_OUTPUTS)
    levels = torch.cat([chunks & 0xF, chunks >> 4], dim=-1)
    levels = levels.view(num_chunks, num_pairs, _PACKED_OUTPUTS, 2).transpose(1, 2)
    values: Tensor = state.code[levels.reshape(num_outputs, num_inputs // _BLOCK, _BLOCK).int()]
    scales: Tensor = state.absmax.T.float().unsqueeze(-1)
    return (values * scales).reshape(num_outputs, num_inputs)


def _shape(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    num_outputs, num_inputs = weight.quant_state.shape
    return num_outputs, num_inputs


def _own_shape(module: nn.Module) -> tuple[int, int]:
    own: Any = module
    return own.out_features, own.in_features


def _forbid_repacking(module: nn.Module) -> None:
    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _is_no_advice(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)
