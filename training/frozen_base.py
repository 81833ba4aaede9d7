"""The base model that a run adapts: loaded, frozen and described."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fusionserve.adapters.base_checkpoint import check_not_quantized, one_line, read_checkpoint
from fusionserve.adapters.base_modules import BaseModules, describe_base_modules, short_model_name
from fusionserve.adapters.model_source import find_model
from fusionserve.adapters.module_calls import ModuleCalls
from fusionserve.adapters.nf4 import keep_layout, quantization_options
from fusionserve.config import EMBEDDED_MODEL, EMBEDDED_MODEL_NAME
from fusionserve.errors import StartupError, TrainingError

# Differences of packed logits, relative to their spread.
_MAX_LEAK = 1e-3  # when another example stands in front: nothing at all is to change
_MAX_ERROR = 0.2  # from the example alone, whose products are rounded in another order


@dataclass(frozen=True, slots=True, eq=False)
class FrozenBase:
    """A base model without trainable weights; `modules` are in the order in which a forward pass calls them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # how an artifact names it: without folders
    modules: BaseModules

    @property
    def max_tokens(self) -> int | None:
        """The longest text it reads; None if it does not say."""
        most: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return most


def load_base(model: str | None, dtype: str = "auto", quantize: str = "none") -> FrozenBase:
    """Loads a folder, a hub id, or with None the embedded base. Raises TrainingError if it cannot be had.

    `dtype` "auto" is the checkpoint's, and bfloat16 for one in float16.
    """
    name = EMBEDDED_MODEL_NAME if model is None else short_model_name(model)
    directory = EMBEDDED_MODEL if model is None else _find(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        check_not_quantized(config)
        dtype = _auto_dtype(config) if dtype == "auto" else dtype
        loaded = read_checkpoint(directory, config, dtype, quantization_options(quantize, config))
    except Exception as error:  # what transformers raises depends on what the files hold
        raise TrainingError(f"the base model {name} cannot be loaded: {one_line(error)}") from error
    loaded.config.use_cache = False
    keep_layout(loaded)
    return freeze_base(loaded, tokenizer, name, directory)


def _find(model: str) -> Path:
    try:
        return find_model(model)
    except StartupError as error:
        raise TrainingError(error.message) from error


def freeze_base(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, directory: Path | None = None
) -> FrozenBase:
    """The same for a model that is in memory, read from `directory` if from any."""
    model.requires_grad_(False)
    modules = describe_base_modules(model, model_name=name, directory=directory)
    return FrozenBase(model, tokenizer, name, in_call_order(model, modules))


def in_call_order(model: PreTrainedModel, modules: BaseModules) -> BaseModules:
    """`modules` as a short forward pass calls them, without those that do not see every token once."""
    token_ids = torch.arange(3, device=model.device).unsqueeze(0)
    with ModuleCalls(model, modules.by_path) as calls, torch.no_grad():
        _in_evaluation(model)(input_ids=token_ids, use_cache=False)
    called = [path for path, num_rows in calls.num_rows.items() if num_rows == token_ids.numel()]
    return replace(modules, by_path=MappingProxyType({path: modules.by_path[path] for path in called}))


@torch.no_grad()
def check_packing(base: FrozenBase) -> None:
    """Raises TrainingError if packed examples would see each other in this model."""
    vocabulary = base.modules.vocab_size
    first = torch.tensor([1, 2, 3, 4, 5]) % vocabulary
    second = torch.tensor([7, 6, 5, 4, 3, 2, 1]) % vocabulary
    alone = _logits(base.model, second)
    packed, other = (_logits(base.model, beginning, second)[5:] for beginning in (first, first.flip(0)))
    spread = float(alone.std())
    if not (
        _largest(packed - other) <= _MAX_LEAK * spread and _largest(packed - alone) <= _MAX_ERROR * spread
    ):
        raise TrainingError(f"in {base.name} packed examples would see each other; train with --packing off")


def check_dtype(base: FrozenBase) -> None:
    """Raises TrainingError for a base in float16: small gradients of a mean over many tokens would be zeros."""
    if any(parameter.dtype == torch.float16 for parameter in base.model.parameters()):
        raise TrainingError(
            f"{base.name} is in float16, where gradients vanish; train with --dtype bfloat16 or float32"
        )


def _auto_dtype(config: PreTrainedConfig) -> str:
    """The checkpoint's, but one that can be trained over."""
    return "bfloat16" if config.dtype == torch.float16 else "auto"


def _logits(model: PreTrainedModel, *texts: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of texts packed into one row."""
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    inputs = (torch.cat(texts), positions)
    token_ids, position_ids = (tensor.unsqueeze(0).to(model.device) for tensor in inputs)
    logits: Tensor = _in_evaluation(model)(
        input_ids=token_ids, position_ids=position_ids, use_cache=False
    ).logits[0]
    return logits.float()


def _in_evaluation(model: PreTrainedModel) -> nn.Module:
    module: nn.Module = model
    return module.eval()


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())
