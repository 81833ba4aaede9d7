"""The metrics' names, the cap on adapter labels, and that the numbers move as requests do."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from fusionserve import metrics
from fusionserve.config import EMBEDDED_ADAPTERS, EMBEDDED_MODEL, EMBEDDED_MODEL_NAME, EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.errors import ArtifactError, NotFoundError
from fusionserve.generation import (
    Adaptation,
    AdapterTerm,
    GenerateParams,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
    TokenPrompt,
)
from fusionserve.metrics import REGISTRY, AdapterLabels

# The server's own module adds more of them (grpc_, process_, fusionserve_build) where it is imported too.
DECLARED = {
    value._name for name, value in vars(metrics).items() if name.isupper() and hasattr(value, "_name")
}
FAMILIES = {family.name: family for family in REGISTRY.collect() if family.name in DECLARED}
LABELS = {
    "cause",
    "kind",
    "finish_reason",
    "status",
    "state",
    "reason",
    "tier",
    "adapter",
    "fusion",
    "member",
}
# Units that Prometheus asks to be replaced by their base unit, and what a histogram may measure.
NOT_BASE_UNITS = {
    "ms",
    "milliseconds",
    "us",
    "microseconds",
    "minutes",
    "kb",
    "mb",
    "mib",
    "kilobytes",
    "percent",
}
FIRST, SECOND = "polish", "spanish"  # of one size

_request_ids = count()


@pytest.mark.parametrize("name", FAMILIES)
def test_name_follows_the_conventions(name: str) -> None:
    family = FAMILIES[name]
    assert re.fullmatch(r"fusionserve(_[a-z]+)+", name)
    assert not set(name.split("_")) & NOT_BASE_UNITS
    assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
    assert family.type in ("counter", "gauge", "histogram")
    assert family.type != "histogram" or name.endswith("_seconds")
    assert family.documentation.endswith(".")
    assert set(labels_of(family)) <= LABELS


def labels_of(family: Metric) -> tuple[str, ...]:
    """The labels it was declared with; a family without series has no samples to show them."""
    collector = REGISTRY._names_to_collectors[family.name]
    names: tuple[str, ...] = collector._labelnames  # type: ignore[attr-defined]
    return names


def test_every_declared_metric_is_registered_under_its_own_name() -> None:
    declared = [
        value for name, value in vars(metrics).items() if name.isupper() and hasattr(value, "collect")
    ]
    declared.remove(REGISTRY)
    assert len(declared) == len(FAMILIES) > 20


def test_counters_end_in_total_and_nothing_says_when_it_was_created() -> None:
    text = generate_latest(REGISTRY).decode()
    assert "_created" not in text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")


def test_histograms_have_no_adapter_label() -> None:
    assert all(
        "adapter" not in labels_of(family) for family in FAMILIES.values() if family.type == "histogram"
    )


@pytest.fixture
def labels() -> Iterator[AdapterLabels]:
    labels = AdapterLabels(2)
    yield labels
    for name in ("label-a", "label-b", "label-c", AdapterLabels.OTHER):
        metrics.ADAPTER_REQUESTS.remove(name)
        metrics.ADAPTER_GENERATED_TOKENS.remove(name)


def test_labels_are_capped(labels: AdapterLabels) -> None:
    assert [labels.label(f"label-{letter}") for letter in "abcab"] == [
        "label-a",
        "label-b",
        "other",
        "label-a",
        "label-b",
    ]
    assert [labels.label(f"name-{number}") for number in range(100)] == ["other"] * 100


def test_dropped_label_loses_its_series_and_frees_its_place(labels: AdapterLabels) -> None:
    for name in ("label-a", "label-b"):
        metrics.ADAPTER_REQUESTS.labels(labels.label(name)).inc()
    labels.drop("label-a")
    assert value("fusionserve_adapter_requests_total", adapter="label-a") is None
    assert value("fusionserve_adapter_requests_total", adapter="label-b") == 1
    assert labels.label("label-c") == "label-c"
    assert labels.label("label-a") == "other"


def test_dropping_an_unlabelled_adapter_changes_nothing(labels: AdapterLabels) -> None:
    metrics.ADAPTER_REQUESTS.labels(labels.OTHER).inc()
    labels.drop("label-a")
    labels.drop(labels.OTHER)
    assert value("fusionserve_adapter_requests_total", adapter="other") == 1


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


@contextmanager
def expected_changes(changes: Mapping[str, float]) -> Iterator[None]:
    """Asserts how much each sample changes in the block; a key is "sample" or "sample{label}"."""

    def read() -> dict[str, float]:
        samples = {}
        for key in changes:
            name, _, label = key.rstrip("}").partition("{")
            samples[key] = value(name, **({"adapter": label} if label else {})) or 0.0
        return samples

    before = read()
    yield
    assert {key: now - before[key] for key, now in read().items()} == dict(changes)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """The name of an adapter that cannot be served."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    return "broken"


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model=str(EMBEDDED_MODEL),
        model_name=EMBEDDED_MODEL_NAME,
        dtype="float32",
        adapter_dirs=(EMBEDDED_ADAPTERS, tmp_path),
        block_size=8,
        kv_cache_bytes=8 << 20,
    )
    engine = AsyncEngine.load(config, AdapterLabels(8))
    await engine.start()
    yield engine
    await engine.close()
    for name in (FIRST, SECOND):
        metrics.ADAPTER_REQUESTS.remove(name)
        metrics.ADAPTER_GENERATED_TOKENS.remove(name)


