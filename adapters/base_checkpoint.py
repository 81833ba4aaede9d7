"""What a base's checkpoint must not be: a model with an adapter beside it, or one whose weights are quantized already.

transformers loads both without a word. An adapter would change every token of every request, and what stands on the
weights (DoRA's lengths, copies that are compared, the fingerprint) would not be of the weights that are computed with.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from fusionserve.artifact_folders import ADAPTER_CONFIG

_ADAPTER_BESIDE = (
    f"it holds an adapter ({ADAPTER_CONFIG}) beside the model, which would become part of the base: "
    "move the adapter to a folder of its own, as --adapter and --adapter-dir take it"
)


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
        raise ValueError(
            "this checkpoint is quantized already: take the original one, which --quantize can bring to fewer bits"
        )
