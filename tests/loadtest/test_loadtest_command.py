"""`fusionserve loadtest` on the command line: help, settings, and what is missing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusionserve.loadtest_config import LoadConfig, ServiceLevels, UniformLengths, parse_lengths
from fusionserve.server.command_errors import UsageError
from fusionserve.server.commands.loadtest import _parser
from fusionserve.server.commands.loadtest_settings import SETTINGS, to_load_config
from fusionserve.server.main import main
from fusionserve.server.settings import resolve


def config(*argv: str) -> LoadConfig:
    return to_load_config(resolve(SETTINGS, _parser().parse_args(argv)))


def test_help_fits_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["loadtest", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    assert all(any(setting.flag in line for line in lines) for setting in SETTINGS)


def test_without_flags_a_closed_loop_runs_for_a_while() -> None:
    assert config() == LoadConfig(target="127.0.0.1:50051", duration_s=30.0)


def test_every_flag_reaches_the_run(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x\n")
    flags: dict[str, Any] = {
        "--rate": "2.5", "--max-in-flight": 7, "--requests": 9, "--duration": "2m", "--warm-up": 3, "--seed": 4,
        "--mix": "base=1,lora=0.5", "--adapters": "a,b", "--fusions": "f", "--zipf": 1.1, "--blend-size": 3,
        "--prompt-file": prompts, "--output-tokens": "lognormal:20:0.5:99", "--slo-ttft": "300ms",
        "--slo-itl": "0.2", "--slo-tpot": "50ms", "--slo-e2e": "4s", "--server": "host:1", "--timeout": "9s",
        "--temperature": "0.7", "--top-p": "0.9", "--stream-interval": 5,
    }  # fmt: skip
    assert config(*(str(text) for pair in flags.items() for text in pair)) == LoadConfig(
        target="host:1",
        timeout_s=9.0,
        rate=2.5,
        max_in_flight=7,
        num_requests=9,
        duration_s=120.0,
        warm_up=3,
        seed=4,
        mix={"base": 1.0, "lora": 0.5},
        adapters=("a", "b"),
        fusions=("f",),
        zipf=1.1,
        blend_size=3,
        prompt_file=prompts,
        temperature=0.7,
        top_p=0.9,
        stream_interval=5,
        output_lengths=parse_lengths("lognormal:20:0.5:99"),
        service_levels=ServiceLevels(ttft_s=0.3, itl_s=0.2, tpot_s=0.05, e2e_s=4.0),
    )
    closed = config("--concurrency", "5", "--prompt-tokens", "1..4", "--requests", "2")
    assert (closed.concurrency, closed.prompt_lengths, closed.duration_s) == (5, UniformLengths(1, 4), None)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--rate", "0"), "--rate: '0' is not above 0"),
        (("--rate", "1", "--concurrency", "2"), "--rate and --concurrency exclude each other"),
        (("--mix", "swim=1"), "--mix: 'swim' is not one of base, lora, blend, fusion"),
        (("--mix", "base=0"), "--mix: all weights are 0"),
        (("--mix", "base=-1"), "--mix: base: -1 is below 0"),
        (("--adapters", "a,a"), "--adapters: a name is given twice"),
        (("--adapters", "../a"), "--adapters: '../a' is not a name"),
        (("--zipf", "-1"), "--zipf: '-1' is not from 0 to 20"),
        (("--temperature", "101"), "--temperature: '101' is not from 0 to 100"),
        (("--stream-interval", "0"), "--stream-interval: 0 is not from 1 to 1024"),
        (("--top-p", "0"), "--top-p: '0' is not above 0 and up to 1"),
        (("--prompt-tokens", "0"), "--prompt-tokens: '0' is not N, LOW..HIGH"),
        (("--prompt-file", "/nowhere"), "--prompt-file: there is no file '/nowhere'"),
        (("--out", __file__), "--out: "),
    ],
)
def test_wrong_settings_are_refused(argv: tuple[str, ...], reason: str) -> None:
    with pytest.raises(UsageError) as error:
        config(*argv)
    assert str(error.value).startswith(reason)


def test_no_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", "--server", "127.0.0.1:1", "--requests", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: UNAVAILABLE")
    assert err.count("\n") == 1


def test_nothing_of_the_server_is_needed() -> None:
    script = """
import sys
for name in ("torch", "transformers", "prometheus_client", "yaml", "grpc_health"):
    sys.modules[name] = None
from fusionserve.server.main import main
sys.exit(main(["loadtest", "--server", "127.0.0.1:1", "--requests", "1"]))
"""
    done = subprocess.run((sys.executable, "-P", "-c", script), capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("error: UNAVAILABLE")


@pytest.mark.parametrize("package", ["tqdm", "matplotlib", "numpy"])
def test_a_missing_package_is_named_with_its_extra(package: str) -> None:
    script = f"""
import sys
sys.modules[{package!r}] = None
from fusionserve.server.main import main
sys.exit(main(["loadtest", "--requests", "1"]))
"""
    done = subprocess.run((sys.executable, "-P", "-c", script), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: {package} is not installed; this command needs: pip install 'fusionserve[loadtest]'\n"
    )
