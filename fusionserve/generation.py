"""What crosses from the server to the engine and back for one generation: plain frozen data, no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt to be tokenized by the model's tokenizer, with its special tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is already token ids, taken as it is."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """(role, content) messages, rendered by the tokenizer's chat template."""

    messages: tuple[tuple[str, str], ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """One adapter by name and the coefficient of its delta."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How a request adapts the base model: no terms is base, one is LoRA, `kind` "blend" sums several.

    `kind` is "base", "lora", "blend" or "fusion": a blend of one member stays a blend in metrics and responses. A
    fusion has no terms but a name, and maybe members that are left out.
    """

    kind: str = "base"
    terms: tuple[AdapterTerm, ...] = ()
    fusion: str = ""
    excluded_members: tuple[str, ...] = ()

    @property
    def flow(self) -> str:
        """Whose share of the server it takes: "base", an adapter's name, "fusion:NAME" or "blend:NAME+NAME"."""
        if self.kind == "fusion":
            return f"fusion:{self.fusion}"
        names = "+".join(sorted(term.name for term in self.terms))
        return f"blend:{names}" if self.kind == "blend" else names or "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn; every default leaves the model's distribution as it is.

    Order of application: logit_bias, repetition, presence and frequency penalties, temperature, top_k, top_p, min_p.
    `seed` None draws a fresh seed; `temperature` 0 is greedy. `top_k` 0 means all tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def changes_logits(self) -> bool:
        """True if a bias or a penalty comes before the draw."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or any(penalties)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppingCriteria:
    """When a candidate ends; `max_new_tokens` None means the server's default, capped by the context length."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    time_limit_s: float | None = None


class FusionWeightDetail(Enum):
    """Which weights of a fusion are reported: the mean of each member alone, or also by token or by module."""

    NONE = "none"
    MEAN = "mean"
    PER_TOKEN = "per_token"
    PER_MODULE = "per_module"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What is reported besides text: None is nothing, 0 the chosen token only, N also the N most likely ones.

    A chunk has `stream_interval` tokens of its candidate, or more; its first and last ones do not wait for that.
    With None there are no chunks.
    """

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    fusion_weights: FusionWeightDetail = FusionWeightDetail.NONE
    stream_interval: int | None = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateParams:
    """One request, checked for everything that needs no model; `deadline_s` is on the time.monotonic clock."""

    request_id: str
    prompt: Prompt
    adaptation: Adaptation = Adaptation()
    sampling: SamplingParams = SamplingParams()
    stopping: StoppingCriteria = StoppingCriteria()
    output: OutputOptions = OutputOptions()
    num_candidates: int = 1
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""  # who asks; tenants do not share request ids
    cache_tenant: str = ""  # nor, unless that is configured, cached prompts
    deadline_s: float | None = None


class FinishReason(Enum):
    """Why a candidate ended with a result."""

    STOP = "stop"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its text, its log-probability under the unmodified distribution, and its rank (1 is the most likely)."""

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The chosen token and the most likely alternatives at one position."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ResolvedMember:
    """An adapter as it was found when the request was admitted."""

    name: str
    version: int
    digest: str
    scale: float


@dataclass(frozen=True, slots=True)
class ResolvedFusion:
    """A fusion as it was found when the request was admitted."""

    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class ResolvedAdaptation:
    """The adaptation a request really ran with; `members` is empty for base and one entry for LoRA.

    `fusion` is set for a fusion, whose members' scales are 1, or 0 where the request left them out.
    """

    kind: str = "base"
    members: tuple[ResolvedMember, ...] = ()
    fusion: ResolvedFusion | None = None


@dataclass(frozen=True, slots=True)
class TokenFusionWeights:
    """The fusion weights at one position of prompt and output, mean over attentions."""

    position: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ModuleFusionWeights:
    """The fusion weights of one attention, mean over tokens."""

    module: str
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionWeights:
    """How a fusion weighed its members: each row sums to 1 over `members`, of which the last may be `base`.

    The last token generated has no weights: nothing is computed from it.
    """

    members: tuple[str, ...]
    mean: tuple[float, ...]
    tokens: tuple[TokenFusionWeights, ...] = ()
    modules: tuple[ModuleFusionWeights, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds from arrival: until first scheduled, until the first token, until the end."""

    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One finished continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStarted:
    """First event: the request's first step has run."""

    request_id: str
    usage: Usage
    adaptation: ResolvedAdaptation


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """New tokens of one candidate; `text` never ends inside a character and may be empty."""

    candidate_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    fusion_weights: tuple[TokenFusionWeights, ...] = ()  # of the positions computed since the last chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFinished:
    """Last event: the whole response. The concatenated chunks of a candidate are its text."""

    request_id: str
    candidates: tuple[Candidate, ...]
    usage: Usage
    adaptation: ResolvedAdaptation
    timings: Timings
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    fusion_weights: FusionWeights | None = None


GenerationEvent = GenerationStarted | GenerationChunk | GenerationFinished
