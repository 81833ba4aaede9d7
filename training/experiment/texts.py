"""Command that makes the texts of the experiment, so that it can be run where no such text is installed.

    train/<domain>.txt.xz       a part of the training text of each adapter: what a fusion learns from
    mixed/<kind>.txt.xz         documents that no single adapter fits
    messages/train.txt.xz       Portuguese messages of programs, which neither base nor adapters know
    messages/held_out.txt.xz    those of other programs

Held-out text of the domains is what ships with the model.
"""

import argparse
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

from fusionserve.config import EMBEDDED
from fusionserve.training.corpus import train_path
from fusionserve.training.documents import (
    Document,
    excerpt,
    in_split_order,
    is_held_out,
    join_texts,
    read_texts,
    take,
)
from fusionserve.training.experiment.catalogues import multilingual_documents, translated_messages
from fusionserve.training.sources import ADAPTER_SOURCES

_TRAIN_BYTES = 1_200_000  # of each domain
_DOCUMENT_CHARS = 6_000
_MIXED_BYTES = 50_000
_PIECE_CHARS = 400  # of one domain, before the other begins
_ENTRIES = 8  # messages in a document
_NEW_LANGUAGE = "pt_BR"
_HELD_OUT_PROGRAMS = 0.2
_TRAIN_MESSAGES, _HELD_OUT_MESSAGES = 1000, 400


def domain_texts(corpus: Path, domain: str) -> Iterator[Document]:
    """The first documents of a domain's training text, long ones cut."""
    for i, text in enumerate(read_texts(train_path(corpus, domain))):
        yield excerpt(Document(f"{domain}-{i}", text), _DOCUMENT_CHARS)


def interleaved(held_out: Path) -> Iterator[Document]:
    """Code with prose: held-out text of neighbouring domains in turns, whole lines at a time."""
    domains = sorted(ADAPTER_SOURCES)
    texts = {domain: read_texts(held_out / f"{domain}.txt") for domain in domains}
    for first, second in pairwise([*domains, domains[0]]):
        for i, pair in enumerate(zip(texts[first], texts[second], strict=False)):
            yield Document(f"{first}-{second}-{i}", _in_turns(*pair))


def new_messages() -> tuple[list[str], list[str]]:
    """(training, held-out) messages of the new language, of different programs."""
    messages = list(translated_messages(_NEW_LANGUAGE))
    held_out = [text for program, text in messages if is_held_out(program, _HELD_OUT_PROGRAMS)]
    train = [text for program, text in messages if not is_held_out(program, _HELD_OUT_PROGRAMS)]
    return _spread(train, _TRAIN_MESSAGES), _spread(held_out, _HELD_OUT_MESSAGES)


def main() -> None:
    """Write all texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    for domain in sorted(ADAPTER_SOURCES):
        texts = take(domain_texts(arguments.corpus, domain), _TRAIN_BYTES)
        _write(arguments.out / "train" / f"{domain}.txt.xz", (document.text for document in texts))
    mixed = {
        "code_prose": interleaved(EMBEDDED / "heldout"),
        "catalogues": multilingual_documents(("es", "pl"), _ENTRIES),
    }
    for kind, documents in mixed.items():
        chosen = take(in_split_order(documents), _MIXED_BYTES)
        _write(arguments.out / "mixed" / f"{kind}.txt.xz", (document.text for document in chosen))
    train, held_out = new_messages()
    _write(arguments.out / "messages" / "train.txt.xz", train)
    _write(arguments.out / "messages" / "held_out.txt.xz", held_out)


def _in_turns(first: str, second: str) -> str:
    """Pieces of both texts, one after the other."""
    pieces = zip(_pieces(first), _pieces(second), strict=False)
    return "\n".join(text for pair in pieces for text in pair)


def _pieces(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in text.strip().splitlines():
        lines.append(line)
        if sum(map(len, lines)) >= _PIECE_CHARS:
            yield "\n".join(lines)
            lines = []


def _spread(texts: list[str], count: int) -> list[str]:
    """`count` texts from all over the list."""
    step = max(1, len(texts) // count)
    return list(islice(texts[::step], count))


def _write(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = join_texts(texts).encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    print(f"{path.name}: {len(data):,} bytes, {path.stat().st_size:,} packed")


if __name__ == "__main__":
    main()
