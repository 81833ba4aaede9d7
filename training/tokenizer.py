"""Command that trains the byte-level BPE tokenizer of the base model."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusionserve.training.corpus import train_path
from fusionserve.training.documents import END_OF_TEXT, read_texts, take_chars
from fusionserve.training.sources import BASE_SOURCES


def sample_texts(corpus: Path, max_chars: int) -> Iterator[str]:
    """Yield about `max_chars` of training text of each of the base's domains, so that none dominates the vocabulary."""
    for domain in sorted(BASE_SOURCES):
        yield from take_chars(read_texts(train_path(corpus, domain)), max_chars)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE that can encode any text and decode it back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path, context: int) -> None:
    """Save in the form that `AutoTokenizer` loads."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Train and save the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-chars", type=int, default=2_000_000, help="text of each domain to learn from")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(sample_texts(arguments.corpus, arguments.max_chars), arguments.vocab_size)
    save_tokenizer(tokenizer, arguments.out, arguments.context)


if __name__ == "__main__":
    main()