async def generate(
    engine: AsyncEngine, *adapters: str, num_candidates: int = 1, output: OutputOptions | None = None
) -> None:
    """A prompt of 20 tokens and 5 new ones per candidate."""
    kind = ("base", "lora", "blend")[min(len(adapters), 2)]
    params = GenerateParams(
        request_id=f"metrics-{next(_request_ids)}",
        prompt=TokenPrompt(tuple(range(50, 70))),
        adaptation=Adaptation(kind, tuple(AdapterTerm(name) for name in adapters)),
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingCriteria(max_new_tokens=5, ignore_eos=True),
        num_candidates=num_candidates,
        output=output or OutputOptions(),
    )
    async for _ in engine.generate(params):
        pass


async def test_numbers_move_as_requests_do(engine: AsyncEngine) -> None:
    with expected_changes(
        {
            "fusionserve_prompt_tokens_total": 20,
            "fusionserve_generated_tokens_total": 10,
            "fusionserve_step_tokens_total": 20 + 4 + 4 + 4,  # the second candidate finds 16 of the 20
            "fusionserve_time_to_first_token_seconds_count": 1,
            "fusionserve_inter_token_seconds_count": 8,
            "fusionserve_queue_seconds_count": 1,
            "fusionserve_request_seconds_count": 1,
            "fusionserve_prefix_cache_query_tokens_total": 20,
            "fusionserve_prefix_cache_hit_tokens_total": 0,
            "fusionserve_adapter_loads_total": 0,
        }
    ):
        await generate(engine, num_candidates=2)
    with expected_changes(
        {
            "fusionserve_prefix_cache_query_tokens_total": 20,
            "fusionserve_prefix_cache_hit_tokens_total": 16,
            "fusionserve_step_tokens_total": 8,
        }
    ):
        await generate(engine)
    with expected_changes({"fusionserve_prefix_cache_query_tokens_total": 0}):  # it is not looked for
        await generate(engine, output=OutputOptions(prompt_logprobs=0))
    for gauge in ("requests_open", "requests_running", "requests_queued", "kv_blocks_used"):
        assert value(f"fusionserve_{gauge}") == 0
    assert value("fusionserve_kv_blocks") == engine.engine.scheduler.blocks.num_blocks


