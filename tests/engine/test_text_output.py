"""Text as it leaves the server: whole characters, nothing of a stop string, and in the end all of it."""

from collections.abc import Sequence
from functools import cache
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaTokenizer

from fusionserve.config import EMBEDDED_MODEL
from fusionserve.engine.text_output import Decoder, TextOutput
from fusionserve.engine.tokenizer import Tokenizer

pytestmark = pytest.mark.no_kernels

VOCAB_SIZE = 4096
REPLACEMENT = "�"
SCRIPTS = "😀👩‍👩‍👧‍👦 日本語の文章 한국어 ñandú é é ﷺ 𝔘𝔫𝔦 \u0627\u0644 ZWJ\u200d.\n\t"


@cache
def shipped_decoder() -> Decoder:
    """The decoder of the model in the repository."""
    decoder = Tokenizer(AutoTokenizer.from_pretrained(EMBEDDED_MODEL)).decoder
    assert decoder is not None
    return decoder


@cache
def byte_tokens() -> dict[int, int]:
    """The token of each byte that has one of its own."""
    raw = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    letters = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in letters]
    written = {byte: chr(byte) for byte in letters}
    written |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    return {byte: raw.convert_tokens_to_ids(letter) for byte, letter in written.items()}


def tokens_of(text: str | bytes) -> list[int]:
    """One token per byte, the split that cuts characters most."""
    data = text.encode() if isinstance(text, str) else text
    return [byte_tokens()[byte] for byte in data]


FALLBACK_WORDS = ["▁", "▁a", "b"]


@cache
def fallback_decoder() -> Decoder:
    """Of a tokenizer that writes characters it does not know as byte tokens: byte n is token n."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), *FALLBACK_WORDS, "<unk>", "<s>", "</s>"]
    vocabulary = {name: token_id for token_id, name in enumerate(names)}
    decoder = Tokenizer(LlamaTokenizer(vocab=vocabulary, merges=[])).decoder
    assert decoder is not None
    return decoder


WORDS = {" ": 256, "a": 257, "b": 258}  # tokens of their own; "a" comes with a space before it


def fallback_tokens(text: str) -> list[int]:
    """Tokens of words, and of the bytes of all other characters."""
    return [
        token_id for letter in text for token_id in ([WORDS[letter]] if letter in WORDS else letter.encode())
    ]


class PieceDecoder:
    """Token i is `pieces[i]`, bytes that may begin or end inside a character."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces
        self.max_window = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.max_window = max(self.max_window, len(token_ids))
        return b"".join(self.pieces[token_id] for token_id in token_ids).decode(errors="replace")


class SpaceDecoder:
    """Joins words by spaces, as sentencepiece does: the first word of what it is given has none before it."""

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(f"w{token_id}" for token_id in token_ids)


def push_all(output: TextOutput, token_ids: Sequence[int]) -> list[str]:
    """The pieces of all tokens and of the end."""
    return [*(output.push(token_id) for token_id in token_ids), output.flush()]


def test_byte_tokens_are_what_they_seem() -> None:
    assert shipped_decoder().decode(tokens_of(SCRIPTS)) == SCRIPTS


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_pieces_join_to_the_decoded_whole(token_ids: list[int]) -> None:
    output = TextOutput(shipped_decoder(), ())
    pieces = push_all(output, token_ids)
    assert "".join(pieces) == output.text == shipped_decoder().decode(token_ids)


INVALID = [
    b"\xff",
    b"\xf0\x9f",
    b"\x98\x80",
    b"\xe2",
    b"\x82\xac",
    b"\xac\xe2\x82",
    b"\xc3",
    b"\xa9",
    b"a",
    b"",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(range(len(INVALID))), max_size=60))
@example([0] * 7 + [1, 2, 8])
@example([3] + [5] * 50)
@example([5] * 200 + [8])
@example([1] + [9] * 20 + [2, 8])
def test_pieces_join_to_the_decoded_whole_of_broken_bytes(token_ids: list[int]) -> None:
    decoder = PieceDecoder(INVALID)
    output = TextOutput(decoder, ())
    pieces = push_all(output, token_ids)
    assert "".join(pieces) == decoder.decode(token_ids)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30).filter(lambda text: REPLACEMENT not in text), st.data())
