"""`fusionserve` as a process: exit codes, one-line reasons, and how soon they come."""

import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

FUSIONSERVE = (sys.executable, "-P", "-m", "fusionserve.server.main")
# Processor time, so that a busy machine does not matter: several times what is needed, less than torch needs.
SOON_CPU_S = 1.0
SUPPORT = Path(__file__).parent.parent / "support"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("FUSIONSERVE_")}

FAKE_SERVE = f"""
import sys
sys.path.append({str(SUPPORT)!r})
from fake_engine import FakeEngine
from fusionserve.server.commands.serve import run
assert "torch" not in sys.modules
sys.exit(run(sys.argv[1:], lambda config, labels: FakeEngine()))
"""

FAKE_MAIN = f"""
import sys
sys.path.append({str(SUPPORT)!r})
from fake_engine import FakeEngine
from fusionserve.server.commands import serve
from fusionserve.server.main import main
serve.load_engine = lambda config, labels: FakeEngine()
sys.exit(main(["serve", *sys.argv[1:]]))
"""


def fusionserve(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A finished command, which must have finished soon."""
    start = cpu_s()
    done = subprocess.run(
        (*FUSIONSERVE, *argv), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=30
    )
    assert cpu_s() - start < SOON_CPU_S
    return done


def in_shell(script: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell's script that has run, with `argv` for its arguments."""
    command = ("sh", "-c", script, "sh", *argv)
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=30)


