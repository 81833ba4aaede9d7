"""Raw files become plain text of their domain."""

import time

from fusionserve.training import cleaning


def test_normalise_uses_plain_characters_and_few_empty_lines() -> None:
    raw = "“A‐b”  \r\n\tindented\u00a0here \n\n\n\n\n\nend"
    assert cleaning.normalise(raw) == '"A-b"\n    indented here\n\n\nend\n'


def test_normalise_is_quick_on_long_runs_of_blanks() -> None:
    started = time.process_time()
    cleaning.normalise(("x" + " " * 20_000) * 20)
    assert time.process_time() - started < 1


def test_python_header_is_dropped() -> None:
    raw = "#!/usr/bin/env python3\n# Copyright someone\n\nimport os\n# kept\n"
    assert cleaning.strip_script_header(raw) == "import os\n# kept\n"


def test_c_licence_comments_are_dropped_and_others_kept() -> None:
    raw = "/* Copyright (C) someone */\n/* SPDX-License-Identifier: MIT */\n/* Sizes. */\nint x;\n"
    assert cleaning.strip_c_header(raw) == "/* Sizes. */\nint x;\n"


def test_cpp_is_told_from_c() -> None:
    assert cleaning.is_plain_c("struct point { int x; };\n")
    assert not cleaning.is_plain_c("namespace a { }\n")
    assert not cleaning.is_plain_c("#include <x>\nstd::string s;\n")


def test_data_is_told_from_source() -> None:
    assert cleaning.is_generated("table = {0x12, 0x34, 0x56, 0x78, 0x9a};\n" * 20)
    assert cleaning.is_generated("x" * 500)
    assert not cleaning.is_generated("def add(first, second):\n    return first + second\n")


def test_prose_keeps_sentences_only() -> None:
    sentence = "Diese Option zeigt eine kurze Hilfe an und beendet danach das Programm ohne Fehler."
    raw = f"NAME\n     {sentence}\n  -h, --help\n | a | b | c |\n"
    assert cleaning.prose(raw) == f"{sentence}\n"


def test_html_text_breaks_at_blocks_and_hides_scripts() -> None:
    html = "<html><script>var x;</script><h1>Title</h1><p>Some <b>bold</b>\n text &amp; more.</p></html>"
    assert [line for line in cleaning.html_text(html).splitlines() if line] == [
        "Title",
        "Some bold text & more.",
    ]


def test_cpp_header_loses_its_opening_comments_only() -> None:
    raw = "// licence\n// more\n\n/* Copyright */\nint x; // kept\n"
    assert cleaning.strip_cpp_header(raw) == "int x; // kept\n"


def test_changelog_names_no_maintainer() -> None:
    raw = "a (1) unstable\n\n  [ Ann Other ]\n  * Fix <a@b.org>\n\n -- Ann Other <ann@b.org>  Mon, 1 Jan\n"
    assert cleaning.without_maintainers(raw) == (
        "a (1) unstable\n\n  [ Maintainer ]\n  * Fix <maintainer@example.org>\n\n"
        " -- Maintainer <maintainer@example.org>  Mon, 1 Jan\n"
    )


def test_first_lines_are_whole() -> None:
    assert cleaning.first_lines("ab\ncd\nef\n", 7) == "ab\ncd\n"
    assert cleaning.first_lines("abcdef\n", 3) == "abcdef\n"