def test_no_piece_ends_inside_a_character_however_tokens_are_split(text: str, data: st.DataObject) -> None:
    encoded = text.encode()
    cuts = data.draw(st.lists(st.integers(0, len(encoded)), max_size=30).map(sorted))
    bounds = [0, *cuts, len(encoded)]
    pieces = [encoded[begin:end] for begin, end in pairwise(bounds)]
    output = TextOutput(PieceDecoder(pieces), ())
    told = ""
    for token_id, end in enumerate(bounds[1:]):
        told += output.push(token_id)
        assert told == encoded[:end].decode(errors="ignore"), "all whole characters, and nothing else"
    assert told + output.flush() == text


TEXTS = st.text(
    st.sampled_from("b \n€é日本😀") | st.characters(codec="utf-8", exclude_characters=REPLACEMENT + "a"),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("😀😀")
@example("€€b")
@example("日本語の文章" * 30)
@example("\n" * 100 + "é" * 100)
def test_byte_fallback_tells_each_character_once_as_it_becomes_whole(text: str) -> None:
    output = TextOutput(fallback_decoder(), fallback_tokens("b"))
    for end, letter in enumerate(text):
        *halves, last = fallback_tokens(letter)
        assert [output.push(token_id) for token_id in halves] == [""] * len(halves)
        assert output.push(last) == letter
        assert output.text == text[: end + 1]
    assert output.flush() == ""


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.data())
def test_prompt_that_ends_anywhere_in_a_byte_run_is_context_and_not_told(
    text: str, data: st.DataObject
) -> None:
    tokens = fallback_tokens("b" + text)
    length = data.draw(st.integers(1, len(tokens)))
    whole = next(n for n in range(length, 0, -1) if REPLACEMENT not in fallback_decoder().decode(tokens[:n]))
    output = TextOutput(fallback_decoder(), tokens[:length])
    pieces = push_all(output, tokens[length:])
    if length < len(tokens):
        told = fallback_decoder().decode(tokens[:whole])
        assert "".join(pieces) == output.text == ("b" + text).removeprefix(told)


def fallback_text(token_ids: Sequence[int]) -> str:
    """The decoded whole, but of a run of bytes with a wrong one, the characters before that stay."""
    text = ""
    for is_byte, group in groupby(token_ids, key=lambda token_id: token_id < 256):
        run = list(group)
        if not is_byte:
            text += "".join({256: " ", 257: " a", 258: "b"}[token_id] for token_id in run)
            continue
        valid = next(n for n in range(len(run), -1, -1) if is_valid(bytes(run[:n])))
        text += bytes(run[:valid]).decode() + REPLACEMENT * (len(run) - valid)
    return text


def is_valid(data: bytes) -> bool:
    return REPLACEMENT not in data.decode(errors="replace")


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*"é€😀".encode(), 0xFF, ord("\n"), *WORDS.values()]), max_size=50))
@example([*"日".encode(), 0xFF, 258])
@example([0xFF, *"日".encode(), 258])
@example([*"日".encode(), 0xFF, *"日".encode(), 258, *"日".encode()])
def test_byte_fallback_keeps_what_it_told_before_a_wrong_byte(token_ids: list[int]) -> None:
    output = TextOutput(fallback_decoder(), fallback_tokens("b"))
    pieces = push_all(output, token_ids)
    assert "".join(pieces) == output.text == fallback_text(token_ids)


@pytest.mark.parametrize("run", [[0xFF], [*"é".encode()], [*"日".encode(), 0xFF], [0xFF, *"日".encode()]])
def test_text_behind_a_long_byte_run_is_right(run: list[int]) -> None:
    output = TextOutput(fallback_decoder(), fallback_tokens("b"))
    for token_id in run * 100:
        output.push(token_id)
    before = output.text
    told = [output.push(token_id) for token_id in fallback_tokens("b 日b")]
    assert "".join(told).lstrip(REPLACEMENT) == output.text[len(before) :].lstrip(REPLACEMENT) == "b 日b"


