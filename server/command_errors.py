"""How a command says that it did not work: one line for the user and an exit code for the shell."""

from __future__ import annotations


class CommandError(Exception):
    """Ends a command with `exit_code`; the text is shown as it is, on one line."""

    exit_code = 1


class UsageError(CommandError):
    """A flag, environment variable, configuration key or argument is wrong; nothing was tried."""

    exit_code = 2


class FailedCallError(CommandError):
    """The server answered with an error, or did not answer."""
