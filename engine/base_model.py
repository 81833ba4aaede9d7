"""Loads the frozen base model and puts the adapted layers in place of its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from fusionserve.adapters.adapted_embedding import AdaptedEmbedding
from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.adapters.base_checkpoint import one_line, read_checkpoint
from fusionserve.adapters.base_modules import BaseModules, ModuleKind, describe_base_modules
from fusionserve.adapters.model_source import find_model
from fusionserve.adapters.nf4 import dequantized_weight, is_nf4
from fusionserve.adapters.pool import AdapterPool
from fusionserve.adapters.row_plan import EMPTY_PLAN, PlanCell, RowPlan
from fusionserve.adapters.weight_bytes import weight_bytes
from fusionserve.config import MEBIBYTE, EngineConfig
from fusionserve.engine.attention import AttentionBatch, attending_to
from fusionserve.engine.cache_need import cache_bytes_per_token, check_context_fits, largest_budget
from fusionserve.engine.config_check import check_config
from fusionserve.engine.decoder_check import make_decoder
from fusionserve.engine.decoder_model import DecoderModel
from fusionserve.engine.device import find_device
from fusionserve.engine.fit_check import CacheShape, check_fit
from fusionserve.engine.generation_settings import end_tokens, read_generation_settings, tell_of_unapplied
from fusionserve.engine.loading_memory import little_garbage
from fusionserve.engine.panels import bring_into_panels
from fusionserve.engine.quantized_base import BITS, check_panels, load_options, settle
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.errors import StartupError
from fusionserve.kernels.linear_product import PanelEmbedding
from fusionserve.kernels.native_library import set_num_threads
from fusionserve.kernels.quantized_linear import QuantizedLinear

logger = logging.getLogger(__name__)

_DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DEFAULT_CONTEXT = 2048  # for a checkpoint that states no limit
_MIN_CONTEXT = 2  # a token of a prompt, and one generated


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model with adapted layers, and all that the engine needs to know of it. Weights are never written to."""

    model: PreTrainedModel
    decoder: DecoderModel | None  # what stands in for the model's own forward, if anything does
    tokenizer: Tokenizer
    modules: BaseModules
    pool: AdapterPool
    token_rows: PlanCell  # read by every module that sees all tokens
    logit_rows: PlanCell  # read by the LM head, which sees the tokens whose logits are wanted
    cache_shapes: Mapping[nn.Module, CacheShape]
    eos_token_ids: frozenset[int]
    max_context_tokens: int
    vocab_size: int
    dtype: torch.dtype  # of activations, the KV cache and all weights that are not quantized
    quantization: str  # of the linear modules: "none", "nf4", "int8" or "int4"

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        device: torch.device = self.model.device
        return device

    @property
    def weight_bytes(self) -> int:
        """Bytes of the base's parameters, tied ones once, with the scales of quantized ones."""
        return weight_bytes(self.model)

    @contextmanager
    def planned(self, token_rows: RowPlan, logit_rows: RowPlan | None = None) -> Iterator[None]:
        """Adapts the passes in its block: the tokens, and those whose logits are wanted (None: all of them)."""
        self.token_rows.plan, self.logit_rows.plan = token_rows, logit_rows or token_rows
        try:
            yield
        finally:
            self.token_rows.plan = self.logit_rows.plan = EMPTY_PLAN

    def logits(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor | None, batch: AttentionBatch
    ) -> Tensor:
        """token_ids and positions [num_tokens] -> [wanted, vocab]: of the tokens `wanted`, or of all (None)."""
        if self.decoder is not None:
            return self.decoder.logits(token_ids, positions, wanted, batch)
        with attending_to(batch):
            output = self.model(
                input_ids=token_ids[None],
                position_ids=positions[None],
                use_cache=False,
                # 0 is all, without copying what they are made of.
                logits_to_keep=0 if wanted is None else wanted,
            )
        logits: Tensor = output.logits[0]
        return logits

    def base_step(self, path: str) -> float:
        """By how much a number of `base_weight(path)` may be off the checkpoint's; 0.0 where it is held in full."""
        module = self._base_module(path)
        panels = module.head if isinstance(module, PanelEmbedding) else module
        return panels.largest_step if isinstance(panels, QuantizedLinear) else 0.0

    def _base_module(self, path: str) -> nn.Module:
        module = self.model.get_submodule(path)
        return module.base if isinstance(module, AdaptedLinear | AdaptedEmbedding) else module

    def base_weight(self, path: str) -> Tensor:
        """The frozen weight of the module at `path`, dequantized: [d_out, d_in] ([vocab, hidden] for the embedding)."""
        base = self._base_module(path)
        if is_nf4(base):
            return dequantized_weight(base)
        weight = base.weight
        assert isinstance(weight, Tensor)
        is_full = weight.is_floating_point() and weight.itemsize > 1
        assert is_full, (
            f"the weight of {path} is held as {weight.dtype}, which says nothing without its scales"
        )
        return weight.T if isinstance(base, Conv1D) else weight

    def base_bias(self, path: str) -> Tensor:
        """The frozen bias [d_out] of the module at `path`, which must have one."""
        bias = self._base_module(path).bias
        assert isinstance(bias, Tensor)
        return bias


def load_base_model(config: EngineConfig) -> BaseModel:
    """Loads, checks and adapts the model. Raises StartupError with one line that says what is wrong."""
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call] # a bar redrawn a hundred times fills a log
    if config.num_threads is not None:
        set_num_threads(config.num_threads)
    device = find_device(config.device)
    directory = find_model(config.model)
    model_config = _read_config(directory)
    max_context_tokens = _max_context(model_config, config.max_context_tokens)
    check_config(model_config, max_context_tokens, config.max_batch_tokens)
    tell_of_unapplied(read_generation_settings(directory))
    model = _read_weights(directory, model_config, _DTYPES[config.dtype], config.quantize, device)
    return adapt_model(model, config, Tokenizer(_read_tokenizer(directory)), directory)


