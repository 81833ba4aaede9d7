"""Every setting of `fusionserve serve`, by the configuration field it fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionserve.config import (
    EMBEDDED_ADAPTERS,
    EMBEDDED_FUSIONS,
    EMBEDDED_MODEL,
    EMBEDDED_MODEL_NAME,
    EngineConfig,
    ServerConfig,
)
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.setting_kinds import Kind, choice, integer, size
from fusionserve.server.settings import Setting, Values, config_setting

ENGINE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
SERVER_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ServerConfig)}


def _engine(field: str, name: str, kind: Kind, text: str, default_text: str = "") -> dict[str, Setting]:
    default = None if default_text else ENGINE_DEFAULTS[field]
    return {field: Setting(name=name, kind=kind, help=text, default=default, default_text=default_text)}


def _server(field: str, name: str, kind: Kind, text: str) -> dict[str, Setting]:
    return {field: Setting(name=name, kind=kind, help=text, default=SERVER_DEFAULTS[field])}


ENGINE_SETTINGS: Mapping[str, Setting] = {
    **_engine("model", "model", kinds.MODEL, "base model: a folder or a hub id", "the embedded model"),
    **_engine("model_name", "model-name", kinds.TEXT, "name to serve it under", "its folder's name"),
    **_engine(
        "device",
        "device",
        choice("auto", "cpu", "cuda"),
        "where to compute; auto takes a GPU if there is one",
    ),
    **_engine("dtype", "dtype", choice("auto", "float32", "bfloat16", "float16"), "type of the base weights"),
    **_engine(
        "quantize",
        "quantize",
        choice("none", "int8", "int4", "nf4"),
        "hold the base's linear weights in 8 bits, which loses next to nothing, or in 4",
    ),
    "adapter_dirs": Setting(
        name="adapter-dir",
        kind=kinds.FOLDER,
        help="folder whose subfolders are adapters that load on demand, and the only place they load from",
        default_text="the embedded adapters with the embedded model, else none",
        is_list=True,
    ),
    "adapters": Setting(
        name="adapter", kind=kinds.ADAPTER, help="adapter to load at the start", default=(), is_list=True
    ),
    "fusion_dirs": Setting(
        name="fusion-dir",
        kind=kinds.FOLDER,
        help="folder whose subfolders are fusions that load on demand, and the only place they load from",
        default_text="the embedded fusion with the embedded model, else none",
        is_list=True,
    ),
    "fusions": Setting(
        name="fusion",
        kind=kinds.FUSION,
        help="fusion to load at the start, its members with it",
        default=(),
        is_list=True,
    ),
    **_engine(
        "max_context_tokens",
        "max-context-tokens",
        integer(2),
        "most tokens of prompt and output",
        "the model's",
    ),
    **_engine("max_batch_tokens", "max-batch-tokens", integer(1), "tokens computed per step"),
    **_engine(
        "prompt_step_s",
        "prompt-step-time",
        kinds.SECONDS,
        "how long a step with prompts may last while others decode: less keeps streams even",
    ),
    **_engine(
        "min_prompt_tokens",
        "min-prompt-tokens",
        integer(1),
        "tokens of prompts computed per step while others decode, however long that takes",
    ),
    **_engine("max_batch_requests", "max-batch-requests", integer(1), "requests running at once"),
    **_engine(
        "max_queued_requests", "max-queued-requests", integer(0), "requests that may wait; more are refused"
    ),
    **_engine(
        "fair_weights",
        "fair-weights",
        kinds.SHARES,
        "shares of the server under load: of an adapter, base, fusion:NAME, blend:A+B",
        "1 for each",
    ),
    **_engine(
        "max_open_tokens",
        "max-open-tokens",
        integer(1),
        "tokens that all requests, waiting and running, may come to have; more are refused",
    ),
    **_engine(
        "default_max_new_tokens",
        "default-max-new-tokens",
        integer(1),
        "tokens to generate for requests that do not say how many",
    ),
    **_engine("block_size", "block-size", integer(1, 4096), "tokens per block of the KV cache"),
    **_engine(
        "kv_cache_bytes",
        "kv-cache-size",
        kinds.SIZE,
        "memory for the KV cache",
        "512MiB; of a GPU nine tenths of what is free, less the adapter pool and the largest step",
    ),
    **_engine("adapter_pool_ranks", "adapter-pool-ranks", integer(1), "rank rows for adapters on the device"),
    **_engine("adapter_host_bytes", "adapter-host-size", kinds.SIZE, "host memory for loaded adapters"),
    **_engine(
        "fusion_host_bytes",
        "fusion-host-size",
        kinds.SIZE,
        "host memory for loaded fusions, beside their members",
    ),
    **_engine("max_adapter_rank", "max-adapter-rank", integer(1), "largest rank an adapter may have"),
    **_engine(
        "allow_base_mismatch",
        "allow-base-mismatch",
        kinds.SWITCH,
        "load adapters that name another base model, and fusions trained on one",
    ),
    **_engine(
        "enable_prefix_cache", "prefix-cache", kinds.SWITCH, "reuse the KV cache of equal prompt beginnings"
    ),
    **_engine("load_timeout_s", "load-timeout", kinds.TIME_LIMIT, "time for reading an adapter or a fusion"),
    **_engine(
        "step_timeout_s",
        "step-timeout",
        kinds.TIME_LIMIT,
        "time after which a step hangs and the server stops",
    ),
    **_engine("num_threads", "threads", integer(1, 4096), "threads for computing", "the cores at hand"),
}

SERVER_SETTINGS: Mapping[str, Setting] = {
    **_server("listen", "listen", kinds.ADDRESS, "where gRPC listens; port 0 picks a free one"),
    **_server("metrics_listen", "metrics-listen", kinds.ADDRESS_OR_OFF, "where Prometheus scrapes /metrics"),
    **_server(
        "tls_cert",
        "tls-cert",
        kinds.FILE,
        "certificate chain (PEM) to serve TLS with; reread when it changes",
    ),
    **_server("tls_key", "tls-key", kinds.FILE, "its private key (PEM)"),
    **_server(
        "tls_client_ca",
        "tls-client-ca",
        kinds.FILE,
        "clients must show a certificate of this authority (PEM)",
    ),
    **_server(
        "token_file", "token-file", kinds.FILE, "who may call and do what (TOML; `fusionserve token`); reread"
    ),
    **_server(
        "allow_insecure",
        "allow-insecure",
        kinds.SWITCH,
        "listen beyond this machine without TLS and tokens",
    ),
    **_server(
        "share_prefix_cache",
        "share-prefix-cache",
        kinds.SWITCH,
        "reuse cached prompts across the names of the token file; timing then tells one what others have asked",
    ),
    **_server(
        "log_requests",
        "log-requests",
        choice("off", "meta", "text"),
        "log a line per generation; text has prompt and output in it",
    ),
    **_server("enable_reflection", "reflection", kinds.SWITCH, "describe the API to clients that ask"),
    **_server(
        "enable_channelz", "channelz", kinds.SWITCH, "show the state of connections to clients that ask"
    ),
    **_server("max_message_bytes", "max-message-size", size(1 << 10, 512 << 20), "largest request taken"),
    **_server(
        "max_request_s",
        "max-request-time",
        kinds.TIME_LIMIT,
        "most time for a request; its own deadline may be sooner",
    ),
    **_server(
        "write_timeout_s",
        "write-timeout",
        kinds.TIME_LIMIT,
        "time for a client to take a message; then its request is ended",
    ),
    **_server(
        "keepalive_time_s", "keepalive-time", kinds.TIME_LIMIT, "silence after which a client is pinged"
    ),
    **_server(
        "keepalive_timeout_s",
        "keepalive-timeout",
        kinds.TIME_LIMIT,
        "time a ping's answer may take; then the client's requests are ended",
    ),
    **_server(
        "drain_window_s",
        "drain-window",
        kinds.SECONDS,
        "time after SIGTERM in which new requests still get a refusal that says so; longer behind a load balancer",
    ),
    **_server("drain_grace_s", "drain-grace", kinds.SECONDS, "time for running requests after SIGTERM"),
    **_server(
        "adapter_label_limit", "adapter-label-limit", integer(0, 10000), "adapters with metrics of their own"
    ),
}

PROCESS_SETTINGS = (
    Setting(
        name="log-level",
        kind=choice("debug", "info", "warning", "error"),
        help="least level that is logged, to standard error",
        default="info",
    ),
    config_setting(),
)

SERVE_SETTINGS = (*ENGINE_SETTINGS.values(), *SERVER_SETTINGS.values(), *PROCESS_SETTINGS)


def to_engine_config(values: Values) -> EngineConfig:
    """The engine's configuration; without a model it is the embedded one with the embedded adapters."""
    fields: dict[str, Any] = {field: values[setting.name] for field, setting in ENGINE_SETTINGS.items()}
    if fields["model"] is None:
        fields["model"] = str(EMBEDDED_MODEL)
        fields["model_name"] = fields["model_name"] or EMBEDDED_MODEL_NAME
        if fields["adapter_dirs"] is None:
            fields["adapter_dirs"] = (EMBEDDED_ADAPTERS,)
        if fields["fusion_dirs"] is None:
            fields["fusion_dirs"] = (EMBEDDED_FUSIONS,)
    fields["model_name"] = fields["model_name"] or Path(fields["model"]).resolve().name
    fields["adapter_dirs"] = fields["adapter_dirs"] or ()
    fields["fusion_dirs"] = fields["fusion_dirs"] or ()
    return EngineConfig(**fields)


def to_server_config(values: Values) -> ServerConfig:
    """The server's configuration."""
    return ServerConfig(**{field: values[setting.name] for field, setting in SERVER_SETTINGS.items()})
