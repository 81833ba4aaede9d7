"""How an instruction, with or without an input, becomes the prompt that a response follows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from fusionserve.errors import TrainingError

_PLACE = re.compile(r"\{(instruction|input)\}")
_KEYS = {"prompt_no_input": ("instruction",), "prompt_input": ("instruction", "input")}


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Two texts with the places {instruction} and, in the second, {input}."""

    without_input: str
    with_input: str

    def render(self, instruction: str, context: str) -> str:
        """The prompt; `context` is the record's input, empty if it has none. Places inside either stay as they are."""
        values = {"instruction": instruction, "input": context}
        text = self.with_input if context else self.without_input
        return _PLACE.sub(lambda place: values[place[1]], text)


PLAIN = PromptTemplate("{instruction}", "{instruction}\n\n{input}\n\n")
ALPACA = PromptTemplate(
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """The template of each kind of record."""

    of_prompts: PromptTemplate  # records with prompt and response
    of_instructions: PromptTemplate  # records with instruction and output


def choose_template(name: str) -> TemplateChoice:
    """The templates that `name` stands for: auto, plain, alpaca, or a JSON file with both texts.

    Raises TrainingError if there is no such file or it is not a template.
    """
    match name:
        case "auto":
            return TemplateChoice(PLAIN, ALPACA)
        case "plain":
            return TemplateChoice(PLAIN, PLAIN)
        case "alpaca":
            return TemplateChoice(ALPACA, ALPACA)
    template = _read_template(Path(name))
    return TemplateChoice(template, template)


def _read_template(path: Path) -> PromptTemplate:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"template {path}: {error.strerror}") from None
    except ValueError:
        raise TrainingError(f"template {path}: not JSON") from None
    for key, places in _KEYS.items():
        text = fields.get(key) if isinstance(fields, dict) else None
        if not isinstance(text, str) or set(_PLACE.findall(text)) != set(places):
            wanted = " and ".join(f"{{{place}}}" for place in places)
            raise TrainingError(f"template {path}: {key} is not a text with {wanted}")
    return PromptTemplate(fields["prompt_no_input"], fields["prompt_input"])
