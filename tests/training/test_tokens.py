"""Encoding, windows, the schedule and the optimizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusionserve.training.documents import END_OF_TEXT
from fusionserve.training.loop import Schedule
from fusionserve.training.muon import orthogonalise
from fusionserve.training.tokenizer import save_tokenizer, train_tokenizer
from fusionserve.training.tokens import (
    TokenStream,
    WindowShape,
    consecutive_windows,
    encode_file,
    random_windows,
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    trained = train_tokenizer(iter(["the cat sat on the mat\n" * 50]), vocab_size=300)
    save_tokenizer(trained, tmp_path / "tokenizer", context=64)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    return loaded


def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "  the mat\n\tÜber 漢字 🙂 sat"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("the cat", add_special_tokens=False)["input_ids"]) < 5


def test_tokenizer_names_the_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.eos_token_id == 0


def test_encoded_documents_end_with_end_of_text(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "cats.txt"
    path.write_text(f"the cat\n{END_OF_TEXT}\nthe mat\n{END_OF_TEXT}\n")
    stream = encode_file(path, tokenizer)
    assert stream.domain == "cats"
    assert tokenizer.decode(stream.tokens.tolist()) == f"the cat\n{END_OF_TEXT}the mat\n{END_OF_TEXT}"


def test_random_windows_repeat_with_the_seed() -> None:
    streams = [TokenStream(str(i), np.arange(i * 100, i * 100 + 100, dtype=np.uint16)) for i in range(3)]
    shape = WindowShape(batch_size=4, sequence_length=10)
    first, again, other = (next(random_windows(streams, shape, np.random.default_rng(s))) for s in (1, 1, 2))
    assert first.shape == (4, 10)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.diff(dim=1), torch.ones(4, 9, dtype=torch.int64))


def test_consecutive_windows_leave_the_rest_out() -> None:
    windows = consecutive_windows(TokenStream("x", np.arange(25, dtype=np.uint16)), 10)
    assert windows.tolist() == [list(range(10)), list(range(10, 20))]


def test_schedule_warms_up_stays_and_cools_down() -> None:
    schedule = Schedule(steps=100, warmup_steps=10, cooldown_share=0.4)
    factors = [schedule.factor(step) for step in (0, 9, 50, 60, 80, 99)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.025])


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), iterations=5))
    assert values.min() > 0.3
    assert values.max() < 1.4
