"""Bounds on what one request may ask for, and the form of names. Shared by the API's checks and its documentation."""

from __future__ import annotations

import re

# What the base is called among flows and a fusion's weights, and in metrics all that has no label of its own.
RESERVED_NAMES = frozenset({"base", "other"})
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_REQUEST_ID_LENGTH = 128
MAX_PATH_LENGTH = 1024
MAX_PATH_PARTS = 16
MAX_CANDIDATES = 16
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_LENGTH = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_LOGPROBS = 20
MAX_STREAM_INTERVAL = 1024
MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 1 / 128  # divided by next to nothing, logits would no longer be finite
MAX_REPETITION_PENALTY = 100.0
MAX_PENALTY = 100.0
MAX_ADAPTER_SCALE = 100.0
MAX_BLEND_MEMBERS = 16
MAX_EXCLUDED_MEMBERS = 64
MAX_CACHE_SALT_LENGTH = 256
MAX_CHAT_MESSAGES = 1024
MAX_PRIORITY = 1000


def is_name(text: str) -> bool:
    """True if `text` has the form of a name: 1 to 63 of a-z 0-9 . _ -, starting with a letter or digit, no "..".

    The form leaves no room for a path separator, a parent folder or an escape sequence.
    """
    return NAME_PATTERN.fullmatch(text) is not None and ".." not in text


def is_artifact_name(text: str) -> bool:
    """True if `text` may name an adapter or a fusion: a name that is not reserved."""
    return is_name(text) and text not in RESERVED_NAMES
