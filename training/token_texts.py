"""The text of each token, and how it is shown where it must stay on its line."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what bytes that are no whole character decode to
_LINE_END, _PART = "⏎", "…"


def split_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The tokens that the server makes of a prompt, and the text that each adds.

    Of a character that takes several tokens, the last one has it and those before have nothing.
    """
    token_ids = tuple(tokenizer.encode(text, verbose=False))
    texts = []
    start, done = 0, 0  # decoded anew from `start` on: the token before decides about a leading space
    for end in range(1, len(token_ids) + 1):
        before = _decode(tokenizer, token_ids[start:done])
        after = _decode(tokenizer, token_ids[start:end])
        if after.endswith(_INCOMPLETE) and end < len(token_ids):
            texts.append("")
            continue
        texts.append(after[len(before) :])
        start, done = done, end
    return token_ids, tuple(texts)


def to_visible(text: str, space: str = "·") -> str:
    """`text` on one line: spaces as `space`, ends of lines as arrows, what cannot be printed as escapes.

    A token without a text is a part of a character that a later token completes.
    """
    return "".join(_to_visible(character, space) for character in text) or _PART


def _to_visible(character: str, space: str) -> str:
    if character == " ":
        return space
    if character == "\n":
        return _LINE_END
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence has one text"
    return text
