"""The regular expressions of rank_pattern and alpha_pattern, matched in bounded time.

PEFT matches a key K against a module path with `(.*\\.)?(K)$`; the first key that matches wins. Keys come
from a file of a stranger, and Python's `re` can take hours on a few hostile characters, so this matcher
tracks the set of reachable positions instead of trying one way after another, and counts its steps. It knows
the subset that people write in these keys: characters, `.`, classes, escapes, groups, `|`, `* + ? {m,n}`,
`^`, `$`; there it agrees with `re`. Look-around, back-references, flags and possessive repeats are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

MAX_PATTERN_LENGTH = 256
MAX_NESTING = 16
MAX_REPEAT = 64
# Steps to resolve all keys against all paths of one adapter, about a second. 560 literal keys (one per
# module, as EVA writes them for a model of 70 B parameters) against 560 paths take 0.3 million.
MAX_STEPS = 2_000_000

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
    _node: _Node | None = field(repr=False)  # None: only characters and dots, compared directly

    def matches(self, path: str, steps: StepCount) -> bool:
        """True exactly if `re.match(rf"(.*\\.)?({source})$", path)`. Raises PatternError out of steps."""
        steps.take()
        if self._node is None:
            return self._matches_plain(path)
        attempt = _Attempt(path, steps)
        starts = [0, *(index + 1 for index, character in enumerate(path) if character == ".")]
        return any(len(path) in self._node(attempt, start) for start in starts)

    def _matches_plain(self, path: str) -> bool:
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

    def take(self) -> None:
        """Counts one step. Raises PatternError when none is left."""
        self._left -= 1
        if self._left < 0:
            raise PatternError("its keys take too long to match")


def compile_module_pattern(source: str) -> ModulePattern:
    """Parses one key. Raises PatternError."""
    if len(source) > MAX_PATTERN_LENGTH:
        raise PatternError(f"a key is longer than {MAX_PATTERN_LENGTH} characters")
    if _PLAIN_KEY.fullmatch(source):
        return ModulePattern(source, None)
    return ModulePattern(source, _Parser(source).parse())


def first_matches(patterns: Iterable[ModulePattern], paths: Iterable[str]) -> dict[str, int]:
    """For each path that a pattern matches, the index of the first that does.

    Raises PatternError when that takes more than MAX_STEPS.
    """
    steps = StepCount()
    patterns = tuple(patterns)
    found: dict[str, int] = {}
    for path in paths:
        index = next((i for i, pattern in enumerate(patterns) if pattern.matches(path, steps)), None)
        if index is not None:
            found[path] = index
    return found


@dataclass(slots=True)
class _Attempt:
    """One path being matched; remembering what each node found at each position bounds nested repeats."""

    path: str
    steps: StepCount
    memory: dict[tuple[int, int], frozenset[int]] = field(default_factory=dict)


# (attempt, start) -> every position where a match of this node that begins at `start` can end
_Node = Callable[[_Attempt, int], frozenset[int]]
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
            return _one_of(self._class())
        if character == "\\":
            return _one_of(self._escape())
        if character == ".":
            return _one_of(lambda found: found != "\n")
        if character == "^":
            return _at(lambda path: 0)
        if character == "$":
            return _at(len)
        if character in "*+?{":
            raise PatternError("a key has a repeat with nothing to repeat")
        return _text(character)

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

    def _class(self) -> _Accepts:
        negated = self._peek() == "^"
        if negated:
            self._take()
        members = [self._class_member()]  # a ']' in first place is a member
        while self._peek() != "]":
            members.append(self._class_member())
        self._take()
        return lambda found: any(member(found) for member in members) is not negated

    def _class_member(self) -> _Accepts:
        first = self._take()
        if first == "\\":
            return self._escape()
        following = self._source[self._at : self._at + 2]
        if len(following) < 2 or following[0] != "-" or following[1] == "]":
            return lambda found: found == first
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
    def ends(attempt: _Attempt, start: int) -> frozenset[int]:
        attempt.steps.take()
        return frozenset((start + len(text),)) if attempt.path.startswith(text, start) else frozenset()

    return ends


def _one_of(accepts: _Accepts) -> _Node:
    def ends(attempt: _Attempt, start: int) -> frozenset[int]:
        attempt.steps.take()
        found = attempt.path[start : start + 1]
        return frozenset((start + 1,)) if found and accepts(found) else frozenset()

    return ends


def _at(place: Callable[[str], int]) -> _Node:
    return lambda attempt, start: frozenset((start,)) if start == place(attempt.path) else frozenset()


def _any_of(branches: list[_Node]) -> _Node:
    def ends(attempt: _Attempt, start: int) -> frozenset[int]:
        return frozenset().union(*(branch(attempt, start) for branch in branches))

    return _remembered(ends)


def _sequence_of(nodes: list[_Node]) -> _Node:
    def ends(attempt: _Attempt, start: int) -> frozenset[int]:
        positions = frozenset((start,))
        for node in nodes:
            positions = _advance(node, attempt, positions)
        return positions

    return _remembered(ends)


def _repeat(node: _Node, least: int, most: int | None) -> _Node:
    def ends(attempt: _Attempt, start: int) -> frozenset[int]:
        positions = frozenset((start,))
        for _ in range(least):
            positions = _advance(node, attempt, positions)
        reached, count = positions, least
        while positions and (most is None or count < most):
            positions = _advance(node, attempt, positions) - reached
            reached, count = reached | positions, count + 1
        return reached

    return _remembered(ends)


def _advance(node: _Node, attempt: _Attempt, positions: frozenset[int]) -> frozenset[int]:
    return frozenset().union(*(node(attempt, position) for position in positions))


def _remembered(ends: _Node) -> _Node:
    def remembered(attempt: _Attempt, start: int) -> frozenset[int]:
        attempt.steps.take()
        key = (id(ends), start)
        if key not in attempt.memory:
            attempt.memory[key] = ends(attempt, start)
        return attempt.memory[key]

    return remembered
