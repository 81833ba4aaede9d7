"""The engine's events as messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from google.protobuf.duration_pb2 import Duration

from fusionserve.generation import (
    Candidate,
    FinishReason,
    FusionWeights,
    GenerationChunk,
    GenerationEvent,
    GenerationFinished,
    GenerationStarted,
    ResolvedAdaptation,
    Timings,
    TokenFusionWeights,
    TokenLogprobs,
    Usage,
)
from fusionserve.v1 import inference_pb2

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.STOP_STRING: inference_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.TIME_LIMIT: inference_pb2.FINISH_REASON_TIME_LIMIT,
}


def to_stream_response(event: GenerationEvent) -> inference_pb2.StreamGenerateResponse:
    """The event as a message of a stream."""
    match event:
        case GenerationStarted():
            return inference_pb2.StreamGenerateResponse(started=_to_started(event))
        case GenerationChunk():
            return inference_pb2.StreamGenerateResponse(chunk=_to_chunk(event))
        case GenerationFinished():
            return inference_pb2.StreamGenerateResponse(finished=to_generate_response(event))
    assert_never(event)


def to_generate_response(event: GenerationFinished) -> inference_pb2.GenerateResponse:
    """The whole result."""
    return inference_pb2.GenerateResponse(
        request_id=event.request_id,
        candidates=[_to_candidate(candidate) for candidate in event.candidates],
        usage=_to_usage(event.usage),
        adaptation=_to_adaptation(event.adaptation),
        timings=_to_timings(event.timings),
        fusion_weights=_to_fusion_weights(event.fusion_weights),
        prompt_logprobs=_to_logprobs(event.prompt_logprobs),
    )


def _to_started(event: GenerationStarted) -> inference_pb2.GenerationStarted:
    return inference_pb2.GenerationStarted(
        request_id=event.request_id, usage=_to_usage(event.usage), adaptation=_to_adaptation(event.adaptation)
    )


def _to_chunk(event: GenerationChunk) -> inference_pb2.GenerationChunk:
    chunk = inference_pb2.GenerationChunk(
        index=event.candidate_index, text=event.text, token_ids=event.token_ids
    )
    if event.logprobs:  # few ask for it, and there is a chunk for every token
        chunk.logprobs.extend(_to_logprobs(event.logprobs))
    if event.fusion_weights:
        chunk.fusion_weights.extend(_to_token_weights(event.fusion_weights))
    return chunk


def _to_candidate(candidate: Candidate) -> inference_pb2.Candidate:
    return inference_pb2.Candidate(
        index=candidate.index,
        text=candidate.text,
        token_ids=candidate.token_ids,
        finish_reason=FINISH_REASONS[candidate.finish_reason],
        stop_string=candidate.stop_string,
        stop_token_id=candidate.stop_token_id,
        logprobs=_to_logprobs(candidate.logprobs),
    )


def _to_logprobs(entries: Iterable[TokenLogprobs]) -> list[inference_pb2.TokenLogprobs]:
    return [
        inference_pb2.TokenLogprobs(
            token_id=entry.chosen.token_id,
            text=entry.chosen.text,
            logprob=entry.chosen.logprob,
            rank=entry.chosen.rank,
            top=[
                inference_pb2.Alternative(token_id=other.token_id, text=other.text, logprob=other.logprob)
                for other in entry.top
            ],
        )
        for entry in entries
    ]


def _to_usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        generated_tokens=usage.generated_tokens,
    )


def _to_adaptation(adaptation: ResolvedAdaptation) -> inference_pb2.ResolvedAdaptation:
    message = inference_pb2.ResolvedAdaptation(
        kind=adaptation.kind,
        members=[
            inference_pb2.ResolvedMember(
                name=member.name, weight=member.scale, version=member.version, digest=member.digest
            )
            for member in adaptation.members
        ],
    )
    if adaptation.kind == "lora":
        (only,) = adaptation.members
        message.name, message.version, message.digest = only.name, only.version, only.digest
    elif adaptation.fusion is not None:
        fusion = adaptation.fusion
        message.name, message.version, message.digest = fusion.name, fusion.version, fusion.digest
    return message


def _to_fusion_weights(weights: FusionWeights | None) -> inference_pb2.FusionWeights | None:
    if weights is None:
        return None
    return inference_pb2.FusionWeights(
        members=weights.members,
        mean=weights.mean,
        tokens=_to_token_weights(weights.tokens),
        modules=[
            inference_pb2.ModuleWeights(module=entry.module, weights=entry.weights)
            for entry in weights.modules
        ],
    )


def _to_token_weights(entries: Iterable[TokenFusionWeights]) -> list[inference_pb2.TokenWeights]:
    return [inference_pb2.TokenWeights(position=entry.position, weights=entry.weights) for entry in entries]


def _to_timings(timings: Timings) -> inference_pb2.Timings:
    return inference_pb2.Timings(
        queue=_to_duration(timings.queue_s),
        time_to_first_token=_to_duration(timings.time_to_first_token_s),
        total=_to_duration(timings.total_s),
    )


def _to_duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
