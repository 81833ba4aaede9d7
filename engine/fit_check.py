"""Finds out, before serving, whether a model can be served packed and paged, instead of trusting a list of names.

The model runs two short prompts twice: apart, with transformers' plain attention, and packed into one row with ours. If
the logits differ, something besides plain attention is at work (a state space, ALiBi biases, attention sinks, ...). So
it is if the model hands its attention tensors that ours does not read, however little they do to these prompts. The
same run shows the shapes of each attention layer's keys and values, which layers have a sliding window, and which
linear modules see every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fusionserve.adapters.base_checkpoint import one_line
from fusionserve.adapters.base_modules import BaseModules
from fusionserve.adapters.module_calls import ModuleCalls
from fusionserve.adapters.routers import has_experts
from fusionserve.engine.attention import ATTENTION_NAME, attending_to, register_attention
from fusionserve.engine.config_check import num_windowed_layers
from fusionserve.errors import StartupError
from fusionserve.kernels.paged_attention import AttentionOptions, causal_mask, chunk_attention

_PROMPT_LENGTHS = (5, 7)
_MAX_ERROR = 3e-4  # of a position's logits, relative to their spread; float32 rounding stays far below
_MAX_ERROR_16_BIT = 0.1


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one attention layer stores per token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """As a LayerCache takes them."""
        return self.num_kv_heads, self.key_dim, self.value_dim


@dataclass(frozen=True, slots=True)
class ModelFit:
    """What the check found: each attention module's cache shape and options, and the modules that adapters may touch.

    `modules` are in the order in which a forward pass calls them.
    """

    cache_shapes: dict[nn.Module, CacheShape]
    attention_options: dict[nn.Module, AttentionOptions]
    modules: BaseModules


class _RecordingBatch:
    """Stands in for AttentionBatch: plain causal attention over each prompt, and notes of shapes and options."""

    def __init__(self) -> None:
        self.shapes: dict[nn.Module, CacheShape] = {}
        self.options: dict[nn.Module, AttentionOptions] = {}
        self.is_repeated = False
        self.is_causal = True
        self.unread: set[str] = set()

    def pass_over(self, handed: Mapping[str, object]) -> None:
        """Notes what may change the result; positions are in queries and keys already."""
        self.unread |= {name for name, value in handed.items() if isinstance(value, Tensor | list | tuple)}
        self.unread -= {"position_ids"}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.is_repeated |= module in self.shapes
        self.is_causal &= getattr(module, "is_causal", True) is not False
        self.options[module] = options
        self.shapes[module] = CacheShape(key.shape[1], key.shape[2], value.shape[2])
        outputs, start = [], 0
        for length in _PROMPT_LENGTHS:
            here = slice(start, start + length)
            mask = causal_mask(0, length, length, options.sliding_window).to(query.device)
            outputs.append(
                chunk_attention(query[here], key[here], value[here], torch.arange(length), mask, options)
            )
            start += length
        return torch.cat(outputs)


@torch.inference_mode()
def check_fit(model: PreTrainedModel, modules: BaseModules, max_context_tokens: int) -> ModelFit:
    """Switches `model` to paged attention and describes how it fits. Raises StartupError if it does not."""
    if getattr(model, "_is_stateful", False):
        raise _unsupported(model, "it carries a state from token to token")
    prompts = make_prompts(model)
    # The definition: what transformers 5.17 prefers leaves out Gemma 2's cap.
    model.set_attn_implementation("eager")
    apart = _run_apart(model, prompts)
    if not apart.isfinite().all():
        raise StartupError(
            "a short prompt gets logits that are not finite: the weights are not, or are too large for their type",
            reason="MODEL_UNUSABLE",
        )
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    batch = _RecordingBatch()
    with ModuleCalls(model, modules.by_path) as calls:
        packed = _run_packed(model, prompts, batch)
    _check_attention(model, batch, max_context_tokens)
    if not _error(model, apart.float(), packed.float()) <= max_error(model.dtype):
        raise _unsupported(model, "its output is not that of plain attention over the request's own tokens")
    num_tokens = sum(_PROMPT_LENGTHS)
    usable = {path: modules.by_path[path] for path, rows in calls.num_rows.items() if rows == num_tokens}
    return ModelFit(batch.shapes, batch.options, replace(modules, by_path=MappingProxyType(usable)))


def _check_attention(model: PreTrainedModel, batch: _RecordingBatch, max_context_tokens: int) -> None:
    if not batch.shapes:
        raise _unsupported(model, "its attention does not go through the attention interface")
    if batch.is_repeated:
        raise _unsupported(model, "one attention module serves several layers")
    if not batch.is_causal:
        raise _unsupported(model, "its attention is not causal")
    if batch.unread:
        raise _unsupported(
            model, f"its attention takes more into account than is served ({min(batch.unread)})"
        )
    num_windows = sum(options.sliding_window is not None for options in batch.options.values())
    if num_windows < num_windowed_layers(model.config, len(batch.shapes), max_context_tokens):
        raise _unsupported(model, "its sliding window does not go through the attention interface")


def _error(model: PreTrainedModel, apart: Tensor, packed: Tensor) -> float:
    """The largest of a position; of a mixture in 16 bits the median.

    There a last digit may bring a token to other experts, while an attention that is wrong is so at most positions.
    """
    errors = relative_errors(apart, packed)
    is_rerouted = model.dtype != torch.float32 and has_experts(model)
    return (errors.median() if is_rerouted else errors.max()).item()


def max_error(dtype: torch.dtype) -> float:
    """What `relative_errors` of two ways to the same logits may be in a type."""
    return _MAX_ERROR if dtype == torch.float32 else _MAX_ERROR_16_BIT


def relative_errors(expected: Tensor, actual: Tensor) -> Tensor:
    """Logits [tokens, vocab] -> [tokens]: |difference| / |expected|, once what all logits share is taken out."""
    expected, actual = (logits - logits.mean(dim=-1, keepdim=True) for logits in (expected, actual))
    errors: Tensor = (expected - actual).norm(dim=-1) / expected.norm(dim=-1)
    return errors


def make_prompts(model: PreTrainedModel) -> list[Tensor]:
    """Some token ids each, the same every time."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    return [
        torch.randint(vocab_size, (length,), generator=generator).to(model.device)
        for length in _PROMPT_LENGTHS
    ]


