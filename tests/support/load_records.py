"""Hand-made traces of load tests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fusionserve.client import Model, ServerLimits
from fusionserve.loadtest.catalog import Catalog
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest_config import BASE, LoadConfig


def make_record(index: int = 0, *, tokens_s: Sequence[float] = (), **fields: Any) -> RequestRecord:
    """A base request due at 0 with one token at each of `tokens_s`, which ended with the last one."""
    defaults: dict[str, Any] = {
        "kind": BASE,
        "names": (),
        "is_counted": True,
        "due_s": 0.0,
        "sent_s": fields.get("due_s", 0.0),
        "chunks": [(at_s, 1) for at_s in tokens_s],
        "ended_s": tokens_s[-1] if tokens_s else 0.0,
    }
    return RequestRecord(index=index, **{**defaults, **fields})


def make_model(**fields: Any) -> Model:
    """A small model with a tokenizer."""
    limits = ServerLimits(
        max_batch_tokens=128,
        max_batch_requests=8,
        adapter_pool_ranks=64,
        max_adapter_rank=32,
        adapter_host_bytes=1 << 30,
    )
    defaults: dict[str, Any] = {
        "name": "small",
        "architecture": "FakeForCausalLM",
        "dtype": "float32",
        "quantization": "none",
        "weight_bytes": 1,
        "max_context_tokens": 512,
        "vocab_size": 100,
        "has_tokenizer": True,
        "has_chat_template": False,
        "eos_token_ids": (0, 7),
        "limits": limits,
        "version": "0",
    }
    return Model(**{**defaults, **fields})


def make_catalog(**fields: Any) -> Catalog:
    """Ten adapters and two fusions, of which nothing is loaded; base requests only."""
    defaults: dict[str, Any] = {
        "model": make_model(),
        "adapters": tuple(f"a{n}" for n in range(10)),
        "fusions": ("f0", "f1"),
        "loaded_versions": {},
        "mix": {BASE: 1.0},
    }
    return Catalog(**{**defaults, **fields})


def make_outcome(
    records: Sequence[RequestRecord], config: LoadConfig | None = None, **fields: Any
) -> Outcome:
    """A run that ended by itself."""
    defaults: dict[str, Any] = {
        "catalog": make_catalog(),
        "started_at": datetime(2030, 1, 1, tzinfo=UTC),
        "num_not_sent": 0,
        "most_in_flight": 1,
        "client_cpu_s": 0.5,
        "was_stopped": False,
    }
    return Outcome(config=config or LoadConfig(target="x"), records=list(records), **{**defaults, **fields})
