"""Turn raw files of one domain into plain text that reads like that domain."""

import re
from html.parser import HTMLParser

_PLAIN = str.maketrans(
    {"‐": "-", "‑": "-", "−": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " ", "\u00ad": None}
)
_CPP = re.compile(r"^\s*(namespace|template|class|using)\b|\bstd::", re.MULTILINE)
_C_COMMENT = re.compile(r"\A\s*/\*.*?\*/\s*", re.DOTALL)
_LICENCE_WORDS = re.compile(r"copyright|licen[sc]e|\(c\)|warranty", re.IGNORECASE)
_BLOCK_TAGS = {"p", "div", "li", "td", "h1", "h2", "h3", "h4", "pre", "dt", "dd", "br"}


def normalise(text: str) -> str:
    """Replace typographic dashes, quotes and blanks by plain ones and squeeze runs of empty lines."""
    plain = text.translate(_PLAIN).replace("\r\n", "\n").replace("\t", "    ")
    trimmed = "\n".join(map(str.rstrip, plain.split("\n")))
    return re.sub(r"\n{4,}", "\n\n\n", trimmed).strip("\n") + "\n"


def strip_script_header(text: str) -> str:
    """Drop the comment lines a Python or Perl file opens with: interpreter, encoding and licence."""
    return _strip_opening_lines(text, "#")


def strip_cpp_header(text: str) -> str:
    """Drop the comments a C++ file opens with."""
    return strip_c_header(_strip_opening_lines(text, "//"))


def without_maintainers(changelog: str) -> str:
    """Replace the people a Debian changelog names in its trailers and headings, and every address."""
    changelog = re.sub(r"^ -- .*?<[^>]*>", " -- Maintainer <maintainer@example.org>", changelog, flags=re.M)
    changelog = re.sub(r"^  \[ .* \]$", "  [ Maintainer ]", changelog, flags=re.M)
    return re.sub(r"<[^<>\s]+@[^<>\s]+>", "<maintainer@example.org>", changelog)


def first_lines(text: str, max_chars: int) -> str:
    """The whole lines at the beginning of a text that fit `max_chars`; at least one."""
    if len(text) <= max_chars:
        return text
    return text[: text.rfind("\n", 0, max_chars) + 1] or text


def strip_c_header(text: str) -> str:
    """Drop the licence comments a C file opens with; other opening comments stay."""
    while (comment := _C_COMMENT.match(text)) and _LICENCE_WORDS.search(comment.group()):
        text = text[comment.end() :]
    return text


def is_plain_c(text: str) -> bool:
    """Tell whether a header is C rather than C++."""
    return _CPP.search(text) is None


def is_generated(text: str) -> bool:
    """Tell whether a source file looks like data: very long lines or mostly digits and symbols."""
    lines = text.splitlines() or [""]
    letters = sum(map(str.isalpha, text))
    return max(map(len, lines)) > 400 or letters < 0.4 * len(re.sub(r"\s", "", text))


def prose(text: str, min_chars: int = 80) -> str:
    """Keep the lines that are whole sentences of running text, without their indentation."""
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if _is_sentence(line, min_chars))


def html_text(html: str) -> str:
    """Give the visible text of a page, one line for each block."""
    parser = _BlockText()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def _strip_opening_lines(text: str, mark: str) -> str:
    lines = text.splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith(mark)), 0)
    return "".join(lines[first:])


def _is_sentence(line: str, min_chars: int) -> bool:
    letters = sum(character.isalpha() or character == " " for character in line)
    return len(line) >= min_chars and line[-1] in ".!?:;" and letters > 0.85 * len(line)


class _BlockText(HTMLParser):
    """Collects text, joining lines inside a block and breaking at block tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")
        if tag in _BLOCK_TAGS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data))
