"""What a model's `generation_config.json` says: which tokens end an answer, and what requests say themselves."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedModel

from fusionserve.errors import StartupError

_FILE = "generation_config.json"
# What generates as a request does that says nothing; null always does.
_NEUTRAL: Mapping[str, object] = MappingProxyType(
    {
        "bad_words_ids": [],
        "begin_suppress_tokens": [],
        "do_sample": True,
        "encoder_repetition_penalty": 1,
        "epsilon_cutoff": 0,
        "eta_cutoff": 0,
        "exponential_decay_length_penalty": None,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "guidance_scale": 1,
        "max_new_tokens": None,
        "min_length": 0,
        "min_new_tokens": 0,
        "min_p": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "penalty_alpha": 0,
        "repetition_penalty": 1,
        "sequence_bias": [],
        "stop_strings": [],
        "suppress_tokens": [],
        "temperature": 1,
        "top_h": None,
        "top_k": 0,
        "top_p": 1,
        "typical_p": 1,
    }
)

logger = logging.getLogger(__name__)


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


def tell_of_unapplied(settings: Mapping[str, object]) -> None:
    """Logs which settings would change what is generated: requests have the API's defaults, not a model's."""
    unapplied = [
        f"{name} {value}" if isinstance(value, int | float) else name
        for name, value in sorted(settings.items())
        if name in _NEUTRAL and value is not None and value != _NEUTRAL[name]
    ]
    if unapplied:
        logger.info("%s: not applied, requests may say so themselves: %s", _FILE, ", ".join(unapplied))


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
