"""Fusions on bases of other families: tokens are weighed as by the unfolded attention, wherever it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fused_families import NUM_TOKENS, assert_weighed_as_unfolded, write_fused

from fusionserve.kernels.native_layer import NativeLayer, NativeLayers
from fusionserve.kernels.packed_linear import can_pack

# Attention and MLP side by side; one after the other; queries, keys and values or gate and up in one module.
PARALLEL = ("gpt_neox", "phi", "cohere", "cohere2", "stablelm_parallel")
FAMILIES = (*PARALLEL, "gpt_neox_serial", "gpt2", "phi3", "gemma2", "olmo2")


@pytest.mark.parametrize("attention_at", ["first", "output"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_fusion_of_a_layer_equals_the_unfolded_model(
    family: str,
    attention_at: str,
    native_passes: list[NativeLayers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All layers in one native call where that is possible, and kernel by kernel."""
    write_fused(family, attention_at, tmp_path)
    await assert_weighed_as_unfolded(family, "cpu", tmp_path)
    if not can_pack(torch.zeros(16, 2)):
        return  # that was kernel by kernel
    assert len(native_passes) > NUM_TOKENS
    native_passes.clear()
    monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    await assert_weighed_as_unfolded(family, "cpu", tmp_path)
    assert not native_passes
