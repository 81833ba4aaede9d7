"""Of a model's generation_config.json the end tokens are heeded, and what else it says is told of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, save_tiny_model

from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel, load_base_model
from fusionserve.errors import StartupError

FILE = "generation_config.json"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "llama")


def load(directory: Path, settings: object) -> BaseModel:
    (directory / FILE).write_text(json.dumps(settings))
    return load_as_it_is(directory)


def load_as_it_is(directory: Path) -> BaseModel:
    config = EngineConfig(model=str(directory), model_name="tiny", dtype="float32", num_threads=1)
    return load_base_model(config)


def test_end_tokens_beyond_the_vocabulary_are_no_end_tokens(llama: Path) -> None:
    ids = [1, VOCAB_SIZE - 1, VOCAB_SIZE, -1]
    assert load(llama, {"eos_token_id": ids}).eos_token_ids == {1, VOCAB_SIZE - 1}


@pytest.mark.parametrize("settings", [{}, {"eos_token_id": None}])
def test_end_token_is_the_configs_where_none_is_said(settings: dict[str, object], llama: Path) -> None:
    assert load(llama, settings).eos_token_ids == {1}


def test_end_token_is_the_configs_without_the_file(llama: Path) -> None:
    (llama / FILE).unlink()
    assert load_as_it_is(llama).eos_token_ids == {1}


@pytest.mark.parametrize(
    "eos", ["1", ["1", "7"], "<|end|>", [[1]], 1.0, True, [1, False], {"id": 1}], ids=str
)
def test_end_token_that_is_no_id_is_refused(eos: object, llama: Path) -> None:
    with pytest.raises(StartupError, match="eos_token_id must be a token id or a list of them") as caught:
        load(llama, {"eos_token_id": eos})
    assert caught.value.reason == "MODEL_UNUSABLE"
    assert caught.value.message.endswith(f"not {eos!r}")


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": [1, 7', "[]", "7", "", "[" * 100_000], ids=lambda text: text[:4]
)
def test_file_that_is_no_object_is_refused(text: str, llama: Path) -> None:
    (llama / FILE).write_text(text)
    with pytest.raises(StartupError, match=r"its generation_config\.json is not ") as caught:
        load_as_it_is(llama)
    assert caught.value.reason == "MODEL_UNUSABLE"


def test_settings_that_are_not_applied_are_told_of_in_one_line(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fusionserve")
    neutral = {"do_sample": True, "repetition_penalty": 1.0, "min_p": None, "bos_token_id": 0}
    load(llama, {**neutral, "top_p": 0.9, "temperature": 0.6, "suppress_tokens": [3, 4]})
    (line,) = [record.getMessage() for record in caplog.records if FILE in record.getMessage()]
    assert line.endswith("themselves: suppress_tokens, temperature 0.6, top_p 0.9")


def test_settings_that_change_nothing_are_not_told_of(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fusionserve")
    load(llama, {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": 1})
    assert FILE not in caplog.text
