"""Converts the API's responses to the client's results."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC
from enum import StrEnum
from typing import Protocol, TypeVar

from fusionserve.client import results
from fusionserve.v1 import adapter_pb2, inference_pb2

EnumT = TypeVar("EnumT", bound=StrEnum)


class EnumNames(Protocol):
    """The part of a generated enum type that is used here."""

    def Name(self, number: int) -> str: ...

    def values(self) -> list[int]: ...


def to_generation(response: inference_pb2.GenerateResponse) -> results.Generation:
    """The whole result of a generation."""
    timings = response.timings
    return results.Generation(
        request_id=response.request_id,
        candidates=tuple(_candidate(candidate) for candidate in response.candidates),
        usage=_usage(response.usage),
        adaptation=_adaptation(response.adaptation),
        timings=results.Timings(
            queue_s=timings.queue.ToTimedelta().total_seconds(),
            time_to_first_token_s=timings.time_to_first_token.ToTimedelta().total_seconds(),
            total_s=timings.total.ToTimedelta().total_seconds(),
        ),
        prompt_logprobs=_logprobs(response.prompt_logprobs),
        fusion_weights=(
            _fusion_weights(response.fusion_weights) if response.HasField("fusion_weights") else None
        ),
    )


def to_event(response: inference_pb2.StreamGenerateResponse) -> results.GenerationEvent | None:
    """One event of a stream; None is a kind of event newer than this client."""
    match response.WhichOneof("event"):
        case "started":
            return results.GenerationStarted(
                request_id=response.started.request_id,
                usage=_usage(response.started.usage),
                adaptation=_adaptation(response.started.adaptation),
            )
        case "chunk":
            chunk = response.chunk
            return results.GenerationChunk(
                index=chunk.index,
                text=chunk.text,
                token_ids=tuple(chunk.token_ids),
                logprobs=_logprobs(chunk.logprobs),
                fusion_weights=_token_weights(chunk.fusion_weights),
            )
        case "finished":
            return to_generation(response.finished)
    return None


def to_adapter(adapter: adapter_pb2.Adapter) -> results.Adapter:
    """A snapshot of one adapter."""
    pb = adapter_pb2.Adapter
    return results.Adapter(
        name=adapter.name,
        version=adapter.version,
        digest=adapter.digest,
        state=_enum(results.AdapterState, pb.State, adapter.state, "STATE_"),
        residency=_enum(results.Residency, pb.Residency, adapter.residency, "RESIDENCY_"),
        max_rank=adapter.max_rank,
        target_modules=tuple(adapter.target_modules),
        host_bytes=adapter.host_bytes,
        pinned=adapter.pinned,
        active_requests=adapter.active_requests,
        held_by_fusions=tuple(adapter.held_by_fusions),
        load_time=adapter.load_time.ToDatetime(UTC) if adapter.HasField("load_time") else None,
    )


def to_fusion(fusion: adapter_pb2.Fusion) -> results.Fusion:
    """A snapshot of one fusion."""
    pb = adapter_pb2.Adapter
    members = (results.FusionMember(name=member.name, digest=member.digest) for member in fusion.members)
    return results.Fusion(
        name=fusion.name,
        version=fusion.version,
        digest=fusion.digest,
        state=_enum(results.AdapterState, pb.State, fusion.state, "STATE_"),
        residency=_enum(results.Residency, pb.Residency, fusion.residency, "RESIDENCY_"),
        members=tuple(members),
        modules=tuple(fusion.modules),
        scope=fusion.scope,
        d_key=fusion.d_key,
        member_keys=fusion.member_keys,
        value_kind=fusion.value_kind,
        temperature=fusion.temperature,
        base_member=fusion.base_member,
        pool_ranks=fusion.pool_ranks,
        host_bytes=fusion.host_bytes,
        pinned=fusion.pinned,
        active_requests=fusion.active_requests,
        load_time=fusion.load_time.ToDatetime(UTC) if fusion.HasField("load_time") else None,
    )


def to_model(response: inference_pb2.GetModelResponse) -> results.Model:
    """The description of the base model and the server's limits."""
    limits = response.limits
    return results.Model(
        name=response.name,
        architecture=response.architecture,
        dtype=response.dtype,
        quantization=response.quantization,
        weight_bytes=response.weight_bytes,
        max_context_tokens=response.max_context_tokens,
        vocab_size=response.vocab_size,
        has_tokenizer=response.has_tokenizer,
        has_chat_template=response.has_chat_template,
        eos_token_ids=tuple(response.eos_token_ids),
        limits=results.ServerLimits(
            max_batch_tokens=limits.max_batch_tokens,
            max_batch_requests=limits.max_batch_requests,
            adapter_pool_ranks=limits.adapter_pool_ranks,
            max_adapter_rank=limits.max_adapter_rank,
            adapter_host_bytes=limits.adapter_host_bytes,
        ),
        version=response.version,
    )


def _candidate(candidate: inference_pb2.Candidate) -> results.Candidate:
    reason = _enum(
        results.FinishReason, inference_pb2.FinishReason, candidate.finish_reason, "FINISH_REASON_"
    )
    return results.Candidate(
        index=candidate.index,
        text=candidate.text,
        token_ids=tuple(candidate.token_ids),
        finish_reason=reason,
        stop_string=candidate.stop_string if candidate.HasField("stop_string") else None,
        stop_token_id=candidate.stop_token_id if candidate.HasField("stop_token_id") else None,
        logprobs=_logprobs(candidate.logprobs),
    )


def _usage(usage: inference_pb2.Usage) -> results.Usage:
    return results.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        generated_tokens=usage.generated_tokens,
    )


def _adaptation(adaptation: inference_pb2.ResolvedAdaptation) -> results.ResolvedAdaptation:
    members = tuple(
        results.ResolvedMember(
            name=member.name, weight=member.weight, version=member.version, digest=member.digest
        )
        for member in adaptation.members
    )
    return results.ResolvedAdaptation(
        kind=adaptation.kind,
        members=members,
        name=adaptation.name,
        version=adaptation.version,
        digest=adaptation.digest,
    )


def _fusion_weights(weights: inference_pb2.FusionWeights) -> results.FusionWeights:
    modules = (
        results.ModuleWeights(module=entry.module, weights=tuple(entry.weights)) for entry in weights.modules
    )
    return results.FusionWeights(
        members=tuple(weights.members),
        mean=tuple(weights.mean),
        tokens=_token_weights(weights.tokens),
        modules=tuple(modules),
    )


def _token_weights(entries: Iterable[inference_pb2.TokenWeights]) -> tuple[results.TokenWeights, ...]:
    return tuple(
        results.TokenWeights(position=entry.position, weights=tuple(entry.weights)) for entry in entries
    )


def _logprobs(positions: Iterable[inference_pb2.TokenLogprobs]) -> tuple[results.TokenLogprobs, ...]:
    return tuple(
        results.TokenLogprobs(
            token_id=position.token_id,
            text=position.text,
            logprob=position.logprob,
            rank=position.rank,
            top=tuple(
                results.Alternative(token_id=other.token_id, text=other.text, logprob=other.logprob)
                for other in position.top
            ),
        )
        for position in positions
    )


def _enum(kind: type[EnumT], names: EnumNames, number: int, prefix: str) -> EnumT:
    """The member of `kind` for a number of the API's enum; UNKNOWN for one newer than this client."""
    name = names.Name(number) if number in names.values() else ""
    return kind.__members__.get(name.removeprefix(prefix), kind("unknown"))
