"""Token streams: encode whole domains, draw random training windows from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fusionserve.training.documents import read_texts

TokenArray = np.ndarray[tuple[int], np.dtype[np.uint16]]


@dataclass(frozen=True, slots=True)
class TokenStream:
    """All tokens of one domain in a row, each document ended by the end-of-text token."""

    domain: str
    tokens: TokenArray  # [num_tokens]


@dataclass(frozen=True, slots=True)
class WindowShape:
    """The shape of a training batch."""

    batch_size: int
    sequence_length: int

    @property
    def num_tokens(self) -> int:
        """Tokens in one batch."""
        return self.batch_size * self.sequence_length


def encode_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Encode every text of a training or held-out file."""
    encoded = tokenizer(read_texts(path), add_special_tokens=False)["input_ids"]
    rows = [np.asarray([*row, tokenizer.eos_token_id], dtype=np.uint16) for row in encoded]
    return TokenStream(path.stem, np.concatenate(rows))


def random_windows(
    streams: list[TokenStream], shape: WindowShape, generator: np.random.Generator
) -> Iterator[torch.Tensor]:
    """Yield endless batches [batch_size, sequence_length], each row from a domain drawn uniformly."""
    while True:
        picks = generator.integers(len(streams), size=shape.batch_size)
        yield torch.stack([_window(streams[pick].tokens, shape.sequence_length, generator) for pick in picks])


def consecutive_windows(stream: TokenStream, length: int) -> torch.Tensor:
    """Cut the stream into rows [num_rows, length]; a last, shorter row is left out."""
    num_rows = len(stream.tokens) // length
    return torch.from_numpy(stream.tokens[: num_rows * length].astype(np.int64)).view(num_rows, length)


def _window(tokens: TokenArray, length: int, generator: np.random.Generator) -> torch.Tensor:
    start = int(generator.integers(len(tokens) - length))
    return torch.from_numpy(tokens[start : start + length].astype(np.int64))
