"""The `fusionserve` command: finds the subcommand and turns what it raises into one line and an exit code.

Exit codes: 0 it worked, 1 it failed (the server's error, or the server could not start), 2 the command line
or the configuration is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext

from fusionserve.errors import FusionServeError
from fusionserve.server.command_errors import CommandError, UsageError
from fusionserve.server.early_stop import stop_at_once
from fusionserve.server.standard_streams import drop_output, prepare_streams

COMMANDS = {
    "serve": "serve a model and its adapters over gRPC",
    "generate": "continue a prompt and print the text as it comes",
    "chat": "talk with the model",
    "adapters": "list, load, unload, reload or describe adapters",
    "fusions": "the same for fusions of adapters",
    "fusion": "show what a fusion on disk attends to (fusion inspect); needs no server",
    "loadtest": "put a server under load and report latencies, throughput and fairness",
    "token": "make a bearer token and its entry for the server's token file",
    "train": "train an adapter, or a fusion of adapters",
    "version": "print the versions of fusionserve and of what it runs on",
}
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    prepare_streams()
    arguments = sys.argv[1:] if argv is None else argv
    name = arguments[0] if arguments else "--help"
    # gRPC reads it when it is imported; else whoever speaks something other than TLS to the port fills the log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        if name in ("-h", "--help"):
            print(_help(), flush=True)
            return 0 if arguments else EXIT_USAGE
        with stop_at_once() if name == "serve" else nullcontext():
            code = _command("version" if name == "--version" else name)(arguments[1:])
            sys.stdout.flush()
            return code
    except UsageError as error:
        return _fail(f"fusionserve: {error}", EXIT_USAGE)
    except CommandError as error:
        return _fail(f"error: {error}", error.exit_code)
    except FusionServeError as error:
        return _fail(f"fusionserve: {error.message}", EXIT_FAILED)
    except ModuleNotFoundError as error:
        return _fail(_missing(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        drop_output()  # the reader has gone, as `head` does
        return EXIT_FAILED
    except OSError as error:  # a disk that is full, a folder that cannot be written
        drop_output()
        where = "" if error.filename is None else f"{error.filename}: "
        return _fail(f"fusionserve: {where}{error.strerror or error}", EXIT_FAILED)


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    # Imported by name, so that each command waits for nothing but its own imports: `version`, --help and a
    # wrong flag answer at once, and the client commands need none of the server's dependencies.
    command: Callable[[list[str]], int] = importlib.import_module(f"fusionserve.server.commands.{name}").main
    return command


def _help() -> str:
    lines = (f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return "\n".join(
        (
            "usage: fusionserve COMMAND [--help] ...",
            "",
            "One frozen base model, per-request adapters, over gRPC.",
            "",
            *lines,
            "",
            "Flags can also be set in the environment and, of a command that has --config, in a YAML file: a flag wins",
            "over the environment, the environment over the file. `fusionserve COMMAND --help` names them.",
            "Exit codes: 0 it worked, 1 it failed, 2 wrong command line or configuration, 130 interrupted.",
        )
    )


def _missing(error: ModuleNotFoundError) -> str:
    if (error.name or "").partition(".")[0] == "fusionserve":
        raise error
    # A client needs no more than YAML, and that for its configuration file only.
    package = "pyyaml" if error.name == "yaml" else "'fusionserve[server]'"
    return f"fusionserve: {error.name} is not installed; this command needs: pip install {package}"


def _fail(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
