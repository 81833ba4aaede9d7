"""The tokenizer's face: text and chats in, text out, and clear errors where the model has none."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fusionserve.config import EMBEDDED_MODEL
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.errors import InvalidRequestError, PreconditionError
from fusionserve.generation import ChatPrompt, TextPrompt, TokenPrompt

pytestmark = pytest.mark.no_kernels

RAW = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
SHIPPED = Tokenizer(RAW)
NONE = Tokenizer(None)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_shipped_tokenizer_loses_no_text(text: str) -> None:
    token_ids = SHIPPED.encode(TextPrompt(text), add_special_tokens=False)
    assert SHIPPED.decode(token_ids, skip_special_tokens=False) == text


def test_token_prompt_is_taken_as_it_is() -> None:
    assert SHIPPED.encode(TokenPrompt((5, 4, 3))) == (5, 4, 3)
    assert NONE.encode(TokenPrompt((5, 4, 3))) == (5, 4, 3)


def test_special_tokens_are_skipped_or_not() -> None:
    (eos,) = RAW.all_special_ids
    token_ids = (*SHIPPED.encode(TextPrompt("a")), eos)
    assert SHIPPED.decode(token_ids, skip_special_tokens=True) == "a"
    assert SHIPPED.decode(token_ids, skip_special_tokens=False) == "a" + RAW.eos_token
    assert SHIPPED.decoder is not None and SHIPPED.decoder.decode(token_ids) == "a"
    assert SHIPPED.text_of(eos) == RAW.eos_token


def test_text_of_a_token_is_decoded_once() -> None:
    class Counting:
        num_calls = 0

        def decode(self, token_ids: list[int], **options: bool) -> str:
            self.num_calls += 1
            return f"<{token_ids}>"

    counting = Counting()
    tokenizer = Tokenizer(counting)
    assert [tokenizer.text_of(token_id) for token_id in (5, 7, 5, 7, 5)] == [
        "<[5]>",
        "<[7]>",
        "<[5]>",
        "<[7]>",
        "<[5]>",
    ]
    assert counting.num_calls == 2


def test_text_needs_a_tokenizer() -> None:
    assert not NONE.is_present and NONE.decoder is None and NONE.text_of(1) == ""
    for use in (
        lambda: NONE.encode(TextPrompt("a")),
        lambda: NONE.encode(ChatPrompt((("user", "a"),))),
        lambda: NONE.decode([1], skip_special_tokens=True),
    ):
        with pytest.raises(PreconditionError):
            use()


def test_chat_needs_a_template() -> None:
    assert not SHIPPED.has_chat_template
    with pytest.raises(PreconditionError) as caught:
        SHIPPED.encode(ChatPrompt((("user", "a"),)))
    assert caught.value.reason == "NO_CHAT_TEMPLATE"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_template() -> Tokenizer:
    raw = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    raw.chat_template = TEMPLATE
    return Tokenizer(raw)


def test_chat_is_rendered_by_the_template_up_to_the_answer() -> None:
    tokenizer = with_template()
    assert tokenizer.has_chat_template
    token_ids = tokenizer.encode(ChatPrompt((("system", "be brief"), ("user", "hi"))))
    assert SHIPPED.decode(token_ids, skip_special_tokens=False) == "[system]be brief[user]hi[assistant]"


def test_chat_that_the_template_refuses_is_the_clients_mistake() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        with_template().encode(ChatPrompt((("bad", "a"),)))
    assert caught.value.reason == "CHAT_REFUSED"
    assert "alternate" not in caught.value.message


class TidyingTokenizer:
    """Takes the space before punctuation away unless told not to, as some checkpoints say it should."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool = True,
    ) -> str:
        return "a." if clean_up_tokenization_spaces else "a ."


def test_decoded_text_is_not_tidied_up() -> None:
    tokenizer = Tokenizer(TidyingTokenizer())
    assert tokenizer.decode([1], skip_special_tokens=True) == "a ."
    assert tokenizer.decoder is not None and tokenizer.decoder.decode([1]) == "a ."
