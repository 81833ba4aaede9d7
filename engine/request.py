"""Requests as the engine sees them: a generation asked for by a client, and one request per candidate of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from hashlib import blake2b

from fusionserve.adapters.adapter import Adapter
from fusionserve.engine.block_pool import BlockHash
from fusionserve.engine.fusion_report import FusionReport
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.text_output import TextOutput
from fusionserve.generation import (
    Candidate,
    FusionWeightDetail,
    GenerateParams,
    TokenLogprobs,
)
from fusionserve.kernels.token_draw import NUM_UNIFORMS


class RequestStatus(Enum):
    """WAITING for admission (also after preemption), RUNNING in the batch, FINISHED for good."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Generation:
    """One client request: the prompt its candidates share, its leased adaptation, and what has come of it so far."""

    params: GenerateParams
    prompt_token_ids: tuple[int, ...]
    adaptation: LeasedAdaptation
    max_new_tokens: int
    seed: int
    arrival_s: float
    requests: list[Request] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_cached_tokens: int = 0
    is_started: bool = False  # its first step has run and was told of
    first_scheduled_s: float | None = None
    first_token_s: float | None = None

    @property
    def request_id(self) -> str:
        """The client's id, unique among the requests in flight."""
        return self.params.request_id

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters whose deltas are added with fixed coefficients; none for base and fusion."""
        return self.adaptation.adapters

    @property
    def cache_seed(self) -> bytes:
        """Everything besides the tokens that shapes the keys and values: the adaptation, the tenant and the salt."""
        return repr((self.params.cache_tenant, self.params.cache_salt, self.adaptation.cache_key)).encode()

    def let_go(self) -> None:
        """Drops what it no longer leases, and the cycle with its requests.

        Weights must go when the registry has let them go: not when a slow client has read its last chunk, and not
        when the garbage collector looks at its oldest generation.
        """
        self.adaptation = LeasedAdaptation(self.adaptation.kind)
        self.requests = []

    @property
    def time_limit_at_s(self) -> float | None:
        """When the request's own time limit passes, on the monotonic clock."""
        limit_s = self.params.stopping.time_limit_s
        return None if limit_s is None else self.arrival_s + limit_s


class Request:
    """One candidate: its tokens, how many of them are computed, and the blocks that hold their keys and values."""

    def __init__(self, generation: Generation, index: int, text: TextOutput) -> None:
        self.generation = generation
        self.index = index
        self.text = text
        self.flow = generation.params.adaptation.flow  # whose share of the server it takes
        self.token_ids = list(generation.prompt_token_ids)
        self.logprobs: list[TokenLogprobs] = []
        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.blocks: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.num_published_blocks = 0
        self.num_told_tokens = 0  # generated tokens that have left in chunks
        self.last_token_s: float | None = None
        self.fusion_report = FusionReport(generation.params.output.fusion_weights)

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.generation.prompt_token_ids)

    @property
    def num_generated(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def num_pending_tokens(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def generated_ids(self) -> Sequence[int]:
        """The tokens generated so far."""
        return self.token_ids[self.prompt_length :]

    @property
    def untold_ids(self) -> Sequence[int]:
        """Of these, the ones that have not left in chunks."""
        return self.token_ids[self.prompt_length + self.num_told_tokens :]

    @property
    def is_finished(self) -> bool:
        """True once the request has left the engine."""
        return self.status is RequestStatus.FINISHED

    @property
    def reports_fusion_weights(self) -> bool:
        """True if this candidate's fusion weights are gathered for the client."""
        output = self.generation.params.output
        is_fusion = self.generation.adaptation.fusion is not None
        return self.index == 0 and is_fusion and output.fusion_weights is not FusionWeightDetail.NONE

    @property
    def needs_every_token(self) -> bool:
        """True if something is reported of every prompt token, so that none may come from the prefix cache."""
        return self.wants_prompt_logprobs or self.reports_fusion_weights

    @property
    def wants_prompt_logprobs(self) -> bool:
        """True if this candidate reports the prompt's log-probabilities, which needs every prompt position's logits."""
        return self.index == 0 and self.generation.params.output.prompt_logprobs is not None

    @property
    def priority(self) -> int:
        """The greater is served first."""
        return self.generation.params.priority

    @property
    def order(self) -> tuple[int, float, int]:
        """Sort key of the queue: higher priority first, then first come, first served."""
        return (-self.generation.params.priority, self.generation.arrival_s, self.index)

    def uniforms(self, num_generated: int) -> tuple[float, ...]:
        """Numbers in [0, 1) for the token after so many, from the seed, the candidate and that number alone.

        No generator state: the same seed gives the same draws whatever else runs, and after preemption.
        """
        key = f"{self.generation.seed}:{self.index}:{num_generated}".encode()
        digest = blake2b(key, digest_size=8 * NUM_UNIFORMS).digest()
        words = (int.from_bytes(digest[at : at + 8], "big") for at in range(0, len(digest), 8))
        return tuple((word >> 11) * 2.0**-53 for word in words)
