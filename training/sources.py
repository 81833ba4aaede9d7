"""Find documents of each text domain among the files of an ordinary Debian system with Python."""

import gzip
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fusionserve.training import cleaning
from fusionserve.training.documents import Document, drop_repeated_lines, in_split_order

MAN_ROOT = Path("/usr/share/man")
DOC_ROOT = Path("/usr/share/doc")
INCLUDE_ROOT = Path("/usr/include")
PERL_ROOTS = (Path("/usr/share/perl"), Path("/usr/share/perl5"))
_PAGE_WIDTH = 78
_PARAGRAPH_WIDTH = 2000  # wide enough that each paragraph is one line
_NOT_FREE = re.compile(r"^(gcloud|google-cloud)")  # vendor packages from outside Debian
_MIN_CHARS = 400
_CHANGELOG_CHARS = 30_000  # of one package

Source = Callable[[], Iterator[Document]]


def python_documents() -> Iterator[Document]:
    """Yield modules of the standard library and of the installed packages."""
    paths = sysconfig.get_paths()
    stdlib, site = Path(paths["stdlib"]), Path(paths["purelib"])
    inner = [path for path in stdlib.rglob("*.py") if "site-packages" not in path.parts]
    yield from _code(stdlib, inner, cleaning.strip_script_header)
    yield from _code(site, site.rglob("*.py"), cleaning.strip_script_header)


def c_documents() -> Iterator[Document]:
    """Yield the C headers below the system include folder."""
    for document in _code(INCLUDE_ROOT, INCLUDE_ROOT.rglob("*.h"), cleaning.strip_c_header):
        if cleaning.is_plain_c(document.text):
            yield document


def manpage_documents() -> Iterator[Document]:
    """Yield the English manual pages as a terminal shows them."""
    yield from _manual("", _PAGE_WIDTH)


def licence_documents() -> Iterator[Document]:
    """Yield the copyright files of the installed packages and the common licences."""
    paths = [*DOC_ROOT.glob("*/copyright"), *Path("/usr/share/common-licenses").glob("*")]
    for path in paths:
        if path.is_file() and not path.is_symlink() and not _NOT_FREE.match(path.parent.name):
            yield Document(f"{path.parent.name}/{path.name}", cleaning.normalise(_read(path)))


def german_documents() -> Iterator[Document]:
    """Yield German running text from translated manual pages and the Debian handbook."""
    yield from _translated_prose("de", "de-DE")


def french_documents() -> Iterator[Document]:
    """Yield French running text from translated manual pages and the Debian handbook."""
    yield from _translated_prose("fr", "fr-FR")


def english_documents() -> Iterator[Document]:
    """Yield English running text from the Debian handbook and from documentation sources."""
    yield from drop_repeated_lines(_handbook("en-US"))
    for root in (Path("/usr/share"), Path(sysconfig.get_paths()["purelib"])):
        yield from _code(root, root.rglob("*.rst"), str)


def spanish_documents() -> Iterator[Document]:
    """Yield Spanish running text from translated manual pages and the Debian handbook."""
    yield from _translated_prose("es", "es-ES")


def polish_documents() -> Iterator[Document]:
    """Yield Polish running text from translated manual pages and the Debian handbook."""
    yield from _translated_prose("pl", "pl-PL")


def perl_documents() -> Iterator[Document]:
    """Yield Perl modules with their documentation."""
    for root in PERL_ROOTS:
        yield from _code(root, root.rglob("*.pm"), cleaning.strip_script_header)


def cpp_documents() -> Iterator[Document]:
    """Yield the headers of the C++ standard library."""
    root = INCLUDE_ROOT / "c++"
    yield from _code(root, root.rglob("*"), cleaning.strip_cpp_header)


def changelog_documents() -> Iterator[Document]:
    """Yield the newest entries of the changelogs of Debian packages."""
    for path in DOC_ROOT.glob("*/changelog.Debian*.gz"):
        if path.is_symlink() or _NOT_FREE.match(path.parent.name):
            continue
        text = cleaning.normalise(gzip.decompress(path.read_bytes()).decode(errors="replace"))
        text = cleaning.first_lines(cleaning.without_maintainers(text), _CHANGELOG_CHARS)
        yield Document(f"{path.parent.name}/{path.name}", text)


# The base never reads what the adapters are for: fine-tunes of a model are made where it is weak.
BASE_SOURCES: dict[str, Source] = {
    "python": python_documents,
    "c": c_documents,
    "manpage": manpage_documents,
    "licence": licence_documents,
    "german": german_documents,
    "french": french_documents,
    "english": english_documents,
}
ADAPTER_SOURCES: dict[str, Source] = {
    "spanish": spanish_documents,
    "polish": polish_documents,
    "perl": perl_documents,
    "cpp": cpp_documents,
    "changelog": changelog_documents,
}
SOURCES = {**BASE_SOURCES, **ADAPTER_SOURCES}


def _code(root: Path, paths: Iterable[Path], strip: Callable[[str], str]) -> Iterator[Document]:
    for path in paths:
        if path.is_symlink() or not path.is_file():
            continue
        text = cleaning.normalise(strip(_read(path)))
        if len(text) >= _MIN_CHARS and not cleaning.is_generated(text):
            yield Document(path.relative_to(root).as_posix(), text)


def _translated_prose(man_language: str, handbook_language: str) -> Iterator[Document]:
    pages = [
        Document(page.name, cleaning.prose(page.text)) for page in _manual(man_language, _PARAGRAPH_WIDTH)
    ]
    chapters = list(_handbook(handbook_language))
    for document in drop_repeated_lines(in_split_order([*pages, *chapters])):
        if len(document.text) >= _MIN_CHARS:
            yield document


def _handbook(language: str) -> Iterator[Document]:
    folder = (DOC_ROOT / "debian-handbook" / "html" / language).resolve()
    for path in folder.glob("*.html"):
        text = cleaning.prose(cleaning.normalise(cleaning.html_text(_read(path))))
        yield Document(f"debian-handbook/{language}/{path.name}", text)


def _manual(language: str, width: int) -> Iterator[Document]:
    paths = [path for path in (MAN_ROOT / language).glob("man?/*.gz") if _is_own_page(path)]
    with ThreadPoolExecutor() as pool:
        texts = pool.map(partial(_render, width=width), paths)
        for path, text in zip(paths, texts, strict=True):
            if len(text) >= _MIN_CHARS:
                yield Document(path.relative_to(MAN_ROOT).as_posix().removesuffix(".gz"), text)


def _is_own_page(path: Path) -> bool:
    return not path.is_symlink() and _NOT_FREE.match(path.name) is None


def _render(path: Path, width: int) -> str:
    source = gzip.decompress(path.read_bytes())
    if source.startswith(b".so "):
        return ""
    command = ["groff", "-mandoc", "-Kutf8", "-Tutf8", "-P-cbou", f"-rLL={width}n", "-rHY=0", "-dAD=l"]
    page = subprocess.run(command, input=source, capture_output=True, check=False).stdout
    return cleaning.normalise(page.decode(errors="replace"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
