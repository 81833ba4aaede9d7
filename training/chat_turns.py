"""A conversation as the chat template writes it, cut where the assistant begins and ends."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from fusionserve.training.pieces import Piece


class ChatError(Exception):
    """Why a conversation cannot be learned from."""


def split_turns(messages: object, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
    """The rendered conversation; learned is what the model would have to write after each generation prompt.

    Raises ChatError for a malformed conversation, no chat template, or one that rewrites earlier turns.
    """
    turns = _check(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ChatError("the model has no chat template, so it cannot learn from messages")
    whole = _render(tokenizer, turns, begin_answer=False)
    pieces, done = [], 0
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        begin = _end_of(_render(tokenizer, turns[:i], begin_answer=True), whole)
        end = _end_of(_render(tokenizer, turns[: i + 1], begin_answer=False), whole)
        if not done <= begin < end:
            raise ChatError("the chat template gives an assistant's turn no place of its own")
        pieces += [Piece(whole[done:begin], False), Piece(whole[begin:end], True)]
        done = end
    return tuple(piece for piece in pieces if piece.text)


def _check(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ChatError("'messages' is not a list of turns")
    for turn in messages:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            raise ChatError("a message is not an object with the texts 'role' and 'content'")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise ChatError("no turn of the assistant to learn from")
    return messages


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], *, begin_answer: bool) -> str:
    if not turns:  # templates refuse an empty conversation; an assistant that opens has no prompt
        return ""
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin_answer)
    except Exception as error:  # the template is the model's own program and raises what it likes
        raise ChatError(f"the chat template refuses the messages: {error}") from error
    assert isinstance(text, str)
    return text


def _end_of(part: str, whole: str) -> int:
    """Where `part`, with which `whole` should begin, ends in it."""
    if not whole.startswith(part):
        raise ChatError("the chat template writes earlier turns in another way once later ones follow")
    return len(part)
