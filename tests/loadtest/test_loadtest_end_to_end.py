"""`fusionserve loadtest` as a process against `fusionserve serve` with the embedded model."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from fusionserve.client import Client
from fusionserve.loadtest.serving import serving

LOADTEST = (str(Path(sys.executable).with_name("fusionserve")), "loadtest")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving({"--max-batch-requests": 4, "--max-queued-requests": 2}) as (target, _):
        yield target


def loadtest(server: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = (*LOADTEST, "--server", server, *argv)
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_kind_is_served_and_reported(server: str, tmp_path: Path) -> None:
    flags = (
        "--concurrency 4 --requests 40 --warm-up 4 --prompt-tokens 4..16 --output-tokens 6 --zipf 1 --strict"
    )
    done = loadtest(server, *flags.split(), "--out", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "40 requests" in done.stdout and "0 failed" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["format"], report["format_version"]) == ("fusionserve-loadtest", 1)
    assert set(report["by_kind"]) == {"base", "lora", "blend", "fusion"}
    assert report["latency"]["itl_s"]["count"] == 40 * 5
    assert report["server"]["name"] == "fusionserve-tiny"
    assert {path.name for path in tmp_path.glob("*.png")} == {"latency.png", "timeline.png", "adapters.png"}
    # Each adapter is loaded once: by the request that is cold.
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    cold = [line for line in lines if line["residency"] == "cold"]
    loaded = {tuple(part) for line in lines for part in line["parts"]}
    assert cold and {tuple(part) for line in cold for part in line["parts"]} == loaded


def test_prompts_come_from_a_file(server: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("sub new {\nThe \n")
    flags = ("--prompt-file", str(tmp_path / "prompts.txt"), "--mix", "base=1", "--requests", "6")
    done = loadtest(server, *flags, "--concurrency", "2", "--strict")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_overloaded_server_is_told_by_its_errors(server: str, tmp_path: Path) -> None:
    flags = ["--rate", "200", "--requests", "60", "--output-tokens", "64", "--mix", "base=1", "--strict"]
    done = loadtest(server, *flags, "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: of 60 requests ")
    report = json.loads((tmp_path / "report.json").read_text())
    (error,) = report["errors"]
    assert error["status"] == "RESOURCE_EXHAUSTED"
    assert error["count"] == report["requests"]["failed"] > 0
    assert report["requests"]["succeeded"] >= 6  # four run, two wait


def test_an_interrupt_reports_what_there_is(server: str) -> None:
    flags = ("--concurrency", "2", "--duration", "1h", "--output-tokens", "64", "--mix", "lora=1")
    command = (*LOADTEST, "--server", server, *flags)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with Client(server) as client:
            while not any(adapter.active_requests for adapter in client.adapters.list()):
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert "stopped early" in out


def test_a_server_that_wants_certificates_is_tested_with_one(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, issued in (
        ("server", authority.issue_cert("127.0.0.1")),
        ("client", authority.issue_cert("me")),
    ):
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    trusts = ("--tls-ca", str(tmp_path / "ca.pem"))
    shows = ("--tls-cert", str(tmp_path / "client.pem"), "--tls-key", str(tmp_path / "client.key"))
    flags = {"--tls-cert": "server.pem", "--tls-key": "server.key", "--tls-client-ca": "ca.pem"}
    requests = ("--mix", "base=1", "--requests", "2", "--strict")
    with serving({flag: tmp_path / name for flag, name in flags.items()}) as (target, _):
        done = loadtest(target, *trusts, *shows, *requests)
        assert (done.returncode, done.stderr) == (0, "")
        done = loadtest(target, *trusts, *requests)
        assert done.returncode == 1 and done.stderr.startswith("error: UNAVAILABLE")
        done = loadtest(target, *trusts, *shows[:2], *requests)
        assert (done.returncode, done.stderr) == (2, "fusionserve: --tls-cert and --tls-key go together\n")