def _run_apart(model: PreTrainedModel, prompts: list[Tensor]) -> Tensor:
    """Logits [tokens, vocab] of the prompts one by one, under the model's own attention."""
    return torch.cat([_run(model, "it fails on a short prompt", input_ids=ids[None]) for ids in prompts])


def in_one_row(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and positions [tokens] of the prompts, one behind the other."""
    return torch.cat(list(prompts)), torch.cat([torch.arange(len(ids), device=ids.device) for ids in prompts])


def _run_packed(model: PreTrainedModel, prompts: list[Tensor], batch: _RecordingBatch) -> Tensor:
    """Logits [tokens, vocab] of the prompts in one row, under ours."""
    token_ids, positions = in_one_row(prompts)
    with attending_to(batch):
        return _run(
            model,
            "it cannot run packed requests",
            input_ids=token_ids[None],
            position_ids=positions[None],
            logits_to_keep=torch.arange(len(positions), device=positions.device),
        )


def _run(model: PreTrainedModel, why_not: str, **inputs: object) -> Tensor:
    """Logits [tokens, vocab] of one row; `why_not` is the reason given, with its own, if the model's code fails."""
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise _unsupported(model, f"{why_not}: {one_line(error)}") from error
    return logits[0]


def _unsupported(model: PreTrainedModel, why: str) -> StartupError:
    return StartupError(
        f"the architecture {type(model).__name__} cannot be served: {why}", reason="ARCHITECTURE_UNSUPPORTED"
    )
