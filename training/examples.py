"""Reading training files: each example as pieces of text, those to learn from and those that are given.

A .txt file holds documents that end with a line <|endoftext|>. Any other file is JSON Lines; a record has
    text                            all of it is learned
    prompt, response (, input)      the response is learned
    instruction, output (, input)   the output is learned; the default template is Alpaca's
    messages [{role, content}]      the assistant's turns are learned, through the model's chat template
and maybe other keys, which are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fusionserve.errors import TrainingError
from fusionserve.training.chat_turns import ChatError, split_turns
from fusionserve.training.documents import read_texts
from fusionserve.training.pieces import Piece
from fusionserve.training.prompt_template import PromptTemplate, TemplateChoice

_KINDS = (("text",), ("prompt", "response"), ("instruction", "output"), ("messages",))


@dataclass(frozen=True, slots=True)
class Example:
    """One text to learn from; `is_chat` says that the chat template wrote its begin and end."""

    pieces: tuple[Piece, ...]
    is_chat: bool = False

    @property
    def is_running_text(self) -> bool:
        """True if it may be cut into parts, since all of it is learned."""
        return all(piece.is_learned for piece in self.pieces)


def read_examples(path: Path, templates: TemplateChoice, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """All examples of a file. Raises TrainingError that names the file, the line and the reason."""
    try:
        if path.suffix == ".txt":
            examples = [Example((Piece(text, True),)) for text in read_texts(path)]
        else:
            examples = list(_read_records(path, templates, tokenizer))
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TrainingError(f"{path}: not UTF-8 text") from None
    if not examples:
        raise TrainingError(f"{path}: no examples in it")
    return examples


def _read_records(
    path: Path, templates: TemplateChoice, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _to_example(_parse(line), templates, tokenizer)
            except (_RecordError, ChatError) as error:
                raise TrainingError(f"{path}:{number}: {error}") from None


class _RecordError(Exception):
    """Why a record is refused."""


def _parse(line: str) -> Mapping[str, object]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _RecordError(f"not JSON: {error}") from None
    except RecursionError:
        raise _RecordError("not JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise _RecordError("not a JSON object")
    return record


def _to_example(
    record: Mapping[str, object], templates: TemplateChoice, tokenizer: PreTrainedTokenizerBase
) -> Example:
    match _kind_of(record):
        case "text":
            return Example((Piece(_text(record, "text"), True),))
        case "prompt":
            return _answered(record, "prompt", "response", templates.of_prompts)
        case "instruction":
            return _answered(record, "instruction", "output", templates.of_instructions)
    return Example(split_turns(record["messages"], tokenizer), is_chat=True)


def _kind_of(record: Mapping[str, object]) -> str:
    """The first key of the one kind of record that it is."""
    found = [kind for kind in _KINDS if kind[0] in record]
    if len(found) != 1:
        wanted = "; ".join(", ".join(kind) for kind in _KINDS)
        raise _RecordError(f"{'no' if not found else 'more than one'} kind of record ({wanted})")
    return found[0][0]


def _answered(record: Mapping[str, object], asks: str, answers: str, template: PromptTemplate) -> Example:
    context = _text(record, "input", may_be_empty=True) if record.get("input") is not None else ""
    prompt = template.render(_text(record, asks), context)
    return Example((Piece(prompt, False), Piece(_text(record, answers), True)))


def _text(record: Mapping[str, object], key: str, *, may_be_empty: bool = False) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        raise _RecordError(f"{key!r} is {'missing' if key not in record else 'not a text'}")
    if not text.strip() and not may_be_empty:
        raise _RecordError(f"{key!r} is empty")
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise _RecordError(f"{key!r} has half of a surrogate pair")
    return text
