"""What a training document is, how documents are split, deduplicated, stored and read back."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name that does not depend on the machine it was found on."""

    name: str
    text: str


def position(name: str) -> float:
    """Map a document name to a fixed place in [0, 1), the same on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_held_out(name: str, share: float) -> bool:
    """Tell whether the document belongs to the held-out side of the split."""
    return position(name) < share


def in_split_order(documents: Iterable[Document]) -> list[Document]:
    """Order documents by `position`: held-out documents come first, whatever their share."""
    return sorted(documents, key=lambda document: position(document.name))


def drop_repeated(documents: Iterable[Document], min_novel: float = 0.5) -> Iterator[Document]:
    """Yield the documents of which at least `min_novel` of the longer lines were not seen before."""
    seen: set[int] = set()
    for document in documents:
        lines = {hash(line) for line in map(str.strip, document.text.splitlines()) if len(line) > 20}
        if not lines:
            continue
        novel = len(lines - seen) / len(lines)
        seen |= lines
        if novel >= min_novel:
            yield document


def drop_repeated_lines(documents: Iterable[Document]) -> Iterator[Document]:
    """Yield documents without any line that an earlier document already had."""
    seen: set[str] = set()
    for document in documents:
        lines = [line for line in document.text.splitlines() if line not in seen]
        seen.update(lines)
        yield Document(document.name, "\n".join(lines) + "\n")


def excerpt(document: Document, max_chars: int) -> Document:
    """Cut a long document to whole lines from a place fixed by its name."""
    spare = len(document.text) - max_chars
    if spare <= 0:
        return document
    start = document.text.find("\n", int(spare * position(document.name + "#excerpt"))) + 1
    text = document.text[start : start + max_chars]
    return Document(document.name, text[: text.rfind("\n") + 1] or text)


def take(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """Yield leading documents until their text adds up to `max_bytes` of UTF-8."""
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if total > max_bytes:
            return
        yield document


def write_documents(documents: Iterable[Document], path: Path) -> int:
    """Write the texts to one file, each ended by the end-of-text mark, and return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.write_bytes(join_texts(document.text for document in documents).encode())


def join_texts(texts: Iterable[str]) -> str:
    """The texts in a row, each ended by the end-of-text mark."""
    return "".join(f"{text.rstrip()}\n{END_OF_TEXT}\n" for text in texts)


def read_texts(path: Path) -> list[str]:
    """Read back the texts that `write_documents` wrote, in order."""
    parts = path.read_text(encoding="utf-8").removesuffix(END_OF_TEXT).split(f"{END_OF_TEXT}\n")
    return [part for part in parts if part.strip()]


def take_chars(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """Yield leading texts until they add up to `max_chars`."""
    total = 0
    for text in texts:
        if total >= max_chars:
            return
        total += len(text)
        yield text
