"""The modules of the base model that adapters may touch: their paths, kinds and shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusionserve.adapters.base_fingerprint import base_fingerprint
from fusionserve.adapters.stored_weights import StoredWeights
from fusionserve.config import EMBEDDED_MODEL, EMBEDDED_MODEL_NAME
from fusionserve.errors import StartupError


class ModuleKind(Enum):
    """How a module applies its weight; LM_HEAD is a LINEAR that also may be replaced as a whole."""

    LINEAR = "linear"  # weight [d_out, d_in]
    CONV1D = "conv1d"  # GPT-2's: weight [d_in, d_out]
    EMBEDDING = "embedding"  # weight [d_in, d_out] = [vocab, hidden], the input is a one-hot of the token
    LM_HEAD = "lm_head"  # weight [d_out, d_in] = [vocab, hidden]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModule:
    """One adaptable module; `path` is its name in the base model, without any adapter's prefix."""

    path: str
    kind: ModuleKind
    d_in: int
    d_out: int
    has_bias: bool

    @property
    def is_vocabulary(self) -> bool:
        """True for the input embedding and the LM head, whose weights are [vocab, hidden]."""
        return self.kind in (ModuleKind.EMBEDDING, ModuleKind.LM_HEAD)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """The shape of the base's own weight."""
        if self.kind in (ModuleKind.CONV1D, ModuleKind.EMBEDDING):
            return (self.d_in, self.d_out)
        return (self.d_out, self.d_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModules:
    """What adapters are checked against; immutable and independent of the live module tree.

    `model_name` is the served name, `checkpoint_names` what else the base is known by: the last part of its directory
    or hub id, and the embedded one by its own name; any may be empty. `is_tied` says that embedding and head are one
    tensor in the base.
    """

    model_name: str
    checkpoint_names: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    num_layers: int
    is_tied: bool
    by_path: Mapping[str, BaseModule]
    fingerprint: str = ""  # of the base's weights, see base_fingerprint.py

    def __hash__(self) -> int:
        """Of what tells bases apart, for plans are kept by it; a mapping has no hash of its own."""
        return hash((self.model_name, self.checkpoint_names, self.fingerprint))

    @property
    def embedding(self) -> BaseModule | None:
        """The input embedding."""
        return self._first(ModuleKind.EMBEDDING)

    @property
    def lm_head(self) -> BaseModule | None:
        """The LM head."""
        return self._first(ModuleKind.LM_HEAD)

    @property
    def vocabulary_paths(self) -> tuple[str, ...]:
        """Of the input embedding and the LM head."""
        return tuple(path for path, module in self.by_path.items() if module.is_vocabulary)

    def _first(self, kind: ModuleKind) -> BaseModule | None:
        return next((module for module in self.by_path.values() if module.kind is kind), None)


def describe_base_modules(
    model: PreTrainedModel, *, model_name: str = "", directory: Path | None = None
) -> BaseModules:
    """Lists the embedding, every plain linear module of the decoder layers, and the LM head, in model order.

    `directory` is where the model's weights were read from, if they were. Call it before any module is replaced.
    Left out are routers and others that are linear subclasses with a forward of their own, and the 3-D expert
    parameters of mixture models: low-rank rows cannot stand beside them.
    """
    config = model.config.get_text_config()
    head, embedding = _lm_head(model), model.get_input_embeddings()
    stored = None if directory is None else StoredWeights(directory, model.base_model_prefix)
    names = _checkpoint_names(str(getattr(model, "name_or_path", "") or ""))
    return BaseModules(
        model_name=short_model_name(model_name) or names[0],
        checkpoint_names=names,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        is_tied=head is not None and head.weight is embedding.weight,
        by_path=MappingProxyType({module.path: module for module in _list_modules(model)}),
        fingerprint=base_fingerprint(model, stored),
    )


def short_model_name(name: str) -> str:
    """The last part of a hub id or directory; for a hub cache's snapshot the model, not the commit."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].rsplit("--", 1)[-1]
    return parts[-1] if parts else ""


def _checkpoint_names(checkpoint: str) -> tuple[str, ...]:
    name = short_model_name(checkpoint)
    is_embedded = Path(checkpoint).resolve() == EMBEDDED_MODEL.resolve()
    return (name, EMBEDDED_MODEL_NAME) if is_embedded else (name,)


def _list_modules(model: PreTrainedModel) -> Iterator[BaseModule]:
    layers_prefix = _decoder_layers_path(model) + "."
    embedding, head = model.get_input_embeddings(), _lm_head(model)
    for path, module in model.named_modules():
        if module is embedding and isinstance(module, nn.Embedding):
            yield _describe(path, ModuleKind.EMBEDDING, module.num_embeddings, module.embedding_dim, None)
        elif module is head and isinstance(module, nn.Linear):
            yield _describe(path, ModuleKind.LM_HEAD, module.in_features, module.out_features, module.bias)
        elif path.startswith(layers_prefix) and _is_plain_linear(module):
            yield _describe(path, ModuleKind.LINEAR, module.in_features, module.out_features, module.bias)
        elif path.startswith(layers_prefix) and isinstance(module, Conv1D):
            yield _describe(path, ModuleKind.CONV1D, module.nx, module.nf, module.bias)


def _lm_head(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


def _describe(path: str, kind: ModuleKind, d_in: int, d_out: int, bias: object) -> BaseModule:
    return BaseModule(path=path, kind=kind, d_in=d_in, d_out=d_out, has_bias=bias is not None)


def _is_plain_linear(module: nn.Module) -> bool:
    """True for nn.Linear and its quantized forms; a subclass with another forward (a router) is not one."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or type(module).__module__.startswith("bitsandbytes.")


def _decoder_layers_path(model: PreTrainedModel) -> str:
    """The outermost list of as many modules as the model has layers. Raises StartupError if there is none."""
    num_layers: int = model.config.get_text_config().num_hidden_layers
    paths: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not paths:
        raise StartupError(
            f"{type(model).__name__} cannot be served: it has no list of {num_layers} decoder layers",
            reason="ARCHITECTURE_UNSUPPORTED",
        )
    return min(paths, key=lambda path: path.count("."))
