"""What is told of a request whose time limit passes before it is admitted: it ran on nothing and has no tokens."""

from __future__ import annotations

from fusionserve.generation import (
    Adaptation,
    Candidate,
    FinishReason,
    GenerateParams,
    GenerationFinished,
    GenerationStarted,
    ResolvedAdaptation,
    ResolvedFusion,
    ResolvedMember,
    Timings,
    Usage,
)


class TimeLimitPassed(Exception):
    """Ends an admission; `events` are the client's answer."""

    def __init__(self, params: GenerateParams, waited_s: float) -> None:
        super().__init__("the time limit passed before the request was admitted")
        usage, adaptation = Usage(prompt_tokens=0), _resolve(params.adaptation)
        self.events = (
            GenerationStarted(request_id=params.request_id, usage=usage, adaptation=adaptation),
            GenerationFinished(
                request_id=params.request_id,
                candidates=tuple(_nothing(index) for index in range(params.num_candidates)),
                usage=usage,
                adaptation=adaptation,
                timings=Timings(queue_s=waited_s, time_to_first_token_s=waited_s, total_s=waited_s),
            ),
        )


def _nothing(index: int) -> Candidate:
    return Candidate(index=index, text="", token_ids=(), finish_reason=FinishReason.TIME_LIMIT)


def _resolve(wanted: Adaptation) -> ResolvedAdaptation:
    """The names that were asked for; versions begin at 1, so 0 is none."""
    members = tuple(ResolvedMember(term.name, 0, "", term.scale) for term in wanted.terms)
    fusion = ResolvedFusion(wanted.fusion, 0, "") if wanted.kind == "fusion" else None
    return ResolvedAdaptation(wanted.kind, members, fusion)
