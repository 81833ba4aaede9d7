"""Rows predict what is learned and nothing else; packed examples do not see each other."""

from pathlib import Path

import pytest
import torch
from tiny_training import DIGITS, LETTERS, tiny_base, write_records, write_texts
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fusionserve.errors import TrainingError
from fusionserve.training import frozen_base
from fusionserve.training.data import load_data
from fusionserve.training.examples import Example
from fusionserve.training.frozen_base import FrozenBase, check_packing
from fusionserve.training.pieces import Piece
from fusionserve.training.rows import IGNORED, RowShape, collate, digest_rows, make_rows
from fusionserve.training_config import DataConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> FrozenBase:
    return tiny_base(tmp_path_factory.mktemp("base"))


def answered(prompt: str, answer: str) -> Example:
    return Example((Piece(prompt, False), Piece(answer, True)))


def text(content: str) -> Example:
    return Example((Piece(content, True),))


def test_prompts_are_not_learned_and_the_end_is(base: FrozenBase) -> None:
    (row,) = make_rows([answered("abc", "123")], base.tokenizer, RowShape(64, packing=False), 0)
    answer = [*base.tokenizer.encode("123"), 0]
    assert row.labels.tolist() == [IGNORED] * (len(row) - len(answer)) + answer
    assert row.token_ids.tolist() == [*base.tokenizer.encode("abc"), *answer]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_answers_are_learned_as_they_follow_their_prompts(scheme: str) -> None:
    """A tokenizer like Llama 2's takes each text that it is given for a start, and puts a space there."""
    vocab = {
        token: i for i, token in enumerate(["<unk>", "</s>", "\n", "▁", *"abc123▁:", "▁a", "▁1", "ab", "▁ab"])
    }
    model = models.BPE(vocab, [("▁", "a"), ("▁", "1"), ("a", "b"), ("▁a", "b")], unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    for prompt, answer in (("a:\n", "12"), ("a:\n", "ab"), ("a:", " ab"), ("1\n", "\n1")):
        (row,) = make_rows([answered(prompt, answer)], tokenizer, RowShape(64, packing=False), 0)
        assert row.token_ids.tolist() == [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]


def test_turns_are_encoded_as_they_follow_each_other() -> None:
    """Serving encodes a conversation as a whole: behind a special token such a tokenizer puts its space again."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "\n", "▁", *"ab12[]"])}
    inner = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    turns = [Piece("[a]", False), Piece("12</s>", True), Piece("[b]", False), Piece("21</s>", True)]
    (row,) = make_rows([Example(tuple(turns), is_chat=True)], tokenizer, RowShape(64, packing=False), 0)
    whole = "".join(turn.text for turn in turns)
    assert row.token_ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)


def test_padding_beside_packed_rows_has_positions_that_examples_have(base: FrozenBase) -> None:
    shape = RowShape(40, packing=True)
    rows = make_rows([text(LETTERS), *(text(DIGITS) for _ in range(8))], base.tokenizer, shape, 0)
    packed = max(rows, key=len)
    short = make_rows([text("ab")], base.tokenizer, RowShape(40, packing=False), 0)
    positions = collate([packed, *short])["position_ids"]
    assert positions.max() == packed.positions.max() < len(packed) - 1
    assert positions[1, len(short[0])] == 0


def test_running_text_is_cut_into_parts_without_loss(base: FrozenBase) -> None:
    shape = RowShape(8, packing=False)
    rows = make_rows([text(LETTERS * 6)], base.tokenizer, shape, 0)
    joined = [token for row in rows for token in row.token_ids.tolist()]
    assert joined == [*base.tokenizer.encode(LETTERS * 6), 0]
    assert max(map(len, rows)) == 8
    assert all(row.labels[0] == IGNORED for row in rows)
    assert (shape.losses.num_cut, shape.losses.num_dropped) == (0, 0)


def test_answered_examples_are_cut_at_their_end_and_counted(base: FrozenBase) -> None:
    shape = RowShape(12, packing=False)
    examples = [answered("a", "123" * 30), answered("abx" * 30, "1")]
    (row,) = make_rows(examples, base.tokenizer, shape, 0)
    assert len(row) == 12
    assert (shape.losses.num_cut, shape.losses.num_dropped) == (2, 1)


def test_packing_keeps_every_example_and_fills_rows(base: FrozenBase) -> None:
    examples = [text(LETTERS * (1 + i % 3)) for i in range(20)]
    apart = make_rows(examples, base.tokenizer, RowShape(32, packing=False), 0)
    packed = make_rows(examples, base.tokenizer, RowShape(32, packing=True), 0)
    assert len(packed) < len(apart)
    assert max(map(len, packed)) <= 32
    assert sum(row.num_learned for row in packed) == sum(row.num_learned for row in apart)
    starts = sum(int((row.positions == 0).sum()) for row in packed)
    assert starts == len(examples)


def test_packed_losses_equal_those_apart(base: FrozenBase) -> None:
    examples = [text(LETTERS), text(DIGITS * 2), answered("ab", "12")]
    apart = make_rows(examples, base.tokenizer, RowShape(60, packing=False), 0)
    packed = make_rows(examples, base.tokenizer, RowShape(60, packing=True), 0)
    assert len(packed) == 1
    torch.testing.assert_close(summed_loss(base, packed), summed_loss(base, apart), rtol=1e-4, atol=1e-3)


def test_padding_changes_nothing(base: FrozenBase) -> None:
    rows = make_rows([text(LETTERS), text(DIGITS * 4)], base.tokenizer, RowShape(60, packing=False), 0)
    apart = sum(summed_loss(base, [row]) for row in rows)
    torch.testing.assert_close(summed_loss(base, rows), apart, rtol=1e-4, atol=1e-3)


@torch.no_grad()
def summed_loss(base: FrozenBase, rows: list) -> Tensor:  # type: ignore[type-arg]
    batch = collate(rows)
    logits = base.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
    )


def test_a_model_that_sees_over_the_border_is_refused(
    base: FrozenBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_packing(base)

    def without_positions(model: torch.nn.Module, *texts: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=torch.cat(texts).unsqueeze(0), use_cache=False).logits[0]
        return logits

    monkeypatch.setattr(frozen_base, "_logits", without_positions)
    with pytest.raises(TrainingError, match="--packing off"):
        check_packing(base)


def test_split_is_by_seed_and_disjoint(base: FrozenBase, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data.jsonl", LETTERS, DIGITS)
    config = DataConfig(train=(data,), held_out_share=0.25, packing=False, max_tokens=128)
    first, again, other = (load_data(config, base.tokenizer, seed) for seed in (1, 1, 2))
    assert len(first.held_out) == 12
    assert len(first.train) == 36
    assert first.digest == again.digest != other.digest


def test_examples_are_drawn_from_each_file(base: FrozenBase, tmp_path: Path) -> None:
    files = tuple(write_texts(tmp_path / f"{i}.jsonl", kind) for i, kind in enumerate((LETTERS, DIGITS)))
    config = DataConfig(train=files, held_out=files[:1], max_examples=5, packing=False, max_tokens=128)
    data = load_data(config, base.tokenizer, 0)
    assert len(data.train) == 10
    assert digest_rows(data.held_out) != digest_rows(data.train)


def test_nothing_to_learn_is_refused(base: FrozenBase, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_records(path, [{"prompt": "abx" * 40, "response": "1"}] * 3)
    with pytest.raises(TrainingError, match="within 8 tokens"):
        load_data(DataConfig(train=(path,), max_tokens=8), base.tokenizer, 0)
