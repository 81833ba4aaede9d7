"""What is allocated: unlike resident memory it tells what is held from what lies in fragments, or is kept for later."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fusionserve import heap


class MemoryCollector(Collector):
    """Two gauges: bytes of the C heap in use, where glibc tells, and Python's small blocks in use."""

    def collect(self) -> Iterator[Metric]:
        """As they are now."""
        used_bytes = heap.used_bytes()
        if used_bytes is not None:
            help_text = "Bytes of the C heap that are allocated and not freed."
            yield GaugeMetricFamily("fusionserve_heap_used_bytes", help_text, used_bytes)
        help_text = "Blocks of Python's allocator of small objects that are in use."
        yield GaugeMetricFamily("fusionserve_python_blocks_used", help_text, sys.getallocatedblocks())
