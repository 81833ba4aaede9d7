"""What became of one request of a load test: when its tokens came, or why it failed."""

from __future__ import annotations

from dataclasses import dataclass, field

OK = "OK"
LoadedPart = tuple[str, str, int]  # ("adapter" or "fusion", name, version)


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Filled while the request runs; every time is in seconds from the start of the run.

    Latencies count from `due_s`: in an open loop the planned arrival, so that a late client does not flatter the
    server; in a closed loop the time of sending.
    """

    index: int
    kind: str
    names: tuple[str, ...]
    is_counted: bool  # False during the warm-up
    due_s: float
    sent_s: float
    started_s: float | None = None  # the server's first word
    chunks: list[tuple[float, int]] = field(default_factory=list)  # (arrival, tokens in it)
    ended_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    parts: tuple[LoadedPart, ...] = ()  # the versions it ran on
    status: str = OK  # else the gRPC status, with the server's reason and text
    reason: str = ""
    message: str = ""

    @property
    def is_ok(self) -> bool:
        """True if the whole answer came."""
        return self.status == OK

    @property
    def generated_tokens(self) -> int:
        """Tokens that came."""
        return sum(num_tokens for _, num_tokens in self.chunks)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None without one."""
        return self.chunks[0][0] - self.due_s if self.chunks else None

    @property
    def e2e_s(self) -> float:
        """Time to the end of the stream."""
        return self.ended_s - self.due_s

    @property
    def itls_s(self) -> list[float]:
        """The gap before each token but the first; tokens that arrive together have gaps of 0."""
        gaps: list[float] = []
        previous_s = None
        for arrival_s, num_tokens in self.chunks:
            gaps += [0.0 if previous_s is None else arrival_s - previous_s] + [0.0] * (num_tokens - 1)
            previous_s = arrival_s
        return gaps[1:]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None with fewer than two."""
        num_gaps = self.generated_tokens - 1
        return (self.chunks[-1][0] - self.chunks[0][0]) / num_gaps if num_gaps > 0 else None
