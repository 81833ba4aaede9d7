"""The main job in a minute: one server, one frozen model, many adaptations in one batch, adapters that come and go.

Run it with `make demo`. It exits with 1 and says what is wrong if anything is not as it should be.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusionserve.client import Client, Generation, NotFoundError

PROMPT = "Linux"
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "seed": 11, "max_new_tokens": 56, "ignore_eos": True}
BLEND = {"perl": 0.5, "spanish": 0.5}
FUSION = "domains"
FUSION_PROMPTS = {
    "changelog": "  * New upstream release.\n  * Update debian/control:",
    "cpp": "  template<typename _Tp>\n    struct is_",
    "perl": "sub new {\n    my ($class, %args) = @_;\n",
    "polish": "Ta opcja pozwala na wyświetlenie",
    "spanish": "Esta opción permite",
}
SHOWN_METRICS = (
    "fusionserve_requests_total",
    "fusionserve_generated_tokens_total",
    "fusionserve_prefix_cache_hit_tokens_total",
    "fusionserve_adapter_loads_total",
    "fusionserve_adapter_pool_ranks_used",
    "fusionserve_adapters",
    "fusionserve_time_to_first_token_seconds_sum",
    "fusionserve_kv_blocks_used",
)
STOP_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Server:
    """A running server process and where it listens."""

    process: subprocess.Popen[str]
    grpc: str
    metrics: str


def main() -> int:
    """Runs the demo; returns the exit code."""
    with running_server() as server, Client(server.grpc, timeout_s=60) as client:
        names = list_adapters(client)
        alone = generate_one_by_one(client, names)
        together = generate_together(client, names)
        show_side_by_side(together)
        check(
            alone == {label: g.candidates[0].text for label, g in together.items()},
            "a text changed in company",
        )
        show_fusion_weights(client)
        swap_while_streaming(client, names[0])
        show_metrics(server.metrics)
    check(server.process.returncode == 0, f"the server exited with {server.process.returncode}")
    print(
        "\nThe server stopped cleanly. Every text was the same alone and in one batch. All as it should be."
    )
    return 0


@contextmanager
def running_server() -> Iterator[Server]:
    """Starts the server on free ports, stops it with SIGTERM and waits for it to drain."""
    headline("Starting a server with the model that ships with fusionserve")
    command = [str(Path(sys.executable).with_name("fusionserve")), "serve", "--dtype", "float32"]
    command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    try:
        yield wait_until_ready(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


def wait_until_ready(process: subprocess.Popen[str]) -> Server:
    """Reads the ready line."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    match = re.fullmatch(r"ready grpc=(\S+) metrics=(\S+)", line)
    if match is None:
        raise DemoError(f"no ready line but {line!r}")
    print(f"$ fusionserve serve\n{line}")
    return Server(process, match[1], match[2])


def list_adapters(client: Client) -> list[str]:
    """Shows the adapters found on disk; none is loaded yet."""
    headline("Adapters, listed over gRPC (they load on demand)")
    adapters = list(client.adapters.list())
    for adapter in adapters:
        print(f"  {adapter.name:10} {adapter.state}")
    check(len(adapters) >= 4, "fewer than four adapters ship")
    return [adapter.name for adapter in adapters]


def adaptations(names: list[str]) -> dict[str, dict[str, object]]:
    """The adaptations of the demo by label: base, each adapter, one blend, one fusion of all adapters."""
    blend_label = " + ".join(f"{weight:g} {name}" for name, weight in BLEND.items())
    return {
        "base": {},
        **{name: {"adapter": name} for name in names},
        blend_label: {"blend": BLEND},
        f"fusion {FUSION}": {"fusion": FUSION},
    }


def generate_one_by_one(client: Client, names: list[str]) -> dict[str, str]:
    """Every adaptation's text when nothing else runs."""
    return {
        label: client.generate(PROMPT, **SAMPLING, **adaptation).candidates[0].text
        for label, adaptation in adaptations(names).items()
    }


