"""A decoder of our own serves only where it says what transformers' forward says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, MIXTURES, save_tiny_model

from fusionserve.config import EngineConfig
from fusionserve.engine import layer_form, model_form
from fusionserve.engine.base_model import BaseModel, load_base_model
from fusionserve.kernels.activations import Activation
from fusionserve.kernels.native_layer import MLPSettings
from fusionserve.kernels.norms import RMSNorm


def load(directory: Path, **options: Any) -> BaseModel:
    return load_base_model(EngineConfig(model=str(directory), model_name="m", num_threads=1, **options))


@pytest.fixture(scope="module", params=sorted(FAMILIES | MIXTURES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each."""
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"dtype": "float32", "quantize": "int8"}],
    ids=lambda options: "-".join(options.values()),
)
def test_own_decoder_serves_where_it_is_right(
    family: Path, options: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """In float32 alone it does in test_architectures.py."""
    assert load(family, **options).decoder is not None
    assert "decoder of our own for" not in caplog.text


def another_activation(form: layer_form.LayerForm) -> layer_form.LayerForm:
    assert isinstance(form.mlp, layer_form.DenseMLP)
    return replace(form, mlp=replace(form.mlp, settings=MLPSettings(Activation.GELU_TANH, is_gated=True)))


def no_norm(form: layer_form.LayerForm) -> layer_form.LayerForm:
    settings = form.settings
    return replace(form, settings=replace(settings, norms=replace(settings.norms, before_mlp=None)))


def another_scale(form: layer_form.LayerForm) -> layer_form.LayerForm:
    settings = form.settings
    return replace(form, settings=replace(settings, options=replace(settings.options, softmax_scale=0.1)))


@pytest.mark.parametrize("changed", [another_activation, no_norm, another_scale])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_serves_where_it_is_not(
    changed: Callable[[layer_form.LayerForm], layer_form.LayerForm],
    dtype: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = layer_form.layer_form

    def misread(layer: torch.nn.Module, options: Any) -> layer_form.LayerForm | None:
        form = read(layer, options)
        return None if form is None else changed(form)

    monkeypatch.setattr(model_form, "layer_form", misread)
    assert load(save_tiny_model("llama", tmp_path), dtype=dtype).decoder is None
    assert "the decoder of our own for LlamaForCausalLM is off by" in caplog.text


def test_transformers_serves_where_ours_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> RMSNorm:
        raise AttributeError("variance_epsilon")

    monkeypatch.setattr(model_form, "read_norm", unknown)
    assert load(save_tiny_model("llama", tmp_path)).decoder is None
    assert "no decoder of our own for LlamaForCausalLM: AttributeError" in caplog.text
