"""Where a part says what it finds, and what goes wrong in one of its cases, which the others survive."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from fusionserve.loadtest.gpu.figures import Failure, Figure, to_line

_MAX_ERROR_LENGTH = 160


class Findings:
    """Of one part, written to `answers` at once."""

    def __init__(self, part: str, answers: TextIO) -> None:
        self._part, self._answers = part, answers

    def tell(self, figure: Figure) -> None:
        """To whom it may concern."""
        self._answers.write(to_line(figure) + "\n")
        self._answers.flush()

    @contextmanager
    def guarded(self, case: str = "") -> Iterator[None]:
        """What the block raises is told as a Failure, with its traceback on standard error, and goes no further."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.tell(Failure(part=self._part, case=case, error=_in_a_line(error)))


def _in_a_line(error: Exception) -> str:
    text = textwrap.shorten(f"{type(error).__name__}: {error}", _MAX_ERROR_LENGTH, placeholder=" ...")
    return text.replace("|", "/")  # which would end a table's cell
