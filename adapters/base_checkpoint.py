"""Reads a base's checkpoint for serving and for training, and refuses what is not the base that it seems to be.

transformers loads without a word a model with an adapter beside it, one whose weights are quantized already, one that
lacks weights, which it makes up, and one that has more than the model uses. An adapter would change every token of
every request, and what stands on the weights (DoRA's lengths, copies that are compared, the fingerprint) would not be
of the weights that are computed with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from fusionserve.adapters.nf4 import misshapen_weights
from fusionserve.adapters.stored_weights import StoredWeights
from fusionserve.artifact_folders import ADAPTER_CONFIG

_ADAPTER_BESIDE = (
    f"it holds an adapter ({ADAPTER_CONFIG}) beside the model, which would become part of the base: "
    "move the adapter to a folder of its own, as --adapter and --adapter-dir take it"
)
_QUANTIZED = (
    "this checkpoint is quantized already: take the original one, which --quantize can bring to fewer bits"
)
_FULL_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_REASON_LENGTH = 240
_NAMED = (KeyError, TypeError, AttributeError)  # of a KeyError the text is a key


def read_checkpoint(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype | str, options: Mapping[str, Any]
) -> PreTrainedModel:
    """The model in a folder, every weight of it from the folder's safetensors files.

    `options` go to `from_pretrained`. Raises ValueError that says what is wrong, and whatever transformers raises,
    which depends on what the files hold; `one_line` has the text to show.
    """
    if not any(directory.glob("*.safetensors")):
        raise ValueError("the directory has no .safetensors files (pickles are not read)")
    check_no_adapter_beside(directory)
    _check_no_codes(StoredWeights(directory).dtypes())
    config.return_dict = True  # whatever the file says: outputs are read by their names
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # _check_complete says it better
        output_loading_info=True,
        **options,
    )
    model: PreTrainedModel
    model, report = loaded
    check_no_adapter_in(model)
    _check_complete(report, misshapen_weights(model))
    _check_all_used(model, report["unexpected_keys"])
    return model


def one_line(error: Exception) -> str:
    """The error's text without line breaks, and not the essay that some are; with its type where it needs that."""
    text, name = str(error), type(error).__name__
    if isinstance(error, _NAMED) or not text:
        text = f"{name}: {text}" if text else name
    return textwrap.shorten(text, _MAX_REASON_LENGTH, placeholder=" ...")


def check_no_adapter_beside(directory: Path) -> None:
    """Raises ValueError if a folder holds an adapter's configuration."""
    if (directory / ADAPTER_CONFIG).exists():
        raise ValueError(_ADAPTER_BESIDE)


def check_no_adapter_in(model: PreTrainedModel) -> None:
    """Raises ValueError if transformers gave the model an adapter as it loaded it."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(_ADAPTER_BESIDE)


def check_not_quantized(config: PreTrainedConfig) -> None:
    """Raises ValueError for a checkpoint whose weights are quantized, by whatever method."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(_QUANTIZED)


def _check_no_codes(dtypes: Mapping[str, str]) -> None:
    """Raises ValueError if weights are of a type that says nothing without scales, whatever config.json says."""
    for name, dtype in sorted(dtypes.items()):
        if name.endswith(".weight") and dtype not in _FULL_DTYPES:
            raise ValueError(f"{name} is of the type {dtype}: {_QUANTIZED}")


def _check_complete(report: Mapping[str, Collection[Any]], misshapen: Collection[str]) -> None:
    """Raises ValueError if any parameter was not in the files: transformers would make it up."""
    missing = sorted(report["missing_keys"])
    mismatched = sorted({*misshapen, *(name for name, *_ in report["mismatched_keys"])})
    for names, what in (
        (missing, "do not have"),
        (mismatched, "have another shape than config.json says for"),
    ):
        if names:
            raise ValueError(f"its weight files {what} {_first_of(names)}")


def _check_all_used(model: PreTrainedModel, unexpected: Collection[str]) -> None:
    """Raises ValueError if the files have more for a module that computes with parameters, such as a bias or scales.

    Modules that the model does not have (layers that draft tokens) and buffers of modules without parameters (masks,
    frequencies) change nothing of what the model computes.
    """
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    computing = {name.rpartition(".")[0] for name in names}
    unused = [
        name
        for name in sorted(unexpected)
        # Files of a base model without a head lack the prefix.
        for full in (name, f"{model.base_model_prefix}.{name}")
        if _innermost(full, modules) in computing
    ]
    if unused:
        raise ValueError(
            f"its weight files have {_first_of(unused)}, which the model of config.json does not use"
        )


def _innermost(name: str, modules: Collection[str]) -> str:
    """The path of the module to which a tensor of this name belongs, or would if it had more modules in it."""
    path = name.rpartition(".")[0]
    while path not in modules:
        path = path.rpartition(".")[0]
    return path


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