def test_stop_string_is_met_in_a_byte_run_and_not_where_a_run_is_taken_back() -> None:
    output = TextOutput(fallback_decoder(), fallback_tokens("b"), ["本語", REPLACEMENT])
    for token_id in fallback_tokens("日本語"):
        output.push(token_id)
    assert (output.text, output.stop_string) == ("日", "本語")


@pytest.mark.parametrize("character", ["é", "€", "日", "😀"])
def test_character_comes_with_its_last_byte(character: str) -> None:
    output = TextOutput(shipped_decoder(), ())
    *halves, last = tokens_of(character)
    assert [output.push(token_id) for token_id in halves] == [""] * len(halves)
    assert output.push(last) == character


def test_combining_marks_and_joined_emoji_come_code_point_by_code_point() -> None:
    output = TextOutput(shipped_decoder(), ())
    text = "é👩‍👧"
    pieces = [piece for piece in push_all(output, tokens_of(text)) if piece]
    assert pieces == list(text)


def test_text_around_an_unfinished_character_is_not_held() -> None:
    pieces = [b"abc\xf0\x9f", b"\x98\x80def\xe2"]
    output = TextOutput(PieceDecoder(pieces), ())
    assert output.push(0) == "abc"
    assert output.push(1) == "😀def"
    assert output.flush() == REPLACEMENT


def test_tokens_that_always_end_inside_a_character_are_told_as_they_come() -> None:
    output = TextOutput(PieceDecoder([b"\xe2", b"\x82\xac\xe2"]), ())
    assert output.push(0) == ""
    assert [output.push(1) for _ in range(100)] == ["€"] * 100


def test_invalid_bytes_do_not_hold_text_for_ever() -> None:
    output = TextOutput(shipped_decoder(), ())
    for token_id in tokens_of(b"\xff" * 20):
        output.push(token_id)
    assert output.text == REPLACEMENT * 17, "only what might be a beginning waits"
    assert output.push(tokens_of("a")[0]) == REPLACEMENT * 3 + "a"


@pytest.mark.parametrize("piece", [b"\xff", b"\xac\xe2\x82", b"word "])
def test_cost_of_a_token_does_not_grow_with_the_text(piece: bytes) -> None:
    decoder = PieceDecoder([piece])
    push_all(TextOutput(decoder, ()), [0] * 1000)
    assert decoder.max_window <= 64


@pytest.mark.parametrize("text", ["the end�", "plain", "日本"])
def test_prompt_is_context_and_not_told(text: str) -> None:
    output = TextOutput(shipped_decoder(), tokens_of(text))
    assert "".join(push_all(output, tokens_of("é né"))) == "é né"


def test_character_that_the_prompt_began_is_told_whole() -> None:
    *begun, last = tokens_of("😀")
    output = TextOutput(shipped_decoder(), [*tokens_of("ab"), *begun])
    assert "".join(push_all(output, [last, *tokens_of("c")])) == "😀c"


def test_spaces_between_words_survive_the_moving_window() -> None:
    output = TextOutput(SpaceDecoder(), [1, 2])
    assert "".join(push_all(output, range(3, 60))) == "".join(f" w{n}" for n in range(3, 60))


def test_output_without_a_decoder_is_empty() -> None:
    output = TextOutput(None, [1, 2], ["a"])
    assert push_all(output, [1, 2]) == ["", "", ""]
    assert (output.text, output.stop_string) == ("", None)


def test_flush_before_any_token_and_twice_says_nothing() -> None:
    output = TextOutput(shipped_decoder(), tokens_of("ab\xff"))
    assert output.flush() == ""
    output.push(tokens_of("é")[0])
    assert (output.flush(), output.flush()) == (REPLACEMENT, "")
    assert output.text == REPLACEMENT


