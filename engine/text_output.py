"""From token ids to text as it leaves the server: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "�"  # what a decoder writes for bytes that are not yet a character
_MAX_PENDING_TOKENS = 8  # a character has at most 4 bytes; after more tokens the bytes are simply invalid


class Decoder(Protocol):
    """Turns token ids into text, special tokens left out."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`."""


class TextOutput:
    """The text of one candidate. `push` returns what may be shown; `stop_string` is set once one has been met.

    Decoding looks back over the tokens that a decoder needs as context, so joining the pieces gives the same text as
    decoding all tokens at once.
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
        self._token_ids = list(prompt_ids[-_MAX_PENDING_TOKENS:])  # context for tokenizers that merge spaces
        self._context_start = 0
        self._read_end = len(self._token_ids)
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self.text = ""
        self.stop_string: str | None = None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Adds a token and returns the new text that is safe to show."""
        if self._decoder is None:
            return ""
        self._token_ids.append(token_id)
        return self._release(self._decode_new(), may_stop)

    def flush(self) -> str:
        """Ends the text: returns what was held back, incomplete characters as U+FFFD."""
        if self._decoder is None or self.stop_string is not None:
            return ""
        rest = self._held + self._decode_pending()
        self._held = ""
        self.text += rest
        return rest

    def _decode_new(self) -> str:
        assert self._decoder is not None
        before, after = self._decode_window(self._decoder)
        num_pending = len(self._token_ids) - self._read_end
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and num_pending < _MAX_PENDING_TOKENS):
            return ""
        self._context_start = self._read_end
        self._read_end = len(self._token_ids)
        return after[len(before) :]

    def _decode_pending(self) -> str:
        assert self._decoder is not None
        before, after = self._decode_window(self._decoder)
        self._read_end = len(self._token_ids)
        return after[len(before) :]

    def _decode_window(self, decoder: Decoder) -> tuple[str, str]:
        context = self._token_ids[self._context_start : self._read_end]
        return decoder.decode(context), decoder.decode(self._token_ids[self._context_start :])

    def _release(self, new: str, may_stop: bool) -> str:
        candidate = self._held + new
        if may_stop:
            met = _first_stop(candidate, self._stop)
            if met is not None:
                position, self.stop_string = met
                self._held = ""
                return self._show(
                    candidate[: position + (len(self.stop_string) if self._include_stop else 0)]
                )
        num_held = _longest_overlap(candidate, self._stop) if may_stop else 0
        self._held = candidate[len(candidate) - num_held :]
        return self._show(candidate[: len(candidate) - num_held])

    def _show(self, text: str) -> str:
        self.text += text
        return text


def _first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """The stop string that begins first in `text` (the longest of those), with its position."""
    met = [(position, -len(string), string) for string in stop if (position := text.find(string)) >= 0]
    if not met:
        return None
    position, _, string = min(met)
    return position, string


def _longest_overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning of a stop string."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
