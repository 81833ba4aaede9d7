"""From token ids to text as it leaves the server: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "�"  # what a decoder writes for bytes that are not a character, or not yet
_MAX_OPEN = 3  # bytes of an unfinished character, and so the most replacements it may be decoded to
_NUM_CONTEXT = 8  # tokens that are enough to decode the next one right
_MAX_WINDOW = 64  # tokens decoded again with each new one, even where no character ends


class Decoder(Protocol):
    """Turns token ids into text, special tokens left out."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`."""


class TextOutput:
    """The text of one candidate. `push` returns what may be shown; `stop_string` is set once one has been met.

    Each token is decoded together with those before it, and an end that may yet become a character is kept back, so
    joining the pieces gives the same text as decoding all tokens at once. There is one exception: a decoder that falls
    back to byte tokens makes U+FFFD of a whole run of them if any is wrong, and here the characters before it stay.
    """

    def __init__(
        self,
        decoder: Decoder | None,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        self._decoder = decoder
        self._window = list(prompt_ids[-_NUM_CONTEXT - 2 * _MAX_OPEN :])  # tokens to decode the next one with
        self._told: str | None = None  # the text of the window that is settled; None until the first token
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Adds a token and returns the new text that is safe to show."""
        if self._decoder is None:
            return ""
        if self._told is None:
            self._window, self._told = _end_of_prompt(self._decoder, self._window)
        self._window.append(token_id)
        return self._release(self._settle(self._decoder), may_stop)

    def flush(self) -> str:
        """Ends the text: returns what was held back, incomplete characters as U+FFFD."""
        if self._decoder is None or self.stop_string is not None:
            return ""
        rest = self._held
        self._held = ""
        if self._told is not None:
            text = self._decoder.decode(self._window)
            rest += text[len(self._told) :]
            self._told = text
        return self._show(rest)

    def _settle(self, decoder: Decoder) -> str:
        """The new characters that no further token can change."""
        assert self._told is not None
        text = decoder.decode(self._window)
        if not text.startswith(self._told):
            text = self._realign(decoder, text)
        num_told = len(self._told)
        self._told = text[: max(num_told, len(text) - _num_open(text))]
        new = self._told[num_told:]
        if len(self._window) >= 2 * _NUM_CONTEXT:
            self._shorten_window(decoder, text)
        return new

    def _realign(self, decoder: Decoder, text: str) -> str:
        """Makes what was told a beginning of the text again, and returns that."""
        assert self._told is not None
        if self._told.endswith(_REPLACEMENT):  # a character that the prompt began has become whole
            self._told = self._told[: _num_common(self._told, text)]
            return text
        # The newest token begins a character in a run of byte tokens, and the decoder takes the run back until it is
        # whole again. What comes from here on does not depend on the characters before.
        self._window, self._told = self._window[-1:], ""
        return decoder.decode(self._window)

    def _shorten_window(self, decoder: Decoder, text: str) -> None:
        """Forgets the oldest tokens, if the rest decodes to the same end, or if there are too many."""
        assert self._told is not None
        window = self._window[-_NUM_CONTEXT:]
        rest = decoder.decode(window)
        from_first_whole_character = rest.lstrip(_REPLACEMENT)
        is_same_end = from_first_whole_character != "" and text.endswith(from_first_whole_character)
        if is_same_end or len(self._window) >= _MAX_WINDOW:
            num_untold = len(text) - len(self._told)
            self._window = window
            self._told = rest[: max(0, len(rest) - num_untold)]

    def _release(self, new: str, may_stop: bool) -> str:
        candidate = self._held + new
        if may_stop:
            met = _first_stop(candidate, self._stop, len(self._held))
            if met is not None:
                position, self.stop_string = met
                return self._show(
                    candidate[: position + (len(self.stop_string) if self._include_stop else 0)]
                )
        num_held = _longest_overlap(candidate, self._stop)  # it may be complete when it may stop
        self._held = candidate[len(candidate) - num_held :]
        return self._show(candidate[: len(candidate) - num_held])

    def _show(self, text: str) -> str:
        self.text += text
        return text


def _end_of_prompt(decoder: Decoder, prompt_ids: list[int]) -> tuple[list[int], str]:
    """The last tokens of a prompt, and their text, to decode the next token with.

    They begin with a whole character, and end with one or with the beginning of one, if they can be cut so.
    """
    for num_open in range(_MAX_OPEN + 1):
        end = max(0, len(prompt_ids) - num_open)
        for num_whole in range(_NUM_CONTEXT, _NUM_CONTEXT + _MAX_OPEN + 1):
            whole = prompt_ids[max(0, end - num_whole) : end]
            text = decoder.decode(whole)
            if text == text.strip(_REPLACEMENT):
                return _with_open(decoder, whole, text, prompt_ids[end:])
    window = prompt_ids[-_NUM_CONTEXT:]
    return window, decoder.decode(window)


def _with_open(decoder: Decoder, whole: list[int], text: str, beginning: list[int]) -> tuple[list[int], str]:
    """Tokens of `text` with those that begin a character, or these alone if `text` does not last with them."""
    told = decoder.decode([*whole, *beginning])
    if told.startswith(text):
        return [*whole, *beginning], told
    return beginning, decoder.decode(beginning)


def _num_open(text: str) -> int:
    """Characters at the end of `text` that may be the beginning of one that is not complete."""
    return min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_OPEN)


def _num_common(a: str, b: str) -> int:
    """Length of the longest beginning that `a` and `b` share."""
    differing = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _first_stop(text: str, stop: Sequence[str], num_known: int) -> tuple[int, str] | None:
    """Where a stop string begins that ends behind the first `num_known` characters, and which.

    It is the one complete first, of those that end together the longest: the one met when the text comes character by
    character, so it does not depend on the tokens.
    """
    begins = ((text.find(string, max(0, num_known + 1 - len(string))), string) for string in stop)
    met = [(begin + len(string), begin, string) for begin, string in begins if begin >= 0]
    if not met:
        return None
    _, begin, string = min(met)
    return begin, string


def _longest_overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
