"""Every Prometheus metric of the server, declared once: prefix `fusionserve_`, base units, `_total` on counters.

Histograms carry no adapter label (a histogram of 1,000 adapters costs a quarter of a second per scrape); counters by
adapter go through `AdapterLabels`, which caps their number.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]

REGISTRY = CollectorRegistry()

_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

REQUESTS = Counter(
    "fusionserve_requests_total",
    "Generation requests ended, by kind of adaptation, finish reason (none if it ended in an error) and status.",
    ("kind", "finish_reason", "status"),
    registry=REGISTRY,
)
REQUESTS_RUNNING = Gauge("fusionserve_requests_running", "Sequences in the running batch.", registry=REGISTRY)
REQUESTS_QUEUED = Gauge(
    "fusionserve_requests_queued", "Sequences waiting for a place in the batch.", registry=REGISTRY
)
REQUESTS_OPEN = Gauge(
    "fusionserve_requests_open",
    "Requests that have not ended: running, queued, or waiting for their prompt's tokens or their adapter.",
    registry=REGISTRY,
)
PROMPT_TOKENS = Counter(
    "fusionserve_prompt_tokens_total", "Prompt tokens of admitted requests.", registry=REGISTRY
)
GENERATED_TOKENS = Counter("fusionserve_generated_tokens_total", "Tokens generated.", registry=REGISTRY)
QUEUE_SECONDS = Histogram(
    "fusionserve_queue_seconds",
    "From arrival to the first scheduled step.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "fusionserve_time_to_first_token_seconds",
    "From arrival to the first token.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
INTER_TOKEN_SECONDS = Histogram(
    "fusionserve_inter_token_seconds",
    "Between consecutive tokens of a sequence.",
    buckets=_STEP_BUCKETS,
    registry=REGISTRY,
)
REQUEST_SECONDS = Histogram(
    "fusionserve_request_seconds",
    "From arrival to the end, of requests that came into the queue.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
STEP_SECONDS = Histogram(
    "fusionserve_step_seconds",
    "One engine step: schedule, execute, update.",
    buckets=_STEP_BUCKETS,
    registry=REGISTRY,
)
STEP_TOKENS = Counter("fusionserve_step_tokens_total", "Tokens computed by engine steps.", registry=REGISTRY)

BASE_WEIGHT_BYTES = Gauge(
    "fusionserve_base_weight_bytes",
    "Bytes of the base model's weights, quantized ones with their scales.",
    registry=REGISTRY,
)
KV_BLOCKS_USED = Gauge("fusionserve_kv_blocks_used", "KV blocks held by requests.", registry=REGISTRY)
KV_BLOCKS = Gauge("fusionserve_kv_blocks", "KV blocks in all.", registry=REGISTRY)
PREFIX_QUERY_TOKENS = Counter(
    "fusionserve_prefix_cache_query_tokens_total",
    "Prompt tokens looked up in the prefix cache.",
    registry=REGISTRY,
)
PREFIX_HIT_TOKENS = Counter(
    "fusionserve_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache.", registry=REGISTRY
)
PREEMPTIONS = Counter(
    "fusionserve_preemptions_total",
    "Running sequences sent back to the queue, by cause: blocks for those that stay, or another's turn.",
    ("cause",),
    registry=REGISTRY,
)
for _cause in ("blocks", "turn"):
    PREEMPTIONS.labels(_cause)  # there from the start, so that the first one is an increase

ADAPTERS = Gauge("fusionserve_adapters", "Adapters by state.", ("state",), registry=REGISTRY)
ADAPTER_POOL_RANKS_USED = Gauge(
    "fusionserve_adapter_pool_ranks_used", "Rank rows of the device pool in use.", registry=REGISTRY
)
ADAPTER_POOL_RANKS = Gauge(
    "fusionserve_adapter_pool_ranks", "Rank rows of the device pool.", registry=REGISTRY
)
ADAPTER_POOL_RANKS_HELD = Gauge(
    "fusionserve_adapter_pool_ranks_held",
    "Rank rows of the device pool that running requests keep from eviction.",
    registry=REGISTRY,
)
ADAPTER_HOST_BYTES = Gauge(
    "fusionserve_adapter_host_bytes", "Bytes of adapter weights on the host.", registry=REGISTRY
)
ADAPTER_HOST_LIMIT_BYTES = Gauge(
    "fusionserve_adapter_host_limit_bytes", "Budget for adapter weights on the host.", registry=REGISTRY
)
ADAPTER_LEASES = Gauge(
    "fusionserve_adapter_leases", "Leases on loaded adapters, of requests and of fusions.", registry=REGISTRY
)
ADAPTER_LOADS = Counter("fusionserve_adapter_loads_total", "Adapters loaded from disk.", registry=REGISTRY)
ADAPTER_LOAD_FAILURES = Counter(
    "fusionserve_adapter_load_failures_total",
    "Adapter loads refused, by reason.",
    ("reason",),
    registry=REGISTRY,
)
ADAPTER_LOAD_SECONDS = Histogram(
    "fusionserve_adapter_load_seconds",
    "Reading, checking and publishing one adapter, from asking for it: the wait for other loads is included.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
ADAPTER_ACTIVATIONS = Counter(
    "fusionserve_adapter_activations_total",
    "Copies of an adapter or a fusion from host to the device pool.",
    registry=REGISTRY,
)
ADAPTER_PREFETCHES = Counter(
    "fusionserve_adapter_prefetches_total",
    "Of these copies, those planned for the next requests of the queue before their turn; on a GPU only.",
    registry=REGISTRY,
)
ADAPTER_EVICTIONS = Counter(
    "fusionserve_adapter_evictions_total",
    "Adapters dropped to make room, by tier; from the device pool fusions, too.",
    ("tier",),
    registry=REGISTRY,
)
ADAPTER_REQUESTS = Counter(
    "fusionserve_adapter_requests_total",
    "Requests by adapter (capped; the rest are other).",
    ("adapter",),
    registry=REGISTRY,
)
ADAPTER_GENERATED_TOKENS = Counter(
    "fusionserve_adapter_generated_tokens_total",
    "Tokens generated by adapter (capped; the rest are other). A blend counts for each of its members.",
    ("adapter",),
    registry=REGISTRY,
)


FUSIONS = Gauge("fusionserve_fusions", "Fusions by state.", ("state",), registry=REGISTRY)
FUSION_HOST_BYTES = Gauge(
    "fusionserve_fusion_host_bytes", "Bytes of folded fusion weights on the host.", registry=REGISTRY
)
FUSION_HOST_LIMIT_BYTES = Gauge(
    "fusionserve_fusion_host_limit_bytes", "Budget for folded fusion weights on the host.", registry=REGISTRY
)
FUSION_LEASES = Gauge("fusionserve_fusion_leases", "Leases on loaded fusions.", registry=REGISTRY)
FUSION_EVICTIONS = Counter(
    "fusionserve_fusion_evictions_total", "Fusions dropped from the host to make room.", registry=REGISTRY
)
FUSION_PINS = Gauge(
    "fusionserve_fusion_pinned_members",
    "Members that loaded fusions keep loaded; one counts for each of its fusions.",
    registry=REGISTRY,
)
FUSION_LOADS = Counter("fusionserve_fusion_loads_total", "Fusions loaded from disk.", registry=REGISTRY)
FUSION_LOAD_FAILURES = Counter(
    "fusionserve_fusion_load_failures_total",
    "Fusion loads refused, by reason.",
    ("reason",),
    registry=REGISTRY,
)
FUSION_LOAD_SECONDS = Histogram(
    "fusionserve_fusion_load_seconds",
    "Reading, checking and folding one fusion, its members and the wait for other loads included.",
    buckets=_LATENCY_BUCKETS,
    registry=REGISTRY,
)
FUSION_REQUESTS = Counter(
    "fusionserve_fusion_requests_total",
    "Requests by fusion (capped; the rest are other).",
    ("fusion",),
    registry=REGISTRY,
)
FUSION_TOKENS = Counter(
    "fusionserve_fusion_tokens_total",
    "Tokens computed under a fusion (capped; the rest are other).",
    ("fusion",),
    registry=REGISTRY,
)
FUSION_MEMBER_WEIGHT = Counter(
    "fusionserve_fusion_member_weight_total",
    "Fusion weight of each member, mean over attentions, summed over tokens: its rate over that of "
    "fusionserve_fusion_tokens_total is the member's mean weight.",
    ("fusion", "member"),
    registry=REGISTRY,
)
FUSION_ENTROPY = Counter(
    "fusionserve_fusion_entropy_nats_total",
    "Entropy of the fusion weights, mean over attentions, summed over tokens.",
    ("fusion",),
    registry=REGISTRY,
)

EVENT_LOOP_LAG_SECONDS = Gauge(
    "fusionserve_event_loop_lag_seconds",
    "The most that the event loop was late in the last second.",
    registry=REGISTRY,
)
EVENT_LOOP_TASKS = Gauge(
    "fusionserve_event_loop_tasks", "Tasks of the event loop that have not ended.", registry=REGISTRY
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMetrics:
    """What a registry of things on the host keeps up to date."""

    used_bytes: Gauge
    limit_bytes: Gauge
    states: Gauge  # by state
    leases: Gauge
    evictions: Counter
    loads: Counter
    load_failures: Counter  # by reason
    load_seconds: Histogram


ADAPTER_HOST = HostMetrics(
    used_bytes=ADAPTER_HOST_BYTES,
    limit_bytes=ADAPTER_HOST_LIMIT_BYTES,
    states=ADAPTERS,
    leases=ADAPTER_LEASES,
    evictions=ADAPTER_EVICTIONS.labels("host"),
    loads=ADAPTER_LOADS,
    load_failures=ADAPTER_LOAD_FAILURES,
    load_seconds=ADAPTER_LOAD_SECONDS,
)
FUSION_HOST = HostMetrics(
    used_bytes=FUSION_HOST_BYTES,
    limit_bytes=FUSION_HOST_LIMIT_BYTES,
    states=FUSIONS,
    leases=FUSION_LEASES,
    evictions=FUSION_EVICTIONS,
    loads=FUSION_LOADS,
    load_failures=FUSION_LOAD_FAILURES,
    load_seconds=FUSION_LOAD_SECONDS,
)


class AdapterLabels:
    """Gives at most `limit` loaded adapters a label of their own; everything else is "other".

    Only names of adapters that were really loaded may be passed in, never a client's text.
    """

    OTHER = "other"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._named: set[str] = set()
        self._lock = threading.Lock()

    def label(self, name: str) -> str:
        """The label of adapter `name`: itself while there is room, else "other"."""
        with self._lock:
            if name in self._named:
                return name
            if len(self._named) >= self.limit:
                return self.OTHER
            self._named.add(name)
            return name

    def drop(self, name: str) -> None:
        """Removes the series of an unloaded or evicted adapter and frees its place."""
        with self._lock:
            if name not in self._named:
                return
            self._named.discard(name)
            self._remove_series(name)

    def _remove_series(self, name: str) -> None:
        for family in (ADAPTER_REQUESTS, ADAPTER_GENERATED_TOKENS):
            family.remove(name)


class FusionLabels(AdapterLabels):
    """The same for fusions."""

    def _remove_series(self, name: str) -> None:
        for family in (FUSION_REQUESTS, FUSION_TOKENS, FUSION_ENTROPY, FUSION_MEMBER_WEIGHT):
            family.remove_by_labels({"fusion": name})
