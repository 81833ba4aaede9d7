"""Python's garbage collector, and what it need not look through."""

from __future__ import annotations

import gc


def spare_from_collection() -> None:
    """Takes what was loaded out of the garbage collector's sight.

    A full collection stops every thread while it looks through all objects, and torch and transformers bring hundreds
    of thousands: no stream gets a token meanwhile.
    """
    gc.collect()
    gc.freeze()
