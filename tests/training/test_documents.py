"""Documents are split by name alone, deduplicated in order, and read back as written."""

from pathlib import Path

from fusionserve.training.corpus import SplitSizes, split
from fusionserve.training.documents import (
    Document,
    drop_repeated,
    drop_repeated_lines,
    excerpt,
    is_held_out,
    position,
    read_texts,
    take,
    write_documents,
)


def make_documents(count: int) -> list[Document]:
    return [
        Document(f"folder/{i}.txt", "".join(f"line {j} of document number {i}\n" for j in range(20)))
        for i in range(count)
    ]


def test_position_is_the_same_on_every_machine() -> None:
    assert position("man1/ls.1") == 0.3042723062458248
    assert [is_held_out("man1/ls.1", share) for share in (0.0, 0.30, 0.31)] == [False, False, True]


def test_split_of_a_document_ignores_the_other_documents() -> None:
    few, many = make_documents(50), make_documents(300)
    sizes = SplitSizes(held_out_share=0.2)
    held_out_of_few = {document.name for document in split(few, sizes)[1]}
    held_out_of_many = {document.name for document in split(many, sizes)[1]}
    assert held_out_of_few == held_out_of_many & {document.name for document in few}


def test_split_sides_are_disjoint_and_near_the_share() -> None:
    documents = make_documents(400)
    train, held_out = split(documents, SplitSizes(held_out_share=0.1))
    assert not {document.name for document in train} & {document.name for document in held_out}
    assert len(train) + len(held_out) == 400
    assert 20 <= len(held_out) <= 60


def test_near_copies_are_dropped() -> None:
    first, second = make_documents(2)
    copy = Document("copy.txt", first.text + "and one more line of its own\n")
    assert list(drop_repeated([first, copy, second])) == [first, second]


def test_repeated_lines_are_dropped() -> None:
    documents = [Document("a", "one\ntwo\n"), Document("b", "two\nthree\n")]
    assert [document.text for document in drop_repeated_lines(documents)] == ["one\ntwo\n", "three\n"]


def test_excerpt_is_whole_lines_within_the_limit() -> None:
    document = make_documents(1)[0]
    cut = excerpt(document, 200)
    assert 0 < len(cut.text) <= 200
    assert set(cut.text.splitlines()) <= set(document.text.splitlines())
    assert excerpt(document, 10_000) == document


def test_take_stops_before_the_limit() -> None:
    documents = make_documents(5)
    assert list(take(documents, 2 * len(documents[0].text))) == documents[:2]


def test_written_texts_are_read_back(tmp_path: Path) -> None:
    documents = make_documents(3)
    size = write_documents(documents, tmp_path / "deep" / "domain.txt")
    assert size == (tmp_path / "deep" / "domain.txt").stat().st_size
    assert read_texts(tmp_path / "deep" / "domain.txt") == [document.text for document in documents]
