"""Message catalogues of installed programs: texts that mix languages, and a language that no adapter knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from gettext import GNUTranslations
from pathlib import Path

from fusionserve.training.documents import Document, in_split_order

LOCALES = Path("/usr/share/locale")
_MIN_CHARS, _MAX_CHARS = 40, 400  # of a message worth reading
_SPACES = re.compile(r"\s+")

Messages = dict[str, str]  # English text -> its translation


def read_catalogue(language: str, program: str) -> Messages:
    """The longer messages of a program in a language, in one line each; empty if it has none."""
    path = LOCALES / language / "LC_MESSAGES" / f"{program}.mo"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        catalogue = GNUTranslations(file)._catalog  # type: ignore[attr-defined]  # no other way lists messages
    pairs = {
        _one_line(source): _one_line(target)
        for source, target in catalogue.items()
        if isinstance(source, str)
    }
    return {
        source: target
        for source, target in pairs.items()
        if source != target and _MIN_CHARS <= len(source) <= _MAX_CHARS and len(target) >= _MIN_CHARS
    }


def programs(language: str) -> list[str]:
    """Programs with a catalogue in the language, in the fixed order of documents."""
    paths = (LOCALES / language / "LC_MESSAGES").glob("*.mo")
    return [document.name for document in in_split_order(Document(path.stem, "") for path in paths)]


def multilingual_documents(languages: tuple[str, ...], entries: int) -> Iterator[Document]:
    """Per program, documents of `entries` messages, each in English and then in every language."""
    for program in programs(languages[0]):
        catalogues = [read_catalogue(language, program) for language in languages]
        shared = [source for source in catalogues[0] if all(source in other for other in catalogues)]
        for start in range(0, len(shared) - entries + 1, entries):
            lines = [
                line
                for source in shared[start : start + entries]
                for line in (source, *(catalogue[source] for catalogue in catalogues), "")
            ]
            yield Document(f"{program}-{start}", "\n".join(lines))


def translated_messages(language: str) -> Iterator[tuple[str, str]]:
    """(program, translation) of every longer message, without repetitions."""
    seen: set[str] = set()
    for program in programs(language):
        for text in read_catalogue(language, program).values():
            if text not in seen:
                seen.add(text)
                yield program, text


def _one_line(text: str) -> str:
    return _SPACES.sub(" ", text).strip()