def adapt_model(
    model: PreTrainedModel, config: EngineConfig, tokenizer: Tokenizer, directory: Path | None = None
) -> BaseModel:
    """The base of a model, whose layers are replaced by adapted ones, on the configured device.

    `directory` is where its weights were read from, if they were.
    A model on the host whose weights are to be quantized for a GPU is tried out on the host and follows module by
    module, so that one may be larger than the GPU's memory. Raises StartupError as `load_base_model` does.
    """
    device, bits = find_device(config.device), BITS.get(config.quantize)
    if bits is None and model.device != device:
        model.to(device)  # type: ignore[arg-type] # its stub has lost the first argument
    max_context_tokens = _max_context(model.config, config.max_context_tokens)
    modules = describe_base_modules(model, model_name=config.model_name, directory=directory)
    fit = check_fit(model, modules, max_context_tokens)
    # Asked before scales, with a type of their own, are among its parameters.
    base_dtype: torch.dtype = model.dtype
    check_context_fits(
        max_context_tokens,
        cache_bytes_per_token(fit.cache_shapes, base_dtype),
        block_size=config.block_size,
        budget_bytes=largest_budget(config, device),
    )
    pool = AdapterPool(fit.modules, config.adapter_pool_ranks, dtype=base_dtype, device=device)
    token_rows, logit_rows = PlanCell(), PlanCell()
    num_panels = bring_into_panels(model, fit.modules, bits, device)
    check_panels(model, num_panels, config.quantize)
    _install_adapted_layers(model, fit.modules, pool, token_rows, logit_rows)
    decoder = make_decoder(model, fit, max_context_tokens, base_dtype, is_quantized=config.quantize != "none")
    num_layers = len(decoder.layers) if decoder else 0
    logger.info("in panels: %d linear modules; decoder layers of our own: %d", num_panels, num_layers)
    base = BaseModel(
        model=model,
        decoder=decoder,
        tokenizer=tokenizer,
        modules=fit.modules,
        pool=pool,
        token_rows=token_rows,
        logit_rows=logit_rows,
        cache_shapes=fit.cache_shapes,
        eos_token_ids=end_tokens(model),
        max_context_tokens=max_context_tokens,
        vocab_size=model.config.get_text_config().vocab_size,
        dtype=base_dtype,
        quantization=config.quantize,
    )
    size = base.weight_bytes / MEBIBYTE
    logger.info(
        "base weights: %.1f MiB in %s, quantization %s", size, dtype_name(base_dtype), config.quantize
    )
    return base


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name as in configurations, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _read_config(directory: Path) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # what transformers raises depends on what the file holds
        raise StartupError(
            f"cannot load model {directory}: {_why_no_config(directory, error)}", reason="MODEL_NOT_FOUND"
        ) from error
    return config


def _why_no_config(directory: Path, error: Exception) -> str:
    if not directory.is_dir():
        return "it is not a directory"
    return one_line(error) if (directory / "config.json").exists() else "the directory has no config.json"


def _read_weights(
    directory: Path,
    model_config: PreTrainedConfig,
    dtype: torch.dtype | str,
    quantize: str,
    device: torch.device,
) -> PreTrainedModel:
    options = load_options(quantize, model_config, device)
    try:
        with little_garbage() if options else nullcontext():
            model = read_checkpoint(directory, model_config, dtype, options)
    except Exception as error:  # as above
        raise StartupError(
            f"cannot load model {directory}: {one_line(error)}", reason="MODEL_UNUSABLE"
        ) from error
    model.train(mode=False).requires_grad_(requires_grad=False)
    settle(model, quantize)
    return model


def _read_tokenizer(directory: Path) -> Any | None:
    """The model's tokenizer, or None if the directory has none."""
    if not _has_tokenizer_files(directory):
        return None  # transformers would make up an empty one for some architectures
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # as above
        raise StartupError(
            f"the tokenizer of model {directory} cannot be read: {one_line(error)}",
            reason="TOKENIZER_UNUSABLE",
        ) from error


def _has_tokenizer_files(directory: Path) -> bool:
    patterns = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
    return any(any(directory.glob(pattern)) for pattern in patterns)


def _install_adapted_layers(
    model: PreTrainedModel,
    modules: BaseModules,
    pool: AdapterPool,
    token_rows: PlanCell,
    logit_rows: PlanCell,
) -> None:
    for path, module in modules.by_path.items():
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        base = getattr(parent, name)
        if module.kind is ModuleKind.EMBEDDING:
            layer: nn.Module = AdaptedEmbedding(base, path, pool.rows(path), token_rows)
        else:
            cell = logit_rows if module.kind is ModuleKind.LM_HEAD else token_rows
            layer = AdaptedLinear(base, path, pool.rows(path), cell)
        setattr(parent, name, layer)


def _max_context(model_config: PreTrainedConfig, wanted: int | None) -> int:
    own = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if own is None:
        own = _DEFAULT_CONTEXT
    if own < _MIN_CONTEXT:
        raise StartupError(
            f"its max_position_embeddings is {own}, and a request has {_MIN_CONTEXT} tokens at least",
            reason="MODEL_UNUSABLE",
        )
    if wanted is not None and wanted > own:
        raise StartupError(
            f"a context of {wanted} tokens is more than the model's {own}", reason="CONTEXT_TOO_LONG"
        )
    return wanted or own
