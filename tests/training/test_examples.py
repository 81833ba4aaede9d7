"""Training files become pieces of text to learn and pieces that are given; a bad line is named with its reason."""

from pathlib import Path

import pytest
from tiny_training import CHATML, write_base, write_records
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusionserve.errors import TrainingError
from fusionserve.training.examples import Example, read_examples
from fusionserve.training.pieces import Piece
from fusionserve.training.prompt_template import ALPACA, choose_template

AUTO = choose_template("auto")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(write_base(tmp_path_factory.mktemp("base")))


def read_one(tmp_path: Path, record: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> Example:
    (example,) = read_examples(write_records(tmp_path / "data.jsonl", [record]), AUTO, tokenizer)
    return example


def test_text_is_learned_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert read_one(tmp_path, {"text": "abc", "id": 7}, tokenizer) == Example((Piece("abc", True),))


def test_only_the_response_is_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    example = read_one(tmp_path, {"prompt": "Q: {input}\n", "response": "A"}, tokenizer)
    assert example.pieces == (Piece("Q: {input}\n", False), Piece("A", True))
    assert not example.is_running_text


@pytest.mark.parametrize("context", ["", "the input"])
def test_instructions_take_the_template_with_or_without_input(
    context: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    record = {"instruction": "Do {input}", "input": context, "output": "done"}
    prompt, answer = read_one(tmp_path, record, tokenizer).pieces
    assert ("### Input:\nthe input\n" in prompt.text) == bool(context)
    assert "### Instruction:\nDo {input}\n" in prompt.text
    assert prompt.text == ALPACA.render("Do {input}", context)
    assert answer == Piece("done", True)


def test_own_template_is_read_from_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    record = {"prompt_no_input": "<{instruction}>", "prompt_input": "<{instruction}|{input}>"}
    template = choose_template(str(write_records(tmp_path / "template.json", [record])))
    data = write_records(tmp_path / "data.jsonl", [{"prompt": "a", "input": "b", "response": "c"}])
    assert read_examples(data, template, tokenizer)[0].pieces[0].text == "<a|b>"


def test_documents_of_a_text_file_are_examples(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "data.txt"
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert [example.pieces[0].text for example in read_examples(path, AUTO, tokenizer)] == ["one\n", "two\n"]


def test_every_turn_of_the_assistant_is_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B")]
    tokenizer.chat_template = CHATML
    try:
        record = {"messages": [{"role": role, "content": content} for role, content in turns]}
        example = read_one(tmp_path, record, tokenizer)
    finally:
        tokenizer.chat_template = None
    learned = [piece.text for piece in example.pieces if piece.is_learned]
    assert learned == ["A<|im_end|>\n", "B<|im_end|>\n"]
    assert example.pieces[2].text == "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"
    assert example.is_chat


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    try:
        record = {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}
        with pytest.raises(TrainingError, match=r"data\.jsonl:1: the chat template writes earlier turns"):
            read_one(tmp_path, record, tokenizer)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"txt": "a"}', "no kind of record"),
        ('{"text": "a", "prompt": "b"}', "more than one kind of record"),
        ('{"text": 3}', "'text' is not a text"),
        ('{"text": "  "}', "'text' is empty"),
        ('{"text": "\\ud800"}', "'text' has half of a surrogate pair"),
        ('{"prompt": "a"}', "'response' is missing"),
        ('{"messages": []}', "'messages' is not a list of turns"),
        ('{"messages": [{"role": "user"}]}', "a message is not an object"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the model has no chat template"),
    ],
)
def test_bad_lines_are_named_with_their_reason(
    line: str, reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(TrainingError) as caught:
        read_examples(path, AUTO, tokenizer)
    assert caught.value.message.startswith(f"{path}:3: ")
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "no examples"), (b"\xff\xfe", "not UTF-8"), (None, "No such file")]
)
def test_bad_files_are_named(
    content: bytes | None, reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match=reason):
        read_examples(path, AUTO, tokenizer)
