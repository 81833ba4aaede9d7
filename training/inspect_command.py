"""What `fusionserve fusion inspect` runs once its settings are checked."""

from __future__ import annotations

from collections.abc import Iterator

from fusionserve.errors import UnavailableError
from fusionserve.inspection_request import InspectionRequest
from fusionserve.training.fusion_inspection import FusionInspection, inspect_fusion
from fusionserve.training.inspection_plot import draw_inspection
from fusionserve.training.inspection_report import to_json, to_tables
from fusionserve.training.quiet_libraries import keep_libraries_quiet


def run_inspection(request: InspectionRequest) -> Iterator[str]:
    """What is to be printed, as it is ready. Raises what `inspect_fusion` raises, and UnavailableError."""
    keep_libraries_quiet()
    inspection = inspect_fusion(request)
    if not request.as_json:
        yield to_tables(inspection)
    if request.out is not None:
        _draw(request, inspection)
    if request.as_json:
        yield to_json(inspection, request.out)
    elif request.out is not None:
        yield f"\npicture written to {request.out}"


def _draw(request: InspectionRequest, inspection: FusionInspection) -> None:
    assert request.out is not None
    try:
        draw_inspection(request.out, inspection)
    except OSError as error:
        raise UnavailableError(f"{request.out} cannot be written: {error.strerror}") from error
