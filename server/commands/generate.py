"""`fusionserve generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

from fusionserve.client import (
    Candidate,
    Client,
    FusionWeights,
    GenerateOptions,
    Generation,
    GenerationChunk,
    TokenLogprobs,
)
from fusionserve.limits import MAX_CANDIDATES, MAX_LOGPROBS
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import UsageError
from fusionserve.server.commands.connection import CONNECTION_SETTINGS, connected
from fusionserve.server.commands.generation_settings import ENV_PREFIX, GENERATION_SETTINGS, to_options
from fusionserve.server.settings import CommandParser, Setting, add_settings, config_setting, resolve

SETTINGS = (
    Setting(
        name="prompt",
        kind=kinds.TEXT,
        help="text to continue",
        default_text="standard input",
        env_prefix=ENV_PREFIX,
    ),
    *GENERATION_SETTINGS.values(),
    Setting(
        name="num-candidates",
        kind=kinds.integer(1, MAX_CANDIDATES),
        help="continuations; several are printed when all have ended",
        default=1,
        env_prefix=ENV_PREFIX,
    ),
    Setting(
        name="logprobs",
        kind=kinds.integer(0, MAX_LOGPROBS),
        help="print the log-probability of each token, and of the N likeliest, to standard error",
        env_prefix=ENV_PREFIX,
    ),
    Setting(
        name="json", kind=kinds.SWITCH, help="print the result as JSON", is_flag=True, env_prefix=ENV_PREFIX
    ),
    Setting(
        name="stats",
        kind=kinds.SWITCH,
        help="print token counts and times to standard error",
        is_flag=True,
        env_prefix=ENV_PREFIX,
    ),
    *CONNECTION_SETTINGS,
    config_setting(ENV_PREFIX),
)


def main(argv: list[str]) -> int:
    """Prints the continuation of a prompt, as it is generated unless it is wanted as JSON."""
    parser = CommandParser(prog="fusionserve generate", description="Continue a prompt.")
    add_settings(parser, SETTINGS)
    values = resolve(SETTINGS, parser.parse_args(argv))
    options = to_options(values)
    options["num_candidates"], options["logprobs"] = values["num-candidates"], values["logprobs"]
    prompt = _read_prompt() if values["prompt"] is None else values["prompt"]
    with connected(values) as client:
        if values["json"]:
            result = client.generate(prompt, **options)
            print(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
        elif values["num-candidates"] > 1:
            result = client.generate(prompt, **options)
            print(describe_candidates(result.candidates))
        else:
            result = print_stream(client, prompt, options)
    if values["stats"]:
        print(describe(result), file=sys.stderr)
    if values["logprobs"] is not None and not values["json"]:
        print(describe_logprobs(result.candidates), file=sys.stderr)
    if result.fusion_weights is not None and not values["json"]:
        print(describe_weights(result.fusion_weights), file=sys.stderr)
    return 0


def print_stream(client: Client, prompt: str | list[dict[str, str]], options: GenerateOptions) -> Generation:
    """Prints the text of a generation as it comes and returns the whole."""
    with client.stream(prompt, **options) as events:
        for event in events:
            if isinstance(event, GenerationChunk):
                print(event.text, end="", flush=True)
            elif isinstance(event, Generation):
                print(flush=True)
                return event
    raise AssertionError("a stream ended without its result")


def describe(result: Generation) -> str:
    """One line about what a generation took."""
    usage, timings = result.usage, result.timings
    who = "+".join(member.name for member in result.adaptation.members) or "base"
    rate = usage.generated_tokens / timings.total_s if timings.total_s else 0.0
    return (
        f"{who}: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), "
        f"{usage.generated_tokens} generated in {timings.total_s:.2f} s ({rate:.1f}/s), "
        f"first after {timings.time_to_first_token_s:.3f} s, ended by {result.finish_reason}"
    )


def describe_candidates(candidates: Sequence[Candidate]) -> str:
    """Their texts below headings."""
    return "\n\n".join(
        f"candidate {each.index}, ended by {each.finish_reason}:\n{each.text}" for each in candidates
    )


def describe_logprobs(candidates: Sequence[Candidate]) -> str:
    """A line for each token, below headings if there are several candidates."""
    lines = []
    for candidate in candidates:
        if len(candidates) > 1:
            lines.append(f"candidate {candidate.index}:")
        lines += [_describe_token(token) for token in candidate.logprobs]
    return "\n".join(lines)


def _describe_token(token: TokenLogprobs) -> str:
    likeliest = ", ".join(f"{_quoted(other.text)} {other.logprob:.3f}" for other in token.top)
    line = f"{token.logprob:8.3f}  rank {token.rank}  {_quoted(token.text)}"
    return f"{line}  likeliest: {likeliest}" if likeliest else line


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def describe_weights(weights: FusionWeights) -> str:
    """How a fusion weighed its members: the means in one line, then a line for each token or attention told of."""
    rows = [("mean", weights.mean)]
    rows += [(f"token {row.position}", row.weights) for row in weights.tokens]
    rows += [(row.module, row.weights) for row in weights.modules]
    return "\n".join(f"{label}: {_to_shares(weights.members, row)}" for label, row in rows)


def _to_shares(members: Sequence[str], row: Sequence[float]) -> str:
    return ", ".join(f"{member} {weight:.2f}" for member, weight in zip(members, row, strict=True))


def _read_prompt() -> str:
    if sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT or pipe one to standard input")
    try:
        return kinds.parse_text(sys.stdin.read())
    except ValueError:  # a UnicodeDecodeError is one
        raise UsageError("standard input is not UTF-8") from None
