"""Builds the API's requests from plain Python values; a None or missing option means the server's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypedDict, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from fusionserve.v1.inference_pb2 import (
    AdapterSelection,
    BlendMember,
    BlendSelection,
    Chat,
    ChatMessage,
    FusionSelection,
    FusionWeightDetail,
    GenerateRequest,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenIds,
    TokenizeRequest,
)

FUSION_WEIGHT_DETAILS = {
    "mean": FusionWeightDetail.FUSION_WEIGHT_DETAIL_MEAN,
    "per_token": FusionWeightDetail.FUSION_WEIGHT_DETAIL_PER_TOKEN,
    "per_module": FusionWeightDetail.FUSION_WEIGHT_DETAIL_PER_MODULE,
}

ChatMessages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | ChatMessages

MessageT = TypeVar("MessageT", bound=Message)


class GenerateOptions(TypedDict, total=False):
    """Everything about a generation but its prompt; inference.proto has each field's default and range."""

    adapter: str | None  # one LoRA adapter ...
    scale: float | None  # ... and what its delta is multiplied with
    blend: Mapping[str, float] | None  # or several adapters with their weights
    fusion: str | None  # or a trained fusion of adapters ...
    excluded_members: Sequence[str] | None  # ... without some of its members
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    logit_bias: Mapping[int, float] | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop: bool | None
    ignore_eos: bool | None
    time_limit_s: float | None  # ends with the text so far; a call's timeout ends with an error
    logprobs: int | None
    prompt_logprobs: int | None
    fusion_weights: Literal["mean", "per_token", "per_module"] | None
    stream_interval: int | None  # tokens in a chunk, at least
    num_candidates: int | None
    priority: int | None
    cache_salt: str | None
    request_id: str | None


def to_generate_request(prompt: Prompt, options: GenerateOptions) -> GenerateRequest:
    """The request for `prompt`: text, token ids, or chat messages such as {"role": "user", "content": "hi"}.

    Raises TypeError for an option that does not exist, ValueError for options that contradict each other.
    """
    if unknown := options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in cast(Mapping[str, Any], options).items() if value is not None}
    request = _from_options(GenerateRequest, given, **_prompt(prompt), **_adaptation(given))
    request.sampling.CopyFrom(_from_options(SamplingParams, given))
    request.stopping.CopyFrom(_stopping(given))
    request.output.CopyFrom(_output(given))
    return request


def to_tokenize_request(text: str | ChatMessages, add_special_tokens: bool) -> TokenizeRequest:
    """The request for the tokens of a text or of chat messages."""
    return TokenizeRequest(**_prompt(text), add_special_tokens=add_special_tokens)


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], Mapping):
        return {"chat": Chat(messages=[ChatMessage(**message) for message in items])}
    return {"token_ids": TokenIds(ids=items)}


def _adaptation(given: Mapping[str, Any]) -> dict[str, Any]:
    if len(given.keys() & {"adapter", "blend", "fusion"}) > 1:
        raise ValueError("adapter, blend and fusion exclude each other")
    if "scale" in given and "adapter" not in given:
        raise ValueError("scale needs an adapter")
    if "excluded_members" in given and "fusion" not in given:
        raise ValueError("excluded_members needs a fusion")
    if "adapter" in given:
        return {"adapter": AdapterSelection(name=given["adapter"], scale=given.get("scale"))}
    if "blend" in given:
        members = [BlendMember(name=name, weight=weight) for name, weight in given["blend"].items()]
        return {"blend": BlendSelection(members=members)}
    if "fusion" in given:
        excluded = given.get("excluded_members", ())
        return {"fusion": FusionSelection(name=given["fusion"], excluded_members=excluded)}
    return {}


def _stopping(given: Mapping[str, Any]) -> StoppingCriteria:
    stop = given.get("stop", ())
    limit = Duration()
    limit.FromTimedelta(timedelta(seconds=given.get("time_limit_s", 0)))
    return _from_options(
        StoppingCriteria,
        {name: value for name, value in given.items() if name != "stop"},
        stop=[stop] if isinstance(stop, str) else stop,
        time_limit=limit if "time_limit_s" in given else None,
    )


def _output(given: Mapping[str, Any]) -> OutputOptions:
    detail = given.get("fusion_weights")
    if detail is not None and detail not in FUSION_WEIGHT_DETAILS:
        raise ValueError(f"fusion_weights must be one of {', '.join(FUSION_WEIGHT_DETAILS)}")
    weights = None if detail is None else FUSION_WEIGHT_DETAILS[detail]
    return _from_options(OutputOptions, given, fusion_weights=weights)


def _from_options(kind: type[MessageT], given: Mapping[str, Any], **fields: Any) -> MessageT:
    """A message with `fields` and every option that has the name of one of its other fields."""
    names = [field.name for field in kind.DESCRIPTOR.fields if field.name not in fields]
    return kind(**fields, **{name: given[name] for name in names if name in given})
