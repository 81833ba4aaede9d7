"""The regular expressions of rank_pattern and alpha_pattern, matched in bounded time.

PEFT matches a key K against a module path with `(.*\\.)?(K)$`; the first key that matches wins. Keys come
from a file of a stranger, and Python's `re` can take hours on a few hostile characters, so this matcher follows
all ways at once, as a set of positions in the path, and counts its steps. It knows the subset that people write
in these keys: characters, `.`, classes, escapes, groups, `|`, `* + ? {m,n}`, `^`, `$`; there it agrees with `re`.
Look-around, back-references, flags and possessive repeats are refused.

A set of positions is an integer: bit i stands for the place before character i.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

MAX_PATTERN_LENGTH = 256
MAX_NESTING = 16
MAX_REPEAT = 64
# Steps to resolve all keys against all paths of one adapter, a second or so. 882 literal keys (one per module, as EVA
# writes them for a model of 405 B parameters) against 882 paths take 0.4 million.
MAX_STEPS = 1_500_000

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_.-]*")
_PLAIN_RUN = re.compile(r"[A-Za-z0-9_-]+")
_CLASSES = {"d": re.compile("[0-9]"), "w": re.compile("[A-Za-z0-9_]"), "s": re.compile(r"[ \t\n\r\f\v]")}
_REPEATS: Mapping[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class PatternError(ValueError):
    """The expression is wrong, outside the subset or too costly; the message is safe to show."""


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """One key of rank_pattern or alpha_pattern; make it with `compile_module_pattern`."""

    source: str
    _last_part: str = field(repr=False)  # behind the last dot, which is a wildcard
    _node: _Node | None = field(repr=False)  # None: only characters and dots, compared directly

    def matches(self, attempt: Attempt) -> bool:
        """True exactly if `re.match(rf"(.*\\.)?({source})$", path)`. Raises PatternError out of steps."""
        attempt.steps.take(1)
        if self._node is None:
            return self._matches_plain(attempt.path)
        return bool(self._node(attempt, attempt.starts) & attempt.end)

    def _matches_plain(self, path: str) -> bool:
        if not path.endswith(self._last_part):  # most keys of a long list end here
            return False
        start = len(path) - len(self.source)
        if start < 0 or (start > 0 and path[start - 1] != "."):
            return False
        tail = path[start:]
        return tail == self.source or all(
            ours in (".", theirs) for ours, theirs in zip(self.source, tail, strict=True)
        )


class StepCount:
    """The work left for one adapter's keys."""

    def __init__(self, limit: int = MAX_STEPS) -> None:
        self._left = limit

    def take(self, count: int) -> None:
        """Counts steps. Raises PatternError when none is left."""
        self._left -= count
        if self._left < 0:
            raise PatternError("its keys take too long to match")


class Attempt:
    """One path, prepared for matching."""

    def __init__(self, path: str, steps: StepCount) -> None:
        self.path = path
        self.steps = steps
        self.end = 1 << len(path)
        self.places: dict[str, int] = {}  # of each character
        for index, character in enumerate(path):
            self.places[character] = self.places.get(character, 0) | 1 << index
        self.starts = 1 | self.places.get(".", 0) << 1


def compile_module_pattern(source: str) -> ModulePattern:
    """Parses one key. Raises PatternError."""
    if len(source) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a key is longer than {MAX_PATTERN_LENGTH} characters")
    if _PLAIN_KEY.fullmatch(source):
        return ModulePattern(source, source.rpartition(".")[2], None)
    return ModulePattern(source, "", _Parser(source).parse())


def first_matches(patterns: Iterable[ModulePattern], paths: Iterable[str]) -> dict[str, int]:
    """For each path that a pattern matches, the index of the first that does.

    Raises PatternError when that takes more than MAX_STEPS.
    """
    patterns = tuple(patterns)
    found: dict[str, int] = {}
    steps = StepCount()
    for path in paths if patterns else ():
        attempt = Attempt(path, steps)
        index = next((i for i, pattern in enumerate(patterns) if pattern.matches(attempt)), None)
        if index is not None:
            found[path] = index
    return found


# (attempt, starts) -> every position where a match that begins at one of `starts` can end
_Node = Callable[[Attempt, int], int]
_Accepts = Callable[[str], bool]


