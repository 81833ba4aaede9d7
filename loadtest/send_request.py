"""Sends one planned request and records when its tokens come."""

from __future__ import annotations

import time

from fusionserve.client import (
    AsyncClient,
    ClientError,
    GenerateOptions,
    Generation,
    GenerationChunk,
    GenerationEvent,
    GenerationStarted,
    ResolvedAdaptation,
)
from fusionserve.loadtest.request_plan import PlannedRequest
from fusionserve.loadtest.request_record import LoadedPart, RequestRecord
from fusionserve.loadtest_config import FUSION

INCOMPLETE = (
    "INCOMPLETE"  # a stream that ended without a status but the result is missing: a bug of the server
)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()

    def now_s(self) -> float:
        """The time."""
        return time.monotonic() - self._start_s


async def send_request(
    client: AsyncClient,
    planned: PlannedRequest,
    record: RequestRecord,
    *,
    clock: Clock,
    options: GenerateOptions,
    timeout_s: float | None,
) -> None:
    """Streams the request to its end; whatever the server says, it is in `record`, and nothing is raised."""
    record.status = INCOMPLETE
    try:
        async with client.stream(planned.prompt, timeout_s=timeout_s, **options) as events:
            async for event in events:
                _note(event, record, clock.now_s())
    except ClientError as error:
        record.status, record.reason, record.message = error.status, error.reason, error.message
    finally:
        record.ended_s = clock.now_s()


def _note(event: GenerationEvent, record: RequestRecord, now_s: float) -> None:
    if isinstance(event, GenerationChunk):
        if event.token_ids:
            record.chunks.append((now_s, len(event.token_ids)))
    elif isinstance(event, GenerationStarted):
        record.started_s = now_s
        record.parts = _parts(event.adaptation)
    elif isinstance(event, Generation):
        record.status = "OK"
        record.prompt_tokens = event.usage.prompt_tokens
        record.cached_tokens = event.usage.cached_tokens


def _parts(adaptation: ResolvedAdaptation) -> tuple[LoadedPart, ...]:
    """Every adapter that takes part, and the fusion."""
    members = [("adapter", member.name, member.version) for member in adaptation.members]
    fusion = [("fusion", adaptation.name, adaptation.version)] if adaptation.kind == FUSION else []
    return (*members, *fusion)
