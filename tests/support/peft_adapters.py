"""PEFT as the oracle: tiny random models, adapters with random weights, and what PEFT's layers compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

PREFIX = "base_model.model."


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silences PEFT's advice on saving embeddings, tied weights and unusual options, and what its code deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        warnings.filterwarnings("ignore", module=r"peft\.")
        yield


def make_tiny_llama(*, tie: bool = False, bias: bool = False) -> PreTrainedModel:
    """Two layers, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
        attention_bias=bias,
    )
    return LlamaForCausalLM(config).eval()


def make_tiny_gpt2() -> PreTrainedModel:
    """Two layers of Conv1D, seeded."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def adapt(model: PreTrainedModel, **options: object) -> PeftModel:
    """A copy of `model` with a LoRA adapter whose every trained parameter is random."""
    peft_model = wrap(model, **options)
    randomize(peft_model)
    return peft_model


def wrap(model: PreTrainedModel, **options: object) -> PeftModel:
    """A copy of `model` with a LoRA adapter as PEFT starts it."""
    with quiet_peft():
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, **options})
        return get_peft_model(copy.deepcopy(model), config).eval()


def randomize(peft_model: PeftModel, *, seed: int = 1) -> None:
    """Gives all that the adapter trains new values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def save(peft_model: PeftModel, directory: Path, **options: object) -> Path:
    """PEFT's own save."""
    with quiet_peft():
        peft_model.save_pretrained(str(directory), **options)
    return directory


def reload(model: PreTrainedModel, directory: Path) -> PeftModel:
    """PEFT's own load, on a copy of `model`."""
    with quiet_peft():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(directory)).eval()


def lora_layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """PEFT's adapted layers by module path."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module, BaseTunerLayer)
    }


def layer_delta(layer: LoraLayer, x: Tensor) -> Tensor:
    """What PEFT adds to the base layer's output."""
    assert isinstance(layer, nn.Module)
    with torch.no_grad():
        difference: Tensor = layer(x) - layer.base_layer(x)
    return difference