class _Parser:
    """Recursive descent: alternatives of sequences of repeated atoms."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._nesting = 0

    def parse(self) -> _Node:
        node = self._alternatives()
        if self._at < len(self._source):
            raise PatternError("a key has a ')' without a '('")
        return node

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise PatternError("a key ends too early")
        self._at += 1
        return character

    def _alternatives(self) -> _Node:
        branches = [self._sequence()]
        while self._peek() == "|":
            self._take()
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else _any_of(branches)

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            nodes.append(self._repeated(self._atom()))
        return nodes[0] if len(nodes) == 1 else _sequence_of(nodes)

    def _atom(self) -> _Node:
        run = _PLAIN_RUN.match(self._source, self._at)
        if run is not None:
            return self._literal(run.group())
        character = self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == "\\":
            return _one_of(self._escape())
        if character == ".":
            return _one_of(lambda found: found != "\n")
        if character in "^$":
            return self._anchor(character)
        if character in "*+?{":
            raise PatternError("a key has a repeat with nothing to repeat")
        return _text(character)

    def _anchor(self, character: str) -> _Node:
        if self._peek() and self._peek() in "*+?{":
            raise PatternError("a key repeats an anchor")
        if character == "^":
            return lambda attempt, starts: starts & 1
        return lambda attempt, starts: starts & attempt.end

    def _literal(self, run: str) -> _Node:
        """A run of plain characters is one node, but a repeat behind it repeats only its last character."""
        after = self._source[self._at + len(run) : self._at + len(run) + 1]
        if len(run) > 1 and after and after in "*+?{":
            run = run[:-1]
        self._at += len(run)
        return _text(run)

    def _group(self) -> _Node:
        if self._peek() == "?":
            self._take()
            if self._take() != ":":
                raise PatternError("a key uses look-around, flags or named groups")
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            raise PatternError("a key is nested too deeply")
        node = self._alternatives()
        self._nesting -= 1
        if self._peek() != ")":
            raise PatternError("a key has a '(' without a ')'")
        self._take()
        return node

    def _escape(self) -> _Accepts:
        character = self._take()
        members = _CLASSES.get(character.lower())
        if members is not None:
            wanted = character.islower()
            return lambda found: (members.match(found) is not None) is wanted
        if character.isalnum() or not character.isascii():
            raise PatternError(f"a key uses the escape {character!a}")
        return lambda found: found == character

    def _class(self) -> _Node:
        negated = self._peek() == "^"
        if negated:
            self._take()
        members = [self._class_member()]  # a ']' in first place is a member
        while self._peek() != "]":
            members.append(self._class_member())
        self._take()
        return _one_of(
            lambda found: any(member(found) for member in members) is not negated, num_members=len(members)
        )

    def _class_member(self) -> _Accepts:
        first = self._take()
        escaped = self._escape() if first == "\\" else None
        following = self._source[self._at : self._at + 2]
        if len(following) < 2 or following[0] != "-" or following[1] == "]":
            return escaped or (lambda found: found == first)
        if escaped:
            raise PatternError("a key has a class with a range that begins with an escape")
        self._take()
        last = self._take()
        if last == "\\" or last < first:
            raise PatternError("a key has a class with a wrong range")
        return lambda found: first <= found <= last

    def _repeated(self, node: _Node) -> _Node:
        if self._peek() == "{":
            least, most = self._braces()
        elif self._peek() in _REPEATS:
            least, most = _REPEATS[self._take()]
        else:
            return node
        if self._peek() == "?":  # lazy: finds the same matches in another order
            self._take()
        if self._peek() and self._peek() in "*+?{":
            raise PatternError("a key repeats a repeat")
        return _repeat(node, least, most)

    def _braces(self) -> tuple[int, int | None]:
        inside, closed, _ = self._source[self._at + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        digits = low + high
        if not closed or not digits.isascii() or not digits.isdigit() or len(digits) > 4:
            raise PatternError("a key has a '{' that is no repeat")
        self._at += len(inside) + 2
        least = int(low or 0)
        most = least if not comma else int(high) if high else None
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            raise PatternError("a key has a repeat out of range")
        return least, most


def _text(text: str) -> _Node:
    def ends(attempt: Attempt, starts: int) -> int:
        attempt.steps.take(1)
        if text not in attempt.path:  # else the text is no longer than the path, and so is the work of a step
            return 0
        for character in text:
            starts = (starts & attempt.places.get(character, 0)) << 1
        return starts

    return ends


def _one_of(accepts: _Accepts, num_members: int = 1) -> _Node:
    def ends(attempt: Attempt, starts: int) -> int:
        attempt.steps.take(len(attempt.places) * num_members)
        reached = 0
        for character, places in attempt.places.items():
            if starts & places and accepts(character):
                reached |= (starts & places) << 1
        return reached

    return ends


def _any_of(branches: list[_Node]) -> _Node:
    def ends(attempt: Attempt, starts: int) -> int:
        reached = 0
        for branch in branches:
            reached |= branch(attempt, starts)
        return reached

    return ends


def _sequence_of(nodes: list[_Node]) -> _Node:
    def ends(attempt: Attempt, starts: int) -> int:
        attempt.steps.take(1)
        for node in nodes:
            starts = node(attempt, starts) if starts else 0
        return starts

    return ends


def _repeat(node: _Node, least: int, most: int | None) -> _Node:
    def ends(attempt: Attempt, starts: int) -> int:
        attempt.steps.take(1)
        for _ in range(least):
            starts = node(attempt, starts) if starts else 0
        reached, count = starts, least
        while starts and (most is None or count < most):
            starts = node(attempt, starts) & ~reached
            reached, count = reached | starts, count + 1
        return reached

    return ends
