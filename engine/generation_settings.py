"""What a model's `generation_config.json` says: which tokens end an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from fusionserve.errors import StartupError

_FILE = "generation_config.json"


def read_generation_settings(directory: Path) -> Mapping[str, object]:
    """The fields of the file; none if there is no such file.

    transformers takes a file that it cannot read for none. Raises StartupError MODEL_UNUSABLE instead.
    """
    path = directory / _FILE
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(f"cannot load model {directory}: its {_FILE} is not readable JSON") from error
    if not isinstance(settings, dict):
        raise _unusable(f"cannot load model {directory}: its {_FILE} is not a JSON object")
    return settings


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Ids of the vocabulary that end an answer. Raises StartupError MODEL_UNUSABLE for what is no id."""
    config = model.config.get_text_config()
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if eos is None:
        eos = config.eos_token_id
    if eos is None:
        return frozenset()
    ids = eos if isinstance(eos, list | tuple) else [eos]
    if not all(type(each) is int for each in ids):  # true is 1 to isinstance
        raise _unusable(f"the model's eos_token_id must be a token id or a list of them, not {eos!r:.60}")
    return frozenset(ids).intersection(range(config.vocab_size))  # an id of no logit is never drawn


def _unusable(message: str) -> StartupError:
    return StartupError(message, reason="MODEL_UNUSABLE")
