"""Small models, and what transformers and PEFT compute with their weights in few bits: an oracle for serving."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft_adapters import quiet_peft
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fusionserve.adapters.nf4 import compute_in_float32, quantization_options, repack
from fusionserve.engine.quantized_base import BITS
from fusionserve.kernels.quantized_linear import in_eight_bits, quantize

VOCAB, HIDDEN, INNER = 48, 64, 128


def make_model(family: str) -> PreTrainedModel:
    """Two layers as wide as a block of NF4 at least, with weights large enough for lively text."""
    torch.manual_seed(7)
    if family == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


class LinearInFewBits(torch.nn.Linear):
    """A linear module with the quantized weight as plain numbers, and inputs as the product sees them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(in_eight_bits(x))


class Conv1DInFewBits(Conv1D):
    """The same for GPT-2's [d_in, d_out]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(in_eight_bits(x))


def model_in_few_bits(directory: Path, bits: str) -> PreTrainedModel:
    """transformers' own model in float32 over weights in so many bits; PEFT can wrap it."""
    if bits == "nf4":
        return nf4_model(directory)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # GPT-2's is tied
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = quantize(module.weight, None, 8 if path == "lm_head" else BITS[bits]).weight
            module.__class__ = LinearInFewBits
        elif isinstance(module, Conv1D):
            module.weight.data = quantize(module.weight.T, None, BITS[bits]).weight.T.contiguous()
            module.__class__ = Conv1DInFewBits
    if model.config.tie_word_embeddings:
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(model.lm_head.weight))
    return model


def served_by_peft(directory: Path, adapter: Path, bits: str) -> torch.nn.Module:
    """PEFT's model over it; a head that the adapter saved whole is in full, a copy of the base's is not."""
    with quiet_peft():
        model = PeftModel.from_pretrained(model_in_few_bits(directory, bits), str(adapter)).eval()
    for path, module in model.named_modules():
        if path.endswith("modules_to_save.default"):
            module.__class__ = torch.nn.Linear
        if path.endswith("lm_head.base_layer") and bits != "nf4":
            module.weight.data = quantize(module.weight, None, 8).weight
    return model


def nf4_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model over NF4, computing as the server does with this type."""
    options = quantization_options("nf4", AutoConfig.from_pretrained(directory))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": "cpu"}, **options
    ).eval()
    (compute_in_float32 if dtype == torch.float32 else repack)(model)
    return model
