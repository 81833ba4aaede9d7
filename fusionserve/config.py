"""Frozen configuration: what the command line, the environment and the YAML file resolve to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_MODEL = EMBEDDED / "base"
EMBEDDED_ADAPTERS = EMBEDDED / "adapters"
EMBEDDED_FUSIONS = EMBEDDED / "fusions"
EMBEDDED_MODEL_NAME = "fusionserve-tiny"

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything the engine needs to know before it loads the model.

    `model` is a directory or a hub id. `device` "auto" is a GPU if there is one. `dtype` "auto" takes the checkpoint's.
    `quantize` "int8", "int4" or "nf4" holds the linear modules in so many bits. Adapters are found as NAME under any of
    `adapter_dirs` (loaded on demand) and as the named `adapters` (loaded at start); fusions likewise.
    """

    model: str
    model_name: str
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    adapter_dirs: tuple[Path, ...] = ()
    adapters: tuple[tuple[str, Path], ...] = ()
    fusion_dirs: tuple[Path, ...] = ()
    fusions: tuple[tuple[str, Path], ...] = ()
    max_context_tokens: int | None = None  # None: the model's own limit
    max_batch_tokens: int = 512  # tokens computed per step
    prompt_step_s: float = 0.06  # how long a step may last that computes prompts while other requests decode
    min_prompt_tokens: int = 128  # tokens of prompts that it computes however long that takes
    max_batch_requests: int = 64  # requests running at once
    max_queued_requests: int = 256  # requests waiting for admission before RESOURCE_EXHAUSTED
    fair_weights: Mapping[str, float] | None = None  # of flows (`Adaptation.flow`) whose share is not 1
    max_open_tokens: int = 1 << 20  # tokens that all open requests may come to have
    default_max_new_tokens: int = 128
    block_size: int = 16  # tokens per KV block
    kv_cache_bytes: int | None = None  # None: 512 MiB, or what a GPU has left
    adapter_pool_ranks: int = 512  # rank rows on the device; an odd number gets one more
    adapter_host_bytes: int = 1024 * MEBIBYTE
    fusion_host_bytes: int = 256 * MEBIBYTE
    max_adapter_rank: int = 256
    allow_base_mismatch: bool = False
    enable_prefix_cache: bool = True
    load_timeout_s: float = 120.0  # a load that takes longer fails; what it hangs in keeps its slot
    step_timeout_s: float = 120.0  # a step that takes longer hangs, and the server stops
    num_threads: int | None = (
        None  # torch threads; None: torch's own choice, the cores at hand or OMP_NUM_THREADS
    )

    def __post_init__(self) -> None:
        # Adapters take rows by twos.
        object.__setattr__(self, "adapter_pool_ranks", self.adapter_pool_ranks + self.adapter_pool_ranks % 2)

    @property
    def max_open_requests(self) -> int:
        """How many requests may run and wait together."""
        return self.max_batch_requests + self.max_queued_requests


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens and how it behaves towards clients."""

    listen: str = "127.0.0.1:50051"
    metrics_listen: str = "127.0.0.1:9464"
    enable_reflection: bool = True
    enable_channelz: bool = False
    tls_cert: Path | None = None  # PEM; None serves in the clear
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # clients must have a certificate of it
    token_file: Path | None = None  # `server/tokens.py`; None lets everybody do everything
    allow_insecure: bool = False  # listen beyond this machine without TLS and tokens
    share_prefix_cache: bool = False  # between the names of the token file
    log_requests: str = "off"
    max_message_bytes: int = 4 * MEBIBYTE
    max_request_s: float = 600.0  # then a request ends, if its own deadline is not sooner
    write_timeout_s: float = 20.0  # a client that takes no message for so long gets no more
    keepalive_time_s: float = 5.0  # a connection that was silent for so long is pinged
    keepalive_timeout_s: float = 4.0  # and cut if the answer takes longer
    drain_window_s: float = (
        0.5  # after SIGTERM the listener stays open at least so long, to refuse with DRAINING
    )
    drain_grace_s: float = 30.0
    adapter_label_limit: int = 32  # adapters with a metric label of their own; the rest are "other"
