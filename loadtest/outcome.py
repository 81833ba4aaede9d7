"""What a load test measured, as it is: the records, and what the server was when it began."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from fusionserve.loadtest.catalog import Catalog
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest.residency import residencies
from fusionserve.loadtest_config import LoadConfig


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished run. Figures are over `counted`, which leaves the warm-up out."""

    config: LoadConfig
    catalog: Catalog
    records: list[RequestRecord]
    started_at: datetime
    num_not_sent: int
    most_in_flight: int
    client_cpu_s: float  # processor time of the load generator over the whole run
    was_stopped: bool

    @cached_property
    def counted(self) -> list[RequestRecord]:
        """The records that figures are made of."""
        return [record for record in self.records if record.is_counted]

    @cached_property
    def window_s(self) -> tuple[float, float]:
        """From when the first counted request was due until the last one ended."""
        if not self.counted:
            return 0.0, 0.0
        return min(each.due_s for each in self.counted), max(each.ended_s for each in self.counted)

    @property
    def seconds(self) -> float:
        """The length of the window."""
        start_s, end_s = self.window_s
        return end_s - start_s

    @cached_property
    def residencies(self) -> dict[int, str]:
        """Cold, joined, warm or none, by the request's index; the warm-up's requests can make others warm."""
        return residencies(self.records, self.catalog.loaded_versions)