def cpu_s() -> float:
    """Processor time of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize(
    "argv", [("--help",), ("serve", "--help"), ("adapters", "--help"), ("generate", "-h")]
)
def test_help_exits_with_0(argv: tuple[str, ...]) -> None:
    done = fusionserve(*argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: fusionserve")


def test_version_names_what_it_runs_on() -> None:
    lines = fusionserve("version").stdout.splitlines()
    assert lines[0].startswith("fusionserve ")
    assert any(line.startswith("torch ") for line in lines)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("swim",), "fusionserve: no command 'swim'; there are serve, generate"),
        (
            ("serve", "--modle", "x"),
            "fusionserve: unrecognized arguments: --modle x; see fusionserve serve --help",
        ),
        (("serve", "--model", "/nowhere"), "fusionserve: --model: there is no model folder '/nowhere'"),
        (("serve", "--dtype", "int3"), "fusionserve: --dtype: 'int3' is not one of auto, float32"),
        (("adapters", "list", "--server", ""), "fusionserve: --server: '' names no server"),
        (("adapters",), "fusionserve: the following arguments are required: ACTION"),
        (("generate", "--prompt", "caf\udce9"), "fusionserve: --prompt: it is not UTF-8"),
        (("generate", "--adapter", "caf\udce9"), "fusionserve: --adapter: it is not UTF-8"),
        (("generate", "--blend", "caf\udce9=1"), "fusionserve: --blend: it is not UTF-8"),
        (("generate", "--server", "caf\udce9:1"), "fusionserve: --server: it is not UTF-8"),
        (("adapters", "get", "caf\udce9"), "fusionserve: argument NAME: it is not UTF-8"),
        (("generate", "--token", "a b"), "fusionserve: --token: a token has printable ASCII characters only"),
        (("token", "--name", "Team-B"), "fusionserve: --name: a name is 1 to 63 of a-z 0-9 . _ -"),
        (("token", "--name", 'a"b'), "fusionserve: --name: a name is 1 to 63 of a-z 0-9 . _ -"),
    ],
)
def test_wrong_command_lines_exit_with_2_and_one_line(argv: tuple[str, ...], reason: str) -> None:
    done = fusionserve(*argv)
    assert done.returncode == 2
    assert done.stderr.startswith(reason)
    assert done.stderr.count("\n") == 1


def test_wrong_environment_exits_with_2() -> None:
    done = fusionserve("serve", FUSIONSERVE_THREADS="none")
    assert (done.returncode, done.stderr) == (
        2,
        "fusionserve: FUSIONSERVE_THREADS: 'none' is not a whole number\n",
    )


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_taken_port_exits_with_1_before_the_model_loads(flag: str, model: str) -> None:
    free = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        argv = [text for pair in (free | {flag: address}).items() for text in pair]
        done = fusionserve("serve", "--model", model, *argv)
    assert done.returncode == 1
    assert done.stderr == f"fusionserve: cannot listen on {address}: Address already in use\n"


def test_no_server_exits_with_1() -> None:
    done = fusionserve("generate", "--prompt", "x", "--server", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: UNAVAILABLE")


def test_input_that_is_no_text_exits_with_2() -> None:
    command = (*FUSIONSERVE, "generate", "--server", "127.0.0.1:1")
    done = subprocess.run(command, input=b"caf\xe9", env=ENVIRONMENT, capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (2, b"fusionserve: standard input is not UTF-8\n")


def test_output_that_cannot_be_written_exits_with_1_and_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            (*FUSIONSERVE, "token"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["fusionserve: No space left on device"]  # behind the token


@pytest.mark.parametrize("argv", [("--help",), ("serve", "--help"), ("token", "--help"), ("version",)])
def test_closed_pipe_is_no_error_message(argv: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            (*FUSIONSERVE, *argv), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("argv", [("--help",), ("version",), ("token",)])
def test_closed_output_is_no_error(argv: tuple[str, ...]) -> None:
    done = in_shell('"$@" >&-', *FUSIONSERVE, *argv)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_closed_input_is_an_empty_one() -> None:
    done = in_shell('"$@" <&-', *FUSIONSERVE, "generate", "--server", "127.0.0.1:1", "--timeout", "1s")
    assert done.returncode == 1
    assert done.stderr.startswith("error: UNAVAILABLE")


def test_what_the_output_cannot_show_is_escaped() -> None:
    code = (
        "from fusionserve.server import main; main._help = lambda: 'caf\\xe9 \\u2713'; main.main(['--help'])"
    )
    done = in_shell('"$@"', sys.executable, "-P", "-c", code, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\u2713\n", "")


@pytest.mark.parametrize("has_output", [True, False])
def test_server_that_nobody_reads_serves_until_sigterm(has_output: bool, model: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    serve = (sys.executable, "-P", "-c", FAKE_MAIN, "--model", model, "--listen", "127.0.0.1:0")
    shell = ("sh", "-c", 'exec "$@"' + ("" if has_output else " >&-"), "sh")
    command = (*shell, *serve, "--metrics-listen", "off")
    with subprocess.Popen(
        command, stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as server:
        os.close(writer)
        assert server.stderr is not None
        if has_output:
            assert "cannot print 'ready grpc=" in server.stderr.readline()
        else:
            time.sleep(3)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=15)
    assert (server.returncode, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_anything_is_loaded_stops_with_success(number: signal.Signals, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    os.mkfifo(config)  # reading it stands for all that comes before the event loop
    command = (*FUSIONSERVE, "serve", "--config", str(config))
    server = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    with server, config.open("w"):  # returns when the server opens it, too
        server.send_signal(number)
        _, err = server.communicate(timeout=10)
    assert (server.returncode, err) == (0, "")


def test_serve_says_ready_and_stops_on_sigterm(model: str) -> None:
    argv = (
        "--model",
        model,
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--drain-grace",
        "1s",
    )
    command = [sys.executable, "-P", "-c", FAKE_SERVE, *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) as server:
        assert server.stdout is not None
        kind, grpc, metrics = server.stdout.readline().split()
        assert (kind, grpc[:15], metrics[:18]) == ("ready", "grpc=127.0.0.1:", "metrics=127.0.0.1:")
        listed = fusionserve("adapters", "list", "--server", grpc.removeprefix("grpc="))
        assert "alpha" in listed.stdout
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_token_is_shown_once_and_its_digest_goes_to_the_file() -> None:
    done = fusionserve("token", "--name", "team-a", "--role", "read")
    token = done.stderr.removeprefix("the token, shown this once: ").strip()
    assert done.returncode == 0 and len(token) > 40 and token not in done.stdout
    (entry,) = tomllib.loads(done.stdout)["token"]
    assert entry == {"name": "team-a", "role": "read", "sha256": hashlib.sha256(token.encode()).hexdigest()}


def test_address_beyond_loopback_is_refused_in_the_clear(model: str) -> None:
    done = fusionserve("serve", "--model", model, "--listen", "0.0.0.0:0", "--metrics-listen", "off")
    assert done.returncode == 1
    assert "can be reached from other machines and has no TLS and tokens" in done.stderr
    assert done.stderr.count("\n") == 1
