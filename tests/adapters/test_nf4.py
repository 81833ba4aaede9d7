"""Linear modules in four bits: which they are, what they compute with in both layouts, and what they need."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fusionserve.adapters.nf4 import (
    compute_in_float32,
    dequantized_weight,
    keep_layout,
    nf4_modules,
    quantization_options,
    repack,
)

HIDDEN, INNER = 64, 96  # 96 inputs are one block and a half, so down_proj stays as it is
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def load(checkpoint: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        device_map={"": "cpu"},
        **quantization_options("nf4", AutoConfig.from_pretrained(checkpoint)),
    )
    return model.eval()


def computed_weight(module: nn.Module) -> torch.Tensor:
    """The weight as products show it."""
    with torch.no_grad():
        weight: torch.Tensor = module(torch.eye(module.in_features, dtype=module.compute_dtype)).T.float()  # type: ignore[call-overload]
    return weight


def test_linear_modules_of_whole_blocks_are_quantized_but_the_head(checkpoint: Path) -> None:
    paths = list(nf4_modules(load(checkpoint)))
    assert {path.rpartition(".")[2] for path in paths} == set(PROJECTIONS)
    assert len(paths) == 2 * len(PROJECTIONS)


@pytest.mark.parametrize("settle", [keep_layout, repack, compute_in_float32])
def test_dequantized_weight_is_what_products_show(checkpoint: Path, settle: object) -> None:
    """To the rounding of the products: 8 bits of mantissa in bfloat16, and once more for a scale in it."""
    assert callable(settle)
    model = load(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    settle(model)
    for path, module in nf4_modules(model).items():
        weight = dequantized_weight(module).float()
        torch.testing.assert_close(weight, computed_weight(module), rtol=2**-7, atol=1e-6)
        original = plain.get_submodule(path).weight.detach()
        assert (
            float((weight - original).norm() / original.norm()) < 0.13
        )  # what four bits lose of normal numbers


def test_repacked_products_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    model = load(checkpoint)
    repack(model)
    inputs = torch.randn(65, HIDDEN, dtype=torch.bfloat16)
    module = nf4_modules(model)["model.layers.0.mlp.up_proj"]
    with torch.inference_mode():
        together = module(inputs)
        for size in (1, 2, 3, 7, 16, 33, 64):
            assert torch.equal(module(inputs[1 : 1 + size]), together[1 : 1 + size])


def test_no_forward_pass_changes_settled_weights(checkpoint: Path) -> None:
    for dtype, settle in ((torch.bfloat16, repack), (torch.float32, compute_in_float32)):
        model = load(checkpoint, dtype)
        settle(model)
        before = {path: module.weight.data.data_ptr() for path, module in nf4_modules(model).items()}
        with torch.inference_mode():
            model(input_ids=torch.arange(5)[None])
        after = {path: module.weight.data.data_ptr() for path, module in nf4_modules(model).items()}
        assert after == before


@pytest.mark.parametrize("package", ["accelerate", "bitsandbytes"])
def test_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find_spec(n))
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'fusionserve\[nf4\]'"):
        quantization_options("nf4", LlamaConfig())
    assert quantization_options("none", LlamaConfig()) == {}


def test_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="not as int3"):
        quantization_options("int3", LlamaConfig())


def test_bitsandbytes_says_nothing_as_it_is_imported() -> None:
    code = (
        "from transformers import LlamaConfig; from fusionserve.adapters.nf4 import quantization_options;"
        "quantization_options('nf4', LlamaConfig(num_hidden_layers=1)); import bitsandbytes"
    )
    done = subprocess.run((sys.executable, "-P", "-c", code), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
