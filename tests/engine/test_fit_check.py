"""What the run of two short prompts says of a model, and what it takes for a last digit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, CONTEXT, make_tiny_model, save_tiny_model
from torch import Tensor

from fusionserve.config import EngineConfig
from fusionserve.engine import fit_check
from fusionserve.engine.base_model import load_base_model
from fusionserve.errors import StartupError
from fusionserve.kernels.paged_attention import AttentionOptions, chunk_attention


def config_of(directory: Path, dtype: str) -> EngineConfig:
    return EngineConfig(model=str(directory), model_name="tiny", dtype=dtype, num_threads=1)


def test_token_that_meets_another_expert_for_a_last_digit_is_no_other_attention(tmp_path: Path) -> None:
    config = CONFIGS["mixtral"]()
    config.num_experts_per_tok = 1
    make_tiny_model(config, seed=3).save_pretrained(tmp_path)
    assert load_base_model(config_of(tmp_path, "bfloat16")).max_context_tokens == CONTEXT


def test_weights_that_are_not_finite_are_refused_for_that(tmp_path: Path) -> None:
    model = make_tiny_model(CONFIGS["llama"]())
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(StartupError, match="gets logits that are not finite") as caught:
        load_base_model(config_of(tmp_path, "float32"))
    assert caught.value.reason == "MODEL_UNUSABLE"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_attention_that_is_another_is_refused(
    architecture: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_another_scale(*tensors: Any) -> Tensor:
        *given, options = tensors
        assert isinstance(options, AttentionOptions)
        return chunk_attention(*given, replace(options, softmax_scale=2 * options.softmax_scale))

    monkeypatch.setattr(fit_check, "chunk_attention", on_another_scale)
    with pytest.raises(StartupError, match="its output is not that of plain attention") as caught:
        load_base_model(config_of(save_tiny_model(architecture, tmp_path), dtype))
    assert caught.value.reason == "ARCHITECTURE_UNSUPPORTED"
