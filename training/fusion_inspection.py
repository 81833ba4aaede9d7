"""What a fusion on disk attends to while it reads a text: its weights by token, layer and member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.artifact_folders import ADAPTER_CONFIG, find_by_name
from fusionserve.errors import InvalidRequestError
from fusionserve.fusion.loader import read_fusion_config
from fusionserve.fusion.params import layer_of
from fusionserve.inspection_request import InspectionRequest
from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.fusion_measuring import PlacedFusion, placed_fusion
from fusionserve.training.fusion_watch import entropy
from fusionserve.training.token_texts import split_text

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, eq=False)
class InspectedText:
    """A text, its tokens, and the weights that every attention gave the members at each of them."""

    text: str
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    weights: FloatArray  # [attentions, tokens, members (+ 1)]
    entropy: float  # nats, mean over tokens and attentions

    @property
    def by_token(self) -> FloatArray:
        """[tokens, members]: mean over the attentions."""
        return _mean(self.weights, 0)

    @property
    def mean(self) -> FloatArray:
        """[members]: mean over attentions and tokens."""
        return _mean(self.by_token, 0)


@dataclass(frozen=True, slots=True, eq=False)
class FusionInspection:
    """One fusion before several texts."""

    name: str
    base_model: str
    members: tuple[str, ...]  # of the weights, `base` included where it may be chosen
    attentions: tuple[str, ...]  # module paths
    texts: tuple[InspectedText, ...]

    @property
    def max_entropy(self) -> float:
        """Nats of even weights."""
        return float(np.log(len(self.members)))

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers with an attention, in call order; a module outside them counts as one."""
        return tuple(dict.fromkeys(map(layer_of, self.attentions)))

    def by_layer(self, text: InspectedText) -> FloatArray:
        """[layers, members]: mean over the tokens and over the attentions of each layer."""
        by_attention = _mean(text.weights, 1)
        own = np.array([layer_of(path) for path in self.attentions])
        return np.stack([_mean(by_attention[own == layer], 0) for layer in self.layers])


def inspect_fusion(request: InspectionRequest, *, base: FrozenBase | None = None) -> FusionInspection:
    """Reads each text once with the fusion on its base, unfolded.

    `base` may be given to save loading it. Raises InvalidRequestError for members that are not to be found and texts
    that the model cannot read, TrainingError for the base, ArtifactError if the server would refuse the fusion.
    """
    members = _find_members(request)
    base = base or load_base(request.model, request.dtype)
    with placed_fusion(
        request.fusion, base, members, allow_base_mismatch=request.allow_base_mismatch
    ) as placed:
        texts = tuple(_read(placed, text, i) for i, text in enumerate(request.prompts, start=1))
        attentions = tuple(placed.fusion.weights)
    return FusionInspection(request.fusion.resolve().name, base.name, placed.names, attentions, texts)


def _find_members(request: InspectionRequest) -> Mapping[str, Path]:
    """Every member's directory; the base is not yet loaded, so a missing one costs no time."""
    with open_directory(request.fusion) as opened:
        names = [member.name for member in read_fusion_config(opened).members]
    given = dict(request.members)
    for name in given:
        if name not in names:
            raise _bad_member(f"the fusion has no member {name!r}; it has {', '.join(names)}")
    return {name: given.get(name) or _find(name, request.adapter_dirs) for name in names}


def _find(name: str, folders: Sequence[Path]) -> Path:
    found = find_by_name(name, folders, ADAPTER_CONFIG)
    if found is None:
        raise _bad_member(f"the fusion's member {name!r} is in no adapter folder; say --member {name}=PATH")
    return found


def _bad_member(problem: str) -> InvalidRequestError:
    return InvalidRequestError(problem, field="member")


@torch.no_grad()
def _read(placed: PlacedFusion, text: str, number: int) -> InspectedText:
    token_ids, texts = split_text(placed.base.tokenizer, text)
    _check_length(placed.base, len(token_ids), number)
    model = placed.base.model
    model.eval()  # type: ignore[no-untyped-call]
    ids = torch.tensor([token_ids], device=model.device)
    model(input_ids=ids, use_cache=False, logits_to_keep=_num_logits(placed))
    weights = torch.stack(list(placed.fusion.weights.values())).double()
    mean_entropy = max(0.0, float(entropy(weights).mean()))  # of a single member it is rounded to -0
    return InspectedText(text, token_ids, texts, weights.cpu().numpy(), mean_entropy)


def _num_logits(placed: PlacedFusion) -> int:
    """Tokens with logits, a vocabulary each, which nobody reads: one; an attention at the head sees all, which 0 is."""
    head = placed.base.modules.lm_head
    return 0 if head is not None and head.path in placed.fusion.attention_paths else 1


def _check_length(base: FrozenBase, num_tokens: int, number: int) -> None:
    most = base.max_tokens
    if num_tokens == 0:
        raise InvalidRequestError(f"prompt {number} has no tokens", field="prompt")
    if most is not None and num_tokens > most:
        raise InvalidRequestError(
            f"prompt {number} has {num_tokens} tokens; {base.name} reads {most}", field="prompt"
        )


def _mean(values: FloatArray, axis: int) -> FloatArray:
    mean: FloatArray = values.mean(axis=axis)
    return mean
