"""From examples to rows of tokens: encoding, cutting, packing and padding.

Running text that is longer than a row is cut into parts. An example with a prompt is cut at its end; if nothing to
learn is left it is dropped. Both are counted. Packed examples keep their own positions, from 0, by which the model
keeps them apart: none sees another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fusionserve.training.examples import Example

IGNORED = -100  # the label of a token that is not learned
_OPEN_ROWS = 32  # that are looked through for room when an example is packed

IntArray = np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One or more examples in a row; the model predicts every label from the tokens before it."""

    token_ids: IntArray  # [length]
    labels: IntArray  # [length]; IGNORED at the first token of each example, which nothing comes before
    positions: IntArray  # [length]; each example counts from 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_learned(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(slots=True)
class Losses:
    """What did not fit into rows."""

    num_cut: int = 0  # examples cut at their end
    num_dropped: int = 0  # examples of which nothing to learn was left


@dataclass(frozen=True, slots=True)
class RowShape:
    """How rows are made."""

    max_tokens: int
    packing: bool
    losses: Losses = field(default_factory=Losses)


def make_rows(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, shape: RowShape, seed: int
) -> list[Row]:
    """The rows of the examples, in an order drawn by `seed` if they are packed."""
    parts = [part for example in examples for part in _encode(example, tokenizer, shape)]
    if not shape.packing:
        return parts
    Random(seed).shuffle(parts)
    return list(_pack(parts, shape.max_tokens))


def digest_rows(rows: Iterable[Row]) -> str:
    """sha256 (hex) of all that the rows hold."""
    digest = hashlib.sha256()
    for row in rows:
        for array in (row.token_ids, row.labels, row.positions):
            digest.update(len(array).to_bytes(4, "little"))
            digest.update(array.tobytes())
    return digest.hexdigest()


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch [rows, longest row]; the padding behind a row is a text of its own that nobody learns from.

    It has only positions that examples have, since a model may have no more.
    """
    width, num_positions = max(map(len, rows)), 1 + max(int(row.positions.max()) for row in rows)
    is_packed = any(row.positions[-1] != len(row) - 1 for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORED),
        "is_token": torch.zeros(len(rows), width, dtype=torch.bool),
        "position_ids": torch.arange(width).repeat(len(rows), 1),
    }
    for i, row in enumerate(rows):
        here = slice(0, len(row))
        batch["input_ids"][i, here] = torch.from_numpy(row.token_ids.astype(np.int64))
        batch["labels"][i, here] = torch.from_numpy(row.labels.astype(np.int64))
        batch["position_ids"][i, here] = torch.from_numpy(row.positions.astype(np.int64))
        batch["is_token"][i, here] = True
        if is_packed:  # the padding must not read as more of the last example
            batch["position_ids"][i, len(row) :] = torch.arange(width - len(row)) % num_positions
    return batch


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, shape: RowShape) -> Iterator[Row]:
    token_ids, is_learned = _tokens_of(example, tokenizer)
    if len(token_ids) > shape.max_tokens and not example.is_running_text:
        shape.losses.num_cut += 1
        token_ids = token_ids[: shape.max_tokens]
    whole = [
        _to_row(token_ids[start : start + shape.max_tokens], is_learned[start : start + shape.max_tokens])
        for start in range(0, len(token_ids), shape.max_tokens)
    ]
    parts = [row for row in whole if row.num_learned]
    shape.losses.num_dropped += not parts
    yield from parts


def _tokens_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    token_ids: list[int] = []
    is_learned: list[bool] = []
    for i, piece in enumerate(example.pieces):
        if i == 0:
            found = _opening(piece.text, tokenizer, example)
        else:
            context = "\n" if piece.is_learned else _context_in(example.pieces[i - 1].text, tokenizer)
            found = _continuation(piece.text, tokenizer, context)
        token_ids += found
        is_learned += [piece.is_learned] * len(found)
    if not example.is_chat and tokenizer.eos_token_id is not None:
        token_ids.append(tokenizer.eos_token_id)
        is_learned.append(True)
    return token_ids, is_learned


def _opening(text: str, tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """What opens a text when it is served opens it here; what would end it comes once, at the end of all."""
    found: list[int] = tokenizer.encode(text, add_special_tokens=not example.is_chat, verbose=False)
    return found[:-1] if found and not example.is_chat and found[-1] == tokenizer.eos_token_id else found


def _context_in(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides how a given text behind this one is encoded: a special token at its end, if there is one."""
    return next((token for token in tokenizer.get_added_vocab() if text.endswith(token)), "\n")


def _continuation(text: str, tokenizer: PreTrainedTokenizerBase, context: str) -> list[int]:
    """The tokens of a text behind another. Some tokenizers (Llama 2's) put a space before a start."""
    before, both, alone = (
        tokenizer.encode(each, add_special_tokens=False, verbose=False)
        for each in (context, f"{context}{text}", text)
    )
    found: list[int] = both[len(before) :] if both[: len(before)] == before else alone
    return found


def _to_row(token_ids: Sequence[int], is_learned: Sequence[bool]) -> Row:
    tokens = np.asarray(token_ids, dtype=np.int32)
    labels = np.where(np.asarray(is_learned), tokens, IGNORED).astype(np.int32)
    labels[0] = IGNORED
    return Row(tokens, labels, np.arange(len(tokens), dtype=np.int32))


def _pack(parts: Iterable[Row], max_tokens: int) -> Iterator[Row]:
    """Puts each part into the first of the open rows that has room for it."""
    open_rows: list[list[Row]] = []
    for part in parts:
        place = next((row for row in open_rows if sum(map(len, row)) + len(part) <= max_tokens), None)
        if place is None:
            if len(open_rows) == _OPEN_ROWS:
                yield _join(open_rows.pop(0))
            open_rows.append(place := [])
        place.append(part)
    yield from map(_join, open_rows)


def _join(parts: Sequence[Row]) -> Row:
    return Row(
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.positions for part in parts]),
    )
