"""Fusions on bases of other families: tokens are weighed as by the unfolded attention, wherever it is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
from fused_families import assert_weighed_as_unfolded

from fusionserve.kernels.native_layer import NativeLayer

# Attention and MLP side by side; one after the other; queries, keys and values or gate and up in one module.
PARALLEL = ("gpt_neox", "phi", "cohere", "cohere2", "stablelm_parallel")
FAMILIES = (*PARALLEL, "gpt_neox_serial", "gpt2", "phi3", "gemma2", "olmo2")


@pytest.mark.parametrize("is_one_call", [True, False], ids=["one_call", "one_by_one"])
@pytest.mark.parametrize("attention_at", ["first", "output"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_fusion_of_a_layer_equals_the_unfolded_model(
    family: str, attention_at: str, is_one_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers in one native call where that is possible, and kernel by kernel."""
    if not is_one_call:
        monkeypatch.setattr(NativeLayer, "can_compute", lambda *_: False)
    await assert_weighed_as_unfolded(family, attention_at, "cpu", tmp_path)