def stopped(
    pieces: Sequence[str], stop: Sequence[str], minimum: int = 0, **options: bool
) -> tuple[list[str], str, str | None]:
    """The pieces told, the whole text and the stop string met, if each string came as one token."""
    output = TextOutput(PieceDecoder([piece.encode() for piece in pieces]), (), stop, **options)
    told = []
    for token_id in range(len(pieces)):
        told.append(output.push(token_id, may_stop=token_id + 1 >= minimum))
        if output.stop_string is not None:
            break
    told.append(output.flush())
    assert "".join(told) == output.text
    return told, output.text, output.stop_string


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "met"),
    [
        (["ab", "END", "cd"], ["END"], "ab", "END"),
        (["ab E", "N", "D cd"], ["END"], "ab ", "END"),
        (["abENDcd"], ["END"], "ab", "END"),
        (["EN", "EN", "D"], ["END"], "EN", "END"),
        (["aaa", "ab"], ["aab"], "aa", "aab"),
        (["x", "\n", "\n", "y"], ["\n\n"], "x", "\n\n"),
        (["日", "本", "語"], ["本語"], "日", "本語"),
        (["one two"], ["two", "one"], "", "one"),
        (["abcd"], ["bc", "abcd"], "a", "bc"),
        (["ab", "c", "d"], ["bc", "abcd"], "a", "bc"),
        (["abc"], ["c", "bc"], "a", "bc"),
        (["abc"], ["bc", "c"], "a", "bc"),
        (["EN", "d"], ["END"], "ENd", None),
        (["abEN"], ["END"], "abEN", None),
        (["ab"], [], "ab", None),
    ],
)
def test_text_ends_before_the_first_stop_string(
    pieces: list[str], stop: list[str], text: str, met: str | None
) -> None:
    assert stopped(pieces, stop)[1:] == (text, met)


def test_include_stop_keeps_the_string_and_nothing_after_it() -> None:
    assert stopped(["ab E", "ND cd"], ["END"], include_stop=True)[1:] == ("ab END", "END")


def test_character_begun_behind_a_stop_string_is_never_told() -> None:
    output = TextOutput(PieceDecoder([b"abEND\xe2"]), (), ["END"])
    assert (output.push(0), output.flush(), output.text) == ("ab", "", "ab")


def test_only_what_may_be_a_stop_string_is_held() -> None:
    told, _, _ = stopped(["ab", "E", "N", "x", "E"], ["END"])
    assert told == ["ab", "", "", "ENx", "", "E"]


def test_stop_string_before_the_minimum_is_plain_text() -> None:
    output = TextOutput(PieceDecoder([b"END", b"x", b"EN", b"D"]), (), ["END"])
    assert [output.push(n, may_stop=False) for n in (0, 1)] == ["END", "x"]
    assert (output.push(2), output.stop_string) == ("", None)
    assert (output.push(3), output.stop_string) == ("", "END")
    assert output.text == "ENDx"


@pytest.mark.parametrize("stop", [["ab"], ["ab", "abx"], ["ab", "b?"]])
def test_string_that_was_complete_before_the_minimum_is_not_met_behind_it(stop: list[str]) -> None:
    output = TextOutput(PieceDecoder([b"ab", b"z"]), (), stop)
    told = [output.push(0, may_stop=False), output.push(1), output.flush()]
    assert ("".join(told), output.stop_string) == ("abz", None)


def first_stop_by_character(text: str, stop: Sequence[str], start: int = 0) -> tuple[str, str | None]:
    """The definition: read on until the text ends with a stop string, behind `start`; of several the longest."""
    for end in range(start + 1, len(text) + 1):
        met = [string for string in stop if text[:end].endswith(string)]
        if met:
            longest = max(met, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab😀", min_size=1, max_size=4), max_size=12),
    st.lists(st.text("ab😀", min_size=1, max_size=4), max_size=3),
    st.integers(0, 6),
)
def test_stop_strings_are_met_whatever_the_tokens(pieces: list[str], stop: list[str], minimum: int) -> None:
    told, text, met = stopped(pieces, stop, minimum=minimum)
    start = len("".join(pieces[: max(0, minimum - 1)]))
    assert (text, met) == first_stop_by_character("".join(pieces), stop, start)
    for end in range(len(told)):
        assert text.startswith("".join(told[:end]))
