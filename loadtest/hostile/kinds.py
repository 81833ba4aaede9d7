"""All kinds of hostile clients by name, and an honest one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from fusionserve.loadtest.hostile.cable import be_cut_off
from fusionserve.loadtest.hostile.child import be_frozen, be_killed
from fusionserve.loadtest.hostile.crowd import crowd_in
from fusionserve.loadtest.hostile.haste import (
    cancel_early,
    cancel_late,
    cancel_midway,
    flood_with_resets,
    have_no_time,
)
from fusionserve.loadtest.hostile.idle import stay_idle
from fusionserve.loadtest.hostile.metadata import send_giant_metadata
from fusionserve.loadtest.hostile.raw import call_what_is_no_text, say_nothing, speak_wrong_protocols
from fusionserve.loadtest.hostile.readers import leave_no_room, never_read, read_all, read_slowly
from fusionserve.loadtest.hostile.scrapers import flood_with_scrapes
from fusionserve.loadtest.hostile.target import Target

HONEST = "three honest streams"  # what the others are compared with
KINDS: Mapping[str, Callable[[Target], Awaitable[object]]] = MappingProxyType(
    {
        HONEST: read_all,
        "slow reader": read_slowly,
        "reader that never reads": never_read,
        "no room": leave_no_room,
        "killed": be_killed,
        "frozen": be_frozen,
        "cable cut": be_cut_off,
        "no time": have_no_time,
        "cancel early": cancel_early,
        "cancel midway": cancel_midway,
        "cancel late": cancel_late,
        "resets": flood_with_resets,
        "idle calls": stay_idle,
        "giant metadata": send_giant_metadata,
        "wrong protocols": speak_wrong_protocols,
        "path that is no text": call_what_is_no_text,
        "silence": say_nothing,
        "crowd": crowd_in,
        "scrapes": flood_with_scrapes,
    }
)
