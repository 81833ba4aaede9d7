"""The terminal of a command belongs to the command."""

from __future__ import annotations

import warnings

from transformers.utils import logging as transformers_logging


def keep_libraries_quiet() -> None:
    """No progress bars and no remarks of transformers and PEFT for the rest of the process."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
