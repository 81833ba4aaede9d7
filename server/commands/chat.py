"""`fusionserve chat`."""

from __future__ import annotations

import sys

from fusionserve.client import Client, ClientError, GenerateOptions
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import FailedCallError
from fusionserve.server.commands.connection import CONNECTION_SETTINGS, connected
from fusionserve.server.commands.generate import print_stream
from fusionserve.server.commands.generation_settings import ENV_PREFIX, GENERATION_SETTINGS, to_options
from fusionserve.server.settings import CommandParser, Setting, add_settings, config_setting, resolve

SETTINGS = (
    Setting(name="system", kind=kinds.TEXT, help="what the model is told first", env_prefix=ENV_PREFIX),
    *GENERATION_SETTINGS.values(),
    *CONNECTION_SETTINGS,
    config_setting(ENV_PREFIX),
)

Messages = list[dict[str, str]]


def main(argv: list[str]) -> int:
    """Answers each line until the end of the input, with the conversation so far in mind.

    A script that pipes its lines in learns from the exit status, 1, that one had no answer.
    """
    parser = CommandParser(
        prog="fusionserve chat", description="Talk with the model; end with Ctrl-D, start anew with /reset."
    )
    add_settings(parser, SETTINGS)
    values = resolve(SETTINGS, parser.parse_args(argv))
    options = to_options(values)
    opening = [{"role": "system", "content": values["system"]}] if values["system"] else []
    with connected(values) as client:
        if not client.model().has_chat_template:
            raise FailedCallError("the model has no chat template; use `fusionserve generate`")
        has_answered_all = _converse(client, opening, options)
    return 0 if has_answered_all or sys.stdin.isatty() else 1


def _converse(client: Client, opening: Messages, options: GenerateOptions) -> bool:
    """True if no line was left without an answer."""
    history, has_answered_all = list(opening), True
    while (line := _ask()) is not None:
        if line == "/reset":
            history = list(opening)
        elif line:
            exchanged = _exchange(client, history, {"role": "user", "content": line}, options)
            history += exchanged
            has_answered_all &= bool(exchanged)
    return has_answered_all


def _exchange(
    client: Client, history: Messages, question: dict[str, str], options: GenerateOptions
) -> Messages:
    """The question and its answer, or nothing if the server refuses: the conversation goes on without them."""
    try:
        result = print_stream(client, [*history, question], options)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return []
    return [question, {"role": "assistant", "content": result.text}]


def _ask() -> str | None:
    """The next line, or None at the end of the input."""
    while True:
        try:
            return kinds.parse_text(input("> ").strip())
        except EOFError:
            print()
            return None
        except ValueError:  # a UnicodeDecodeError is one
            print("error: the line is not UTF-8", file=sys.stderr)