def generate_together(client: Client, names: list[str]) -> dict[str, Generation]:
    """The same requests, all at once: they share one batch."""
    with ThreadPoolExecutor(len(names) + 3) as pool:
        futures = {
            label: pool.submit(client.generate, PROMPT, **SAMPLING, **adaptation)
            for label, adaptation in adaptations(names).items()
        }
        return {label: future.result() for label, future in futures.items()}


def show_side_by_side(generations: dict[str, Generation]) -> None:
    """Prints each text beside its adaptation."""
    headline(f"One prompt, {len(generations)} adaptations, one batch: {PROMPT!r}")
    for label, generation in generations.items():
        candidate = generation.candidates[0]
        text = PROMPT + candidate.text
        check(len(candidate.token_ids) == SAMPLING["max_new_tokens"], f"{label} ended early")
        lines = [
            part
            for line in text.splitlines()
            for part in textwrap.wrap(line, 78, drop_whitespace=False) or [""]
        ]
        for index, line in enumerate(lines[:6]):
            print(f"  {label if index == 0 else '':24}| {line}")
    texts = {generation.candidates[0].text for generation in generations.values()}
    check(len(texts) == len(generations), "two adaptations gave the same text")


def show_fusion_weights(client: Client) -> None:
    """One trained fusion, told nothing of the domain, weighs the adapters token by token."""
    headline(f"What the fusion {FUSION!r} attends to: mean weight of each member")
    options = {**SAMPLING, "max_new_tokens": 24, "fusion": FUSION, "fusion_weights": "mean"}
    for domain, prompt in FUSION_PROMPTS.items():
        weights = client.generate(prompt, **options).fusion_weights
        assert weights is not None
        shares = "  ".join(f"{m} {w:.2f}" for m, w in zip(weights.members, weights.mean, strict=True))
        print(f"  {prompt.split(chr(10))[0].strip()[:28]:30}| {shares}")
        leader = weights.members[weights.mean.index(max(weights.mean))]
        check(leader == domain, f"the fusion leads with {leader} on a prompt of {domain}")


def swap_while_streaming(client: Client, name: str) -> None:
    """Reloads and unloads an adapter while a stream of the base runs, and shows that the stream does not care.

    The fusion goes first: as long as it is loaded its members cannot be unloaded.
    """
    headline(f"Reloading and unloading {name!r} while a stream runs")
    options = {**SAMPLING, "max_new_tokens": 200}
    expected = client.generate(PROMPT, **options).candidates[0].token_ids
    with client.stream(PROMPT, **options) as stream:
        next(stream)
        before = client.adapters.get(name)
        after = client.adapters.reload(name)
        print(f"  reloaded: version {before.version} -> {after.version}")
        check(after.version == before.version + 1, "a reload did not make a new version")
        client.fusions.unload(FUSION)
        unloaded = client.adapters.unload(name)
        print(f"  unloaded: {name} is {unloaded.state} again, and would load on demand")
        *_, last = stream
    assert isinstance(last, Generation)
    check(last.candidates[0].token_ids == expected, "the stream's tokens changed")
    print(f"  the stream went on: {len(expected)} tokens, the same as without the swap")
    refuse_unknown(client)


def refuse_unknown(client: Client) -> None:
    """An unknown adapter is an error, never silently the base model."""
    try:
        client.generate(PROMPT, adapter="no-such-adapter")
    except NotFoundError as error:
        print(f"  asked for an unknown adapter: {error}")
    else:
        raise DemoError("an unknown adapter was served")


def show_metrics(address: str) -> None:
    """Scrapes the metrics endpoint as Prometheus would and prints a few lines."""
    headline(f"A few of the metrics at http://{address}/metrics")
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    shown = [line for line in lines if line.split("{")[0].split(" ")[0] in SHOWN_METRICS]
    print(textwrap.indent("\n".join(shown), "  "))
    check(any(line.startswith("fusionserve_requests_total") for line in shown), "no requests were counted")


class DemoError(Exception):
    """Something is not as the demo says."""


def check(is_right: bool, otherwise: str) -> None:
    """Raises DemoError with `otherwise` unless `is_right`."""
    if not is_right:
        raise DemoError(otherwise)


def headline(text: str) -> None:
    """Prints the title of a section."""
    print(f"\n== {text} ==", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DemoError as error:
        sys.exit(f"demo: {error}")