async def test_numbers_of_adapters_move_as_requests_do(engine: AsyncEngine) -> None:
    with expected_changes(
        {
            "fusionserve_adapter_loads_total": 2,
            "fusionserve_adapter_load_seconds_count": 2,
            "fusionserve_adapter_activations_total": 2,
            f"fusionserve_adapter_requests_total{{{FIRST}}}": 2,
            f"fusionserve_adapter_requests_total{{{SECOND}}}": 1,
            f"fusionserve_adapter_generated_tokens_total{{{FIRST}}}": 10,
            f"fusionserve_adapter_generated_tokens_total{{{SECOND}}}": 5,
        }
    ):
        await generate(engine, FIRST)
        await generate(engine, FIRST, SECOND)
    statuses = [status for status in await engine.list_adapters() if status.version]
    assert value("fusionserve_adapter_pool_ranks_used") == sum(status.max_rank for status in statuses) > 0
    assert value("fusionserve_adapters", state="ready") == len(statuses) == 2
    assert value("fusionserve_adapter_host_bytes") == sum(status.host_bytes for status in statuses)
    await engine.unload_adapter(FIRST, force=False)
    assert value("fusionserve_adapter_requests_total", adapter=FIRST) is None
    assert value("fusionserve_adapter_requests_total", adapter=SECOND) == 1
    assert value("fusionserve_adapters", state="ready") == 1


async def test_leases_and_held_rows_are_those_of_the_requests_that_run(engine: AsyncEngine) -> None:
    held = ("fusionserve_adapter_leases", "fusionserve_adapter_pool_ranks_held")
    params = GenerateParams(
        request_id="metrics-held",
        prompt=TokenPrompt(tuple(range(50, 70))),
        adaptation=Adaptation("blend", (AdapterTerm(FIRST), AdapterTerm(SECOND))),
        stopping=StoppingCriteria(max_new_tokens=200, ignore_eos=True),
    )
    stream = engine.generate(params)
    await anext(stream)
    await anext(stream)
    ranks = sum([(await engine.get_adapter(name)).max_rank for name in (FIRST, SECOND)])
    assert [value(name) for name in held] == [2, ranks]
    assert value("fusionserve_requests_open") == 1
    await stream.aclose()
    async with asyncio.timeout(5):
        while any(value(name) for name in held):
            await asyncio.sleep(0.01)


async def test_evicted_adapter_gives_its_label_back(engine: AsyncEngine) -> None:
    await generate(engine, FIRST)
    engine._store.registry.budget_bytes = (await engine.get_adapter(FIRST)).host_bytes * 5 // 4
    await generate(engine, SECOND)
    assert (await engine.get_adapter(FIRST)).version == 0
    assert value("fusionserve_adapter_requests_total", adapter=FIRST) is None
    assert value("fusionserve_adapter_generated_tokens_total", adapter=FIRST) is None
    assert value("fusionserve_adapter_requests_total", adapter=SECOND) == 1


async def test_reloaded_adapter_keeps_its_label(engine: AsyncEngine) -> None:
    await generate(engine, FIRST)
    await engine.load_adapter(FIRST, None, pin=False, replace=True)
    assert value("fusionserve_adapter_requests_total", adapter=FIRST) == 1


async def test_refused_load_is_counted_by_its_reason(engine: AsyncEngine, broken: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        await generate(engine, broken)
    reason = caught.value.reason
    before = value("fusionserve_adapter_load_failures_total", reason=reason)
    unchanged = {"fusionserve_adapter_loads_total": 0, "fusionserve_prompt_tokens_total": 0}
    with expected_changes(unchanged), pytest.raises(ArtifactError):
        await generate(engine, broken)
    assert before is not None
    assert value("fusionserve_adapter_load_failures_total", reason=reason) == before + 1
    assert value("fusionserve_adapter_requests_total", adapter=broken) is None


async def test_name_nobody_knows_gets_no_label(engine: AsyncEngine) -> None:
    with pytest.raises(NotFoundError):
        await generate(engine, "nobody")
    assert 'adapter="nobody"' not in generate_latest(REGISTRY).decode()
