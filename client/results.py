"""What the client hands back: the API's messages as frozen data, with times in seconds and enums as text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a candidate ended; UNKNOWN is a reason newer than this client."""

    STOP = "stop"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    TIME_LIMIT = "time_limit"
    UNKNOWN = "unknown"


class AdapterState(StrEnum):
    """Where an adapter stands in its life; AVAILABLE is on disk and loads on demand."""

    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNKNOWN = "unknown"


class Residency(StrEnum):
    """The fastest tier that holds an adapter's weights."""

    DISK = "disk"
    HOST = "host"
    DEVICE = "device"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A token that could have stood at a position."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """The token at one position, its rank (1 is the most likely) and the most likely tokens there."""

    token_id: int
    text: str
    logprob: float
    rank: int
    top: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from the request's arrival: until first scheduled, until the first token, until the end."""

    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedMember:
    """An adapter as it was when the request was admitted."""

    name: str
    weight: float
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedAdaptation:
    """The adaptation a request really ran with: `kind` is "base", "lora", "blend" or "fusion".

    `name`, `version` and `digest` are those of the one adapter or of the fusion, else empty and 0. A fusion's
    members have weight 1, or 0 where the request left them out. A request whose time limit passed before it was
    admitted ran on nothing: it has the names it asked for, with versions of 0.
    """

    kind: str
    members: tuple[ResolvedMember, ...]
    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """The fusion weights at one position of prompt and output, mean over attentions."""

    position: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWeights:
    """The fusion weights of one attention, mean over tokens."""

    module: str
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionWeights:
    """How a fusion weighed `members` in the first candidate; the last of them may be `base`.

    `tokens` and `modules` are empty unless asked for. The last generated token has no weights.
    """

    members: tuple[str, ...]
    mean: tuple[float, ...]
    tokens: tuple[TokenWeights, ...]
    modules: tuple[ModuleWeights, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One finished continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarted:
    """First event of a stream: the request's first step has run."""

    request_id: str
    usage: Usage
    adaptation: ResolvedAdaptation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """New tokens of one candidate; `text` never ends inside a character and may be empty."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    fusion_weights: tuple[TokenWeights, ...]  # of the tokens computed since the last chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole result, and the last event of a stream."""

    request_id: str
    candidates: tuple[Candidate, ...]
    usage: Usage
    adaptation: ResolvedAdaptation
    timings: Timings
    prompt_logprobs: tuple[TokenLogprobs, ...]
    fusion_weights: FusionWeights | None  # None unless asked for

    @property
    def text(self) -> str:
        """The text of the first candidate."""
        return self.candidates[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The generated tokens of the first candidate."""
        return self.candidates[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first candidate ended."""
        return self.candidates[0].finish_reason


GenerationEvent = GenerationStarted | GenerationChunk | Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A snapshot of one adapter; `version` 0 means it is not loaded."""

    name: str
    version: int
    digest: str
    state: AdapterState
    residency: Residency
    max_rank: int
    target_modules: tuple[str, ...]
    host_bytes: int
    pinned: bool
    active_requests: int
    held_by_fusions: tuple[str, ...]  # loaded fusions that it is a member of
    load_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionMember:
    """An adapter by name, with the digest of the weights that the fusion was trained with."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """A snapshot of one fusion; `version` 0 means it is not loaded."""

    name: str
    version: int
    digest: str
    state: AdapterState
    residency: Residency
    members: tuple[FusionMember, ...]
    modules: tuple[str, ...]
    scope: str
    d_key: int
    member_keys: bool
    value_kind: str
    temperature: float
    base_member: bool
    pool_ranks: int
    host_bytes: int
    pinned: bool
    active_requests: int
    load_time: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What the server has room for."""

    max_batch_tokens: int
    max_batch_requests: int
    adapter_pool_ranks: int
    max_adapter_rank: int
    adapter_host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The base model a server keeps resident."""

    name: str
    architecture: str
    dtype: str
    quantization: str
    weight_bytes: int
    max_context_tokens: int
    vocab_size: int
    has_tokenizer: bool
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    limits: ServerLimits
    version: str
