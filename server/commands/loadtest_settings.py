"""Every setting of `fusionserve loadtest`, in the groups that its help shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusionserve.limits import MAX_BLEND_MEMBERS, MAX_STREAM_INTERVAL, MAX_TEMPERATURE, is_name
from fusionserve.loadtest_config import KINDS, LoadConfig, ServiceLevels, parse_lengths
from fusionserve.server import setting_kinds as kinds
from fusionserve.server.command_errors import UsageError
from fusionserve.server.commands.connection import TLS_SETTINGS, TOKEN
from fusionserve.server.setting_kinds import Kind, integer
from fusionserve.server.settings import Setting, Values, config_setting

ENV_PREFIX = "FUSIONSERVE_LOADTEST_"
DEFAULT_DURATION_S = 30.0
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in dataclasses.fields(LoadConfig)}


class LoadSetting(Setting):
    """A setting whose variable the page of help names once for all."""

    def describe(self) -> str:
        """The help text with the default."""
        return self.explain()


def parse_rate(text: str) -> float:
    """Requests per second, above 0."""
    rate = kinds.parse_number(text)
    if not 0 < rate <= 1e6:
        raise ValueError(f"{text!r} is not above 0")
    return rate


def number(low: float, high: float, name: str = "X") -> Kind:
    """Numbers from `low` to `high`."""

    def parse(text: str) -> float:
        value = kinds.parse_number(text)
        if not low <= value <= high:
            raise ValueError(f"{text!r} is not from {low:g} to {high:g}")
        return value

    return Kind(name, parse, "{:g}".format)


def parse_top_p(text: str) -> float:
    """A probability above 0."""
    top_p = kinds.parse_number(text)
    if not 0 < top_p <= 1:
        raise ValueError(f"{text!r} is not above 0 and up to 1")
    return top_p


def parse_mix(text: str) -> dict[str, float]:
    """KIND=WEIGHT pairs, separated by commas, of which one is above 0."""
    weights = kinds.parse_weights(text)
    for kind, weight in weights.items():
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not one of {', '.join(KINDS)}")
        if weight < 0:
            raise ValueError(f"{kind}: {weight:g} is below 0")
    if not any(weights.values()):
        raise ValueError("all weights are 0")
    return weights


def parse_names(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not is_name(name):
            raise ValueError(f"{name!r} is not a name")
    if len(set(names)) < len(names):
        raise ValueError("a name is given twice")
    return names


def parse_report_folder(text: str) -> Path:
    """A folder that need not exist."""
    path = kinds.parse_path(text)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{text!r} is not a folder")
    return path


def parse_prompt_file(text: str) -> Path:
    """A file that exists."""
    path = kinds.parse_path(text)
    if not path.is_file():
        raise ValueError(f"there is no file {text!r}")
    return path


NAMES = Kind("NAME,...", parse_names)
LENGTHS = Kind("LENGTHS", parse_lengths)


def _setting(name: str, kind: Kind, text: str, default: Any = None, default_text: str = "") -> Setting:
    return LoadSetting(
        name=name, kind=kind, help=text, default=default, default_text=default_text, env_prefix=ENV_PREFIX
    )


GROUPS: Mapping[str, tuple[Setting, ...]] = {
    "arrivals": (
        _setting("rate", Kind("X", parse_rate), "open loop: requests/s on average, by a Poisson process"),
        _setting(
            "concurrency",
            integer(1, 65536),
            "closed loop: streams at once",
            None,
            f"{DEFAULTS['concurrency']} without --rate",
        ),
        _setting(
            "max-in-flight",
            integer(1, 65536),
            "open loop: requests at once; more are not sent",
            DEFAULTS["max_in_flight"],
        ),
        _setting("requests", integer(1), "requests to count"),
        _setting("duration", kinds.SECONDS, "time to count", None, "30s without --requests"),
        _setting("warm-up", integer(0), "requests to send before the counted ones", 0),
        _setting("seed", integer(0), "the same seed sends the same requests", 0),
    ),
    "requests": (
        _setting(
            "mix",
            Kind("KIND=W,...", parse_mix),
            "weights of base, lora, blend, fusion",
            None,
            "equal, of what there is",
        ),
        _setting("adapters", NAMES, "adapters, most popular first", None, "all that the server lists"),
        _setting("fusions", NAMES, "fusions, most popular first", None, "all that the server lists"),
        _setting(
            "zipf",
            number(0, 20, "S"),
            "the k-th is drawn with weight 1/k^S; 0 is uniform",
            DEFAULTS["zipf"],
        ),
        _setting("blend-size", integer(1, MAX_BLEND_MEMBERS), "adapters in a blend", DEFAULTS["blend_size"]),
        _setting(
            "prompt-tokens", LENGTHS, "random token ids in a prompt", None, str(DEFAULTS["prompt_lengths"])
        ),
        _setting("output-tokens", LENGTHS, "tokens to generate", DEFAULTS["output_lengths"]),
        _setting(
            "prompt-file", Kind("FILE", parse_prompt_file), "its lines are the prompts, drawn at random"
        ),
        _setting(
            "temperature",
            number(0, MAX_TEMPERATURE),
            "of the tokens that are drawn; 0 is greedy",
            DEFAULTS["temperature"],
        ),
        _setting(
            "top-p",
            Kind("X", parse_top_p, "{:g}".format),
            "draw from the tokens that sum to this probability",
            DEFAULTS["top_p"],
        ),
        _setting(
            "stream-interval",
            integer(1, MAX_STREAM_INTERVAL),
            "tokens in a message, at least",
            DEFAULTS["stream_interval"],
        ),
    ),
    "service levels, for goodput": (
        _setting("slo-ttft", kinds.SECONDS, "time to first token, at most"),
        _setting("slo-itl", kinds.SECONDS, "longest gap between two tokens of a request, at most"),
        _setting("slo-tpot", kinds.SECONDS, "mean gap between the tokens of a request, at most"),
        _setting("slo-e2e", kinds.SECONDS, "time to the end of a request, at most"),
    ),
    "server and output": (
        Setting(name="server", kind=kinds.TARGET, help="server to test", default="127.0.0.1:50051"),
        Setting(name="token", kind=TOKEN, help="bearer token; better in the environment"),
        *TLS_SETTINGS,
        _setting("timeout", kinds.SECONDS, "time for each request", None, "as long as it takes"),
        _setting(
            "out", Kind("DIR", parse_report_folder), "folder for report.json, requests.jsonl and the plots"
        ),
        LoadSetting(
            name="strict",
            kind=kinds.SWITCH,
            help="exit with 1 if one failed, was not sent or missed a level",
            default=False,
            is_flag=True,
            env_prefix=ENV_PREFIX,
        ),
        config_setting(ENV_PREFIX),
    ),
}
SETTINGS = tuple(setting for group in GROUPS.values() for setting in group)


def to_load_config(values: Values) -> LoadConfig:
    """The load test. Raises UsageError for settings that exclude each other."""
    duration_s = values["duration"]
    if duration_s is None and values["requests"] is None:
        duration_s = DEFAULT_DURATION_S
    for one, other in (("rate", "concurrency"), ("prompt-file", "prompt-tokens")):
        if values[one] is not None and values[other] is not None:
            raise UsageError(f"--{one} and --{other} exclude each other")
    return LoadConfig(
        target=values["server"],
        timeout_s=values["timeout"],
        rate=values["rate"],
        concurrency=values["concurrency"] or DEFAULTS["concurrency"],
        max_in_flight=values["max-in-flight"],
        num_requests=values["requests"],
        duration_s=duration_s,
        warm_up=values["warm-up"],
        seed=values["seed"],
        mix=values["mix"] or {},
        adapters=values["adapters"] or (),
        fusions=values["fusions"] or (),
        zipf=values["zipf"],
        blend_size=values["blend-size"],
        prompt_lengths=values["prompt-tokens"] or DEFAULTS["prompt_lengths"],
        output_lengths=values["output-tokens"],
        prompt_file=values["prompt-file"],
        temperature=values["temperature"],
        top_p=values["top-p"],
        stream_interval=values["stream-interval"],
        service_levels=ServiceLevels(
            ttft_s=values["slo-ttft"],
            itl_s=values["slo-itl"],
            tpot_s=values["slo-tpot"],
            e2e_s=values["slo-e2e"],
        ),
    )
