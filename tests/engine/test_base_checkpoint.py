"""Checkpoints that transformers would load as something else than the base they seem to be are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_files import Q_PROJ, make_config, make_pair, write_adapter
from tiny_models import CONFIGS, make_tiny_model
from tiny_training import write_base
from torch import nn
from transformers import AutoModelForCausalLM

from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel, adapt_model, load_base_model
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.errors import StartupError, TrainingError
from fusionserve.training.frozen_base import load_base

QUANTIZATIONS = ("none", "int8", "nf4")


def config_of(directory: Path, quantize: str = "none") -> EngineConfig:
    return EngineConfig(model=str(directory), model_name="tiny", quantize=quantize, num_threads=1)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A base whose folder also holds an adapter."""
    base = write_base(tmp_path / "base")
    write_adapter(base, config=make_config(target_modules=["q_proj"]), tensors=make_pair(Q_PROJ, 32, 32))
    return base


def test_transformers_gives_the_base_the_adapter_beside_it(beside: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(beside)._hf_peft_config_loaded


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
def test_adapter_beside_the_served_base_is_refused(quantize: str, beside: Path) -> None:
    with pytest.raises(StartupError, match=r"adapter_config\.json\) beside the model") as caught:
        load_base_model(config_of(beside, quantize))
    assert caught.value.reason == "MODEL_UNUSABLE"


def test_adapter_that_transformers_found_elsewhere_is_refused(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does for an id of a model hub."""
    monkeypatch.setattr("fusionserve.engine.base_model.check_no_adapter_beside", lambda _: None)
    with pytest.raises(StartupError, match="beside the model") as caught:
        load_base_model(config_of(beside))
    assert caught.value.reason == "MODEL_UNUSABLE"
    monkeypatch.setattr("fusionserve.training.frozen_base.check_no_adapter_beside", lambda _: None)
    with pytest.raises(TrainingError, match="beside the model"):
        load_base(str(beside))


def test_adapter_beside_the_base_of_a_run_is_refused(beside: Path) -> None:
    with pytest.raises(TrainingError, match=r"adapter_config\.json\) beside the model"):
        load_base(str(beside))


@pytest.mark.parametrize("quantize", QUANTIZATIONS)
@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4"])
def test_quantized_checkpoint_is_refused(method: str, quantize: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "load_in_8bit": method == "bitsandbytes"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="this checkpoint is quantized already") as caught:
        load_base_model(config_of(base, quantize))
    assert caught.value.reason == "QUANTIZATION_UNAVAILABLE"
    with pytest.raises(TrainingError, match="this checkpoint is quantized already"):
        load_base(str(base), quantize="none" if quantize == "int8" else quantize)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_weight_of_codes_is_not_taken_for_the_bases(dtype: torch.dtype) -> None:
    base = base_of_codes(dtype)
    with pytest.raises(AssertionError, match="says nothing without its scales"):
        base.base_weight(Q_PROJ)


def base_of_codes(dtype: torch.dtype) -> BaseModel:
    base = adapt_model(make_tiny_model(CONFIGS["llama"]()), config_of(Path("unread")), Tokenizer(None))
    module = base._base_module(Q_PROJ)
    codes = nn.Linear(module.in_features, module.out_features, bias=False)  # type: ignore[call-overload]
    codes.weight = nn.Parameter(codes.weight.detach().to(dtype), requires_grad=False)
    base.model.get_submodule(Q_PROJ).base = codes
    return base
