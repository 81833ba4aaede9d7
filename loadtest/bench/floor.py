"""The least time that a workload can take on a machine: arithmetic from what the machine can read and multiply.

With s streams, p prompt tokens, n new tokens, bandwidth b (bytes/s) and rate r (FLOP/s), two bytes a number:

    prompt = max(prompt FLOPs / r, bytes read once / b)
    decode = sum over the n - 1 steps, at context c = p + 1, ..., p + n - 1, of max(step FLOPs / r, step bytes / b)

    FLOPs of a token at context c = 2 * (linear + adapter parameters) + 4 * layers * query width * c
    FLOPs of the LM head          = 2 * vocabulary * hidden, for the last token of a prompt and each decoded one
    step bytes                    = 2 * (linear + LM head + adapter parameters read) + s * c * bytes of keys and values

Nothing else counts: no norms, no softmax, no writes, no activations, and caches are cold for every step.
"""

from __future__ import annotations

from dataclasses import dataclass

_BYTES = 2  # of a bfloat16 number


@dataclass(frozen=True, slots=True)
class MachineLimit:
    """What a machine was measured to do at best."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """A decoder with q, k, v, o, gate, up and down projections, whose LM head is its embedding."""

    hidden: int
    inner: int
    num_layers: int
    query_width: int  # heads * head_dim
    kv_width: int  # key-value heads * head_dim
    vocab_size: int

    @property
    def linear_params(self) -> int:
        """Parameters of the projections of all layers."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        return self.num_layers * (attention + 3 * self.hidden * self.inner)

    @property
    def head_params(self) -> int:
        """Parameters of the LM head."""
        return self.vocab_size * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.num_layers * 2 * self.kv_width * _BYTES

    def adapter_params(self, rank: int) -> int:
        """A and B of one LoRA adapter on all seven projections: rank * (d_in + d_out) each."""
        attention = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        return self.num_layers * rank * (attention + 3 * (self.hidden + self.inner))

    def fusion_params(self, members: int, rank: int) -> int:
        """The members' A and C, and at the first projection of each layer rank + 1 rows of scores per member."""
        return members * (self.adapter_params(rank) + self.num_layers * (rank + 1) * self.hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A round: its streams, and the adapter parameters that a token is multiplied with and that a step reads."""

    num_streams: int
    prompt_tokens: int
    new_tokens: int
    adapter_params_per_token: int = 0
    adapter_params_read: int = 0


@dataclass(frozen=True, slots=True)
class Floor:
    """Seconds that no implementation can be below."""

    prompt_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """Of the whole round."""
        return self.prompt_s + self.decode_s


def floor(size: ModelSize, load: Load, limit: MachineLimit) -> Floor:
    """The formula at the top."""
    contexts = range(load.prompt_tokens + 1, load.prompt_tokens + load.new_tokens)
    return Floor(_prompt_s(size, load, limit), sum(step_s(size, load, limit, c) for c in contexts))


def _prompt_s(size: ModelSize, load: Load, limit: MachineLimit) -> float:
    products = 2 * (size.linear_params + load.adapter_params_per_token) * load.prompt_tokens
    contexts = load.prompt_tokens * (load.prompt_tokens + 1) // 2  # sum of 1, ..., prompt_tokens
    attention = 4 * size.num_layers * size.query_width * contexts
    flops = load.num_streams * (products + attention + 2 * size.head_params)
    return _seconds(flops, _weight_bytes(size, load), limit)


def step_s(size: ModelSize, load: Load, limit: MachineLimit, context: int) -> float:
    """The least seconds of a decoding step in which every stream has a context of so many tokens."""
    products = 2 * (size.linear_params + size.head_params + load.adapter_params_per_token)
    attention = 4 * size.num_layers * size.query_width * context
    kv_bytes = load.num_streams * context * size.kv_bytes_per_token
    return _seconds(load.num_streams * (products + attention), _weight_bytes(size, load) + kv_bytes, limit)


def _weight_bytes(size: ModelSize, load: Load) -> int:
    return _BYTES * (size.linear_params + size.head_params + load.adapter_params_read)


def _seconds(flops: int, num_bytes: int, limit: MachineLimit) -> float:
    return max(flops / limit.flops_per_s, num_bytes / limit.bytes_per_s)
