"""Command that collects the text domains: a training file and a held-out file for each."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fusionserve.training.documents import (
    Document,
    drop_repeated,
    excerpt,
    in_split_order,
    is_held_out,
    take,
    write_documents,
)
from fusionserve.training.sources import SOURCES


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """How much text goes to each side of the split of one domain."""

    held_out_share: float = 0.06
    max_train_bytes: int = 12_000_000
    max_held_out_bytes: int = 60_000
    max_excerpt_chars: int = 3_000


def split(documents: list[Document], sizes: SplitSizes) -> tuple[list[Document], list[Document]]:
    """Split into (training, held-out) documents that share neither a name nor most of their lines."""
    novel = list(drop_repeated(in_split_order(documents)))
    held_out = [document for document in novel if is_held_out(document.name, sizes.held_out_share)]
    train = novel[len(held_out) :]
    excerpts = (excerpt(document, sizes.max_excerpt_chars) for document in held_out)
    return list(take(train, sizes.max_train_bytes)), list(take(excerpts, sizes.max_held_out_bytes))


def train_path(corpus: Path, domain: str) -> Path:
    """Where the training text of a domain lies."""
    return corpus / "train" / f"{domain}.txt"


def held_out_path(corpus: Path, domain: str) -> Path:
    """Where the held-out text of a domain lies."""
    return corpus / "heldout" / f"{domain}.txt"


def collect(domain: str, out: Path, sizes: SplitSizes) -> str:
    """Write both files of one domain and return a line that says how large they are."""
    train, held_out = split(list(SOURCES[domain]()), sizes)
    train_bytes = write_documents(train, train_path(out, domain))
    held_out_bytes = write_documents(held_out, held_out_path(out, domain))
    names = "".join(f"{document.name}\n" for document in held_out)
    held_out_path(out, domain).with_suffix(".names").write_text(names, encoding="utf-8")
    return (
        f"{domain}: {len(train)} documents, {train_bytes} bytes; held out {len(held_out)}, {held_out_bytes}"
    )


def main() -> None:
    """Collect every domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--domains", nargs="*", choices=sorted(SOURCES), default=list(SOURCES))
    parser.add_argument("--max-train-bytes", type=int, default=12_000_000)
    arguments = parser.parse_args()
    sizes = SplitSizes(max_train_bytes=arguments.max_train_bytes)
    for domain in tqdm(arguments.domains):
        tqdm.write(collect(domain, arguments.out, sizes))


if __name__ == "__main__":
    main()
