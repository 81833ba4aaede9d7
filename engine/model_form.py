"""What models of known architectures are made of around their layers, read from transformers' modules.

    x = scale * embedding[ids] + positions;  x = layer(x) for each layer;
    logits = cap tanh(head norm(x) / (divisor cap))

Most families learn no positions and have no scale, cap or divisor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fusionserve.engine.layer_families import FAMILIES
from fusionserve.engine.layer_form import LayerForm, first_of, layer_form, read_norm
from fusionserve.kernels.norms import Norm
from fusionserve.kernels.paged_attention import AttentionOptions

_GRANITE = {"GraniteForCausalLM", "GraniteMoeForCausalLM"}
_COHERE = {"CohereForCausalLM", "Cohere2ForCausalLM"}
_CAPPED = {"Gemma2ForCausalLM", "Gemma3ForCausalLM"}
# The module of learned positions.
_POSITIONED = {"GPT2LMHeadModel": "wpe", "OPTForCausalLM": "embed_positions"}
_ARCHITECTURES = {*(f"{family}ForCausalLM" for family in FAMILIES), "GPT2LMHeadModel"}

_LAYERS = ("layers", "h")
_NORM = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """The modules of a model, and what they do not say themselves."""

    layers: tuple[LayerForm, ...]
    embedding: nn.Module
    embedding_scale: float
    positions: Tensor | None  # [positions, hidden], added to embeddings
    rotary: nn.Module | None  # what computes the angles
    norm: Norm
    head: nn.Module
    divisor: float  # of the logits
    cap: float | None


def model_form(model: PreTrainedModel, options: Mapping[nn.Module, AttentionOptions]) -> ModelForm | None:
    """The form of a model whose linear modules are adapted ones, or None if it is not known or a layer has none.

    `options` are those that its attention modules attend with.
    """
    source: Any = model
    base, name = getattr(source.base_model, "decoder", source.base_model), type(model).__name__
    has_narrow_embeddings = getattr(base, "project_in", None) is not None  # OPT's
    if name not in _ARCHITECTURES or has_narrow_embeddings:
        return None
    forms = [layer_form(layer, options) for layer in first_of(base, _LAYERS)]
    layers = tuple(form for form in forms if form is not None)
    norm = first_of(base, _NORM)
    if not layers or len(layers) < len(forms) or norm is None:
        return None
    return ModelForm(
        layers=layers,
        embedding=source.get_input_embeddings(),
        embedding_scale=base.embedding_multiplier if name in _GRANITE else 1.0,
        positions=_positions(getattr(base, _POSITIONED[name])) if name in _POSITIONED else None,
        rotary=getattr(base, "rotary_emb", None),
        norm=read_norm(norm, model.device),
        head=source.get_output_embeddings(),
        divisor=_divisor(source.config, name),
        cap=source.config.final_logit_softcapping if name in _CAPPED else None,
    )


def _divisor(config: Any, name: str) -> float:
    if name in _GRANITE:
        return float(config.logits_scaling)
    return 1 / float(config.logit_scale) if name in _COHERE else 1.0


def _positions(embedding: Any) -> Tensor:
    """The rows from position 0 on; OPT has two before them."""
    rows: Tensor = embedding.weight.detach()[getattr(embedding, "offset", 0) :]
    return rows
