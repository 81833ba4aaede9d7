"""GenerateRequest to GenerateParams: where a request is refused for what it says, whatever the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusionserve import limits
from fusionserve.errors import InvalidRequestError
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    ChatPrompt,
    FusionWeightDetail,
    GenerateParams,
    OutputOptions,
    Prompt,
    SamplingParams,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
)
from fusionserve.server import checks
from fusionserve.server.request_ids import check_request_id
from fusionserve.v1 import inference_pb2

MAX_ROLE_LENGTH = 64
KINDS: Mapping[str | None, str] = {None: "base", "adapter": "lora", "blend": "blend", "fusion": "fusion"}
FUSION_WEIGHT_DETAILS = {
    inference_pb2.FUSION_WEIGHT_DETAIL_UNSPECIFIED: FusionWeightDetail.NONE,
    inference_pb2.FUSION_WEIGHT_DETAIL_MEAN: FusionWeightDetail.MEAN,
    inference_pb2.FUSION_WEIGHT_DETAIL_PER_TOKEN: FusionWeightDetail.PER_TOKEN,
    inference_pb2.FUSION_WEIGHT_DETAIL_PER_MODULE: FusionWeightDetail.PER_MODULE,
}


def to_generate_params(request: inference_pb2.GenerateRequest, deadline_s: float) -> GenerateParams:
    """The request as the engine takes it. Raises InvalidRequestError for a value outside its range."""
    check_request_id(request.request_id)
    num_candidates = request.num_candidates if request.HasField("num_candidates") else 1
    checks.check_between("num_candidates", num_candidates, 1, limits.MAX_CANDIDATES)
    checks.check_between("priority", request.priority, -limits.MAX_PRIORITY, limits.MAX_PRIORITY)
    checks.check_length("cache_salt", request.cache_salt, 0, limits.MAX_CACHE_SALT_LENGTH)
    return GenerateParams(
        request_id=request.request_id,
        prompt=_to_prompt(request),
        adaptation=_to_adaptation(request),
        sampling=_to_sampling(request.sampling),
        stopping=_to_stopping(request.stopping),
        output=_to_output(request),
        num_candidates=num_candidates,
        priority=request.priority,
        cache_salt=request.cache_salt,
        deadline_s=deadline_s,
    )


def kind_of(request: inference_pb2.GenerateRequest) -> str:
    """The kind of adaptation a request asks for: base, lora, blend or fusion."""
    return KINDS[request.WhichOneof("adaptation")]


def to_chat_prompt(field: str, chat: inference_pb2.Chat) -> ChatPrompt:
    """The conversation. Raises InvalidRequestError if it is empty, too long or lacks a role."""
    _check_not_empty(f"{field}.messages", bool(chat.messages))
    checks.check_count(f"{field}.messages", chat.messages, limits.MAX_CHAT_MESSAGES, "TOO_MANY_MESSAGES")
    for index, message in enumerate(chat.messages):
        checks.check_length(f"{field}.messages[{index}].role", message.role, 1, MAX_ROLE_LENGTH)
    return ChatPrompt(tuple((message.role, message.content) for message in chat.messages))


def _to_prompt(request: inference_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            _check_not_empty("text", bool(request.text))
            return TextPrompt(request.text)
        case "token_ids":
            _check_not_empty("token_ids.ids", bool(request.token_ids.ids))
            return TokenPrompt(tuple(request.token_ids.ids))
        case "chat":
            return to_chat_prompt("chat", request.chat)
    raise InvalidRequestError(
        "one of text, token_ids and chat must be set", field="prompt", reason="PROMPT_REQUIRED"
    )


def _check_not_empty(field: str, is_filled: bool) -> None:
    if not is_filled:
        raise InvalidRequestError(f"{field} must not be empty", field=field, reason="PROMPT_EMPTY")


def _to_adaptation(request: inference_pb2.GenerateRequest) -> Adaptation:
    match request.WhichOneof("adaptation"):
        case "adapter":
            return Adaptation(kind="lora", terms=(_to_term(request.adapter),))
        case "blend":
            return Adaptation(kind="blend", terms=_to_terms(request.blend))
        case "fusion":
            return _to_fusion(request.fusion)
    return Adaptation()


def _to_term(selection: inference_pb2.AdapterSelection) -> AdapterTerm:
    scale = selection.scale if selection.HasField("scale") else 1.0
    checks.check_name("adapter.name", selection.name)
    checks.check_between("adapter.scale", scale, -limits.MAX_ADAPTER_SCALE, limits.MAX_ADAPTER_SCALE)
    return AdapterTerm(selection.name, scale)


def _to_terms(blend: inference_pb2.BlendSelection) -> tuple[AdapterTerm, ...]:
    field = "blend.members"
    checks.check_count(field, blend.members, limits.MAX_BLEND_MEMBERS, "TOO_MANY_MEMBERS")
    for index, member in enumerate(blend.members):
        bound = limits.MAX_ADAPTER_SCALE
        checks.check_name(f"{field}[{index}].name", member.name)
        checks.check_between(f"{field}[{index}].weight", member.weight, -bound, bound)
    _check_distinct(field, [member.name for member in blend.members])
    if not any(member.weight for member in blend.members):
        raise InvalidRequestError(
            f"{field} must have a member whose weight is not zero", field=field, reason="BLEND_EMPTY"
        )
    return tuple(AdapterTerm(member.name, member.weight) for member in blend.members)


def _to_fusion(fusion: inference_pb2.FusionSelection) -> Adaptation:
    field = "fusion.excluded_members"
    checks.check_name("fusion.name", fusion.name, "fusion")
    checks.check_count(field, fusion.excluded_members, limits.MAX_EXCLUDED_MEMBERS, "TOO_MANY_MEMBERS")
    for index, name in enumerate(fusion.excluded_members):
        checks.check_name(f"{field}[{index}]", name)
    _check_distinct(field, fusion.excluded_members)
    return Adaptation(kind="fusion", fusion=fusion.name, excluded_members=tuple(fusion.excluded_members))


def _check_distinct(field: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise InvalidRequestError(f"{field} names an adapter twice", field=field, reason="MEMBER_DUPLICATE")


def _to_sampling(sampling: inference_pb2.SamplingParams) -> SamplingParams:
    _check_sampling(sampling)
    given = {field.name: value for field, value in sampling.ListFields() if field.name != "logit_bias"}
    return SamplingParams(**given, logit_bias=_to_logit_bias(sampling.logit_bias))


def _check_sampling(sampling: inference_pb2.SamplingParams) -> None:
    checks.check_between("sampling.temperature", sampling.temperature, 0, limits.MAX_TEMPERATURE)
    checks.check_between("sampling.min_p", sampling.min_p, 0, 1)
    if sampling.HasField("top_p"):
        checks.check_above("sampling.top_p", sampling.top_p, 0, 1)
    if sampling.HasField("repetition_penalty"):
        bounds = limits.MIN_REPETITION_PENALTY, limits.MAX_REPETITION_PENALTY
        checks.check_between("sampling.repetition_penalty", sampling.repetition_penalty, *bounds)
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(sampling, name)
        checks.check_between(f"sampling.{name}", penalty, -limits.MAX_PENALTY, limits.MAX_PENALTY)


def _to_logit_bias(logit_bias: Mapping[int, float]) -> dict[int, float]:
    field = "sampling.logit_bias"
    checks.check_count(field, logit_bias, limits.MAX_LOGIT_BIAS_ENTRIES, "TOO_MANY_LOGIT_BIASES")
    for token_id, bias in logit_bias.items():
        checks.check_between(f"{field}[{token_id}]", bias, -limits.MAX_LOGIT_BIAS, limits.MAX_LOGIT_BIAS)
    return dict(logit_bias)


def _to_stopping(stopping: inference_pb2.StoppingCriteria) -> StoppingCriteria:
    max_new_tokens = stopping.max_new_tokens if stopping.HasField("max_new_tokens") else None
    if max_new_tokens is not None:
        checks.check_at_least("stopping.max_new_tokens", max_new_tokens, 1)
        checks.check_between("stopping.min_new_tokens", stopping.min_new_tokens, 0, max_new_tokens)
    _check_stops(stopping)
    return StoppingCriteria(
        max_new_tokens=max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        stop=tuple(stopping.stop),
        stop_token_ids=tuple(stopping.stop_token_ids),
        include_stop=stopping.include_stop,
        ignore_eos=stopping.ignore_eos,
        time_limit_s=_to_time_limit_s(stopping),
    )


def _check_stops(stopping: inference_pb2.StoppingCriteria) -> None:
    checks.check_count("stopping.stop", stopping.stop, limits.MAX_STOP_STRINGS, "TOO_MANY_STOPS")
    for index, text in enumerate(stopping.stop):
        checks.check_length(f"stopping.stop[{index}]", text, 1, limits.MAX_STOP_STRING_LENGTH)
    field = "stopping.stop_token_ids"
    checks.check_count(field, stopping.stop_token_ids, limits.MAX_STOP_TOKEN_IDS, "TOO_MANY_STOPS")


def _to_time_limit_s(stopping: inference_pb2.StoppingCriteria) -> float | None:
    if not stopping.HasField("time_limit"):
        return None
    seconds: float = stopping.time_limit.seconds + stopping.time_limit.nanos / 1e9
    if not seconds > 0:
        raise InvalidRequestError(
            "stopping.time_limit must be above 0", field="stopping.time_limit", reason="OUT_OF_RANGE"
        )
    return seconds


def _to_output(request: inference_pb2.GenerateRequest) -> OutputOptions:
    given = {field.name: value for field, value in request.output.ListFields()}
    given.pop("fusion_weights", None)
    ranges = {"stream_interval": (1, limits.MAX_STREAM_INTERVAL)}
    for name, number in given.items():
        checks.check_between(f"output.{name}", number, *ranges.get(name, (0, limits.MAX_LOGPROBS)))
    return OutputOptions(**given, fusion_weights=_to_fusion_weights(request))


def _to_fusion_weights(request: inference_pb2.GenerateRequest) -> FusionWeightDetail:
    field = "output.fusion_weights"
    detail = FUSION_WEIGHT_DETAILS.get(request.output.fusion_weights)
    if detail is None:
        raise InvalidRequestError(
            f"{field} must be one of FusionWeightDetail", field=field, reason="OUT_OF_RANGE"
        )
    if detail is not FusionWeightDetail.NONE and not request.HasField("fusion"):
        raise InvalidRequestError(f"{field} needs a fusion", field=field, reason="FUSION_REQUIRED")
    return detail
