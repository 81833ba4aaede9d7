"""Scrapes share renderings, in two formats and no more."""

from __future__ import annotations

import time

import pytest
from prometheus_client import CollectorRegistry, Gauge

from fusionserve.server.metrics_snapshot import MetricsSnapshot

OPEN_METRICS = "application/openmetrics-text"


class SlowRegistry(CollectorRegistry):
    """Counts its renderings, each of which takes a while."""

    num_renderings = 0

    def collect(self):  # type: ignore[no-untyped-def]
        self.num_renderings += 1
        until_s = time.thread_time() + 0.01
        while time.thread_time() < until_s:
            pass
        return super().collect()


@pytest.fixture
def registry() -> SlowRegistry:
    registry = SlowRegistry()
    Gauge("level", "A level.", registry=registry).set(1)
    registry.num_renderings = 0
    return registry


def test_rendering_takes_a_small_share_of_the_time_however_often_one_scrapes(registry: SlowRegistry) -> None:
    snapshot = MetricsSnapshot(registry)
    end_s = time.monotonic() + 0.5
    num_scrapes = 0
    while time.monotonic() < end_s:
        assert b"level 1.0" in snapshot.render("")[0]
        num_scrapes += 1
    assert num_scrapes > 100
    assert 1 < registry.num_renderings <= 6


def test_what_is_old_is_rendered_anew(registry: SlowRegistry) -> None:
    snapshot = MetricsSnapshot(registry)
    snapshot.render("")
    gauge = registry._names_to_collectors["level"]
    assert isinstance(gauge, Gauge)
    gauge.set(2)
    time.sleep(0.4)
    assert b"level 2.0" in snapshot.render("")[0]


def test_no_header_makes_for_a_third_rendering(registry: SlowRegistry) -> None:
    snapshot = MetricsSnapshot(registry)
    for number in range(20):
        body, content_type = snapshot.render(f"{OPEN_METRICS}; version={number}.0.0; escaping=x{number}")
        assert content_type.startswith(OPEN_METRICS)
        assert body.endswith(b"# EOF\n")
        assert snapshot.render(f"text/plain; version={number}")[1].startswith("text/plain")
    assert registry.num_renderings <= 4
    assert len(snapshot._bodies) == 2
