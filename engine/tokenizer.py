"""The model's tokenizer, or the absence of one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fusionserve.engine.text_output import Decoder
from fusionserve.errors import InvalidRequestError, PreconditionError
from fusionserve.generation import ChatPrompt, Prompt, TextPrompt, TokenPrompt

_MAX_KNOWN_TEXTS = 1 << 14  # of single tokens; a few megabytes


class Tokenizer:
    """Encodes prompts and decodes tokens; without tokenizer files only token ids are served."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        # A report of log-probabilities has up to 21 tokens for each position, mostly the same ones.
        self._known_text_of = lru_cache(_MAX_KNOWN_TEXTS)(self._decode_alone)

    @property
    def is_present(self) -> bool:
        """True if text can be served."""
        return self._tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        """True if chat prompts can be rendered."""
        return self._tokenizer is not None and bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def decoder(self) -> Decoder | None:
        """What decodes generated tokens, or None if there is no tokenizer."""
        return None if self._tokenizer is None else _SkipSpecialTokens(self._tokenizer)

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a prompt. Raises PreconditionError where the model has no tokenizer or no chat template."""
        if isinstance(prompt, TokenPrompt):
            return prompt.token_ids
        tokenizer = self._require()
        if isinstance(prompt, TextPrompt):
            return tuple(tokenizer.encode(prompt.text, add_special_tokens=add_special_tokens))
        return self._encode_chat(prompt)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids. Raises PreconditionError without a tokenizer."""
        text: str = self._require().decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def text_of(self, token_id: int) -> str:
        """The text of one token on its own, special tokens included; empty without a tokenizer."""
        return "" if self._tokenizer is None else self._known_text_of(token_id)

    def _decode_alone(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def _encode_chat(self, prompt: ChatPrompt) -> tuple[int, ...]:
        if not self.has_chat_template:
            raise PreconditionError("this model has no chat template", reason="NO_CHAT_TEMPLATE")
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        tokenizer = self._require()
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template is the model's own program and raises what it likes
            raise InvalidRequestError(
                "the model's chat template refuses these messages", field="chat", reason="CHAT_REFUSED"
            ) from error
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    def _require(self) -> Any:
        if self._tokenizer is None:
            raise PreconditionError(
                "this model is served without a tokenizer: send token ids", reason="NO_TOKENIZER"
            )
        return self._tokenizer


class _SkipSpecialTokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text
