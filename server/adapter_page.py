"""One page of a list of adapters or fusions."""

from __future__ import annotations

import base64
import binascii
import bisect
from typing import TypeVar

from fusionserve.adapter_status import AdapterStatus, FusionStatus
from fusionserve.errors import InvalidRequestError
from fusionserve.limits import is_name
from fusionserve.v1 import adapter_pb2

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000

StatusT = TypeVar("StatusT", AdapterStatus, FusionStatus)


def to_page(
    request: adapter_pb2.ListAdaptersRequest | adapter_pb2.ListFusionsRequest, statuses: list[StatusT]
) -> tuple[list[StatusT], str]:
    """The page of `statuses` (sorted by name) that `request` asks for, and the token of the next one.

    A token holds the last name sent, so what comes or goes between two pages makes nothing else appear twice
    or not at all. Raises InvalidRequestError for a token that no page had.
    """
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    first = 0
    if request.page_token:
        last_name = _to_name(request.page_token)
        first = bisect.bisect_right(statuses, last_name, key=lambda status: status.name)
    page = statuses[first : first + size]
    has_more = first + size < len(statuses)
    return page, _to_token(page[-1].name) if has_more else ""


def _to_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _to_name(token: str) -> str:
    try:
        name = base64.b64decode(token, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        name = ""
    if not is_name(name):
        raise InvalidRequestError(
            "page_token must be a next_page_token of this server",
            field="page_token",
            reason="PAGE_TOKEN_INVALID",
        )
    return name
