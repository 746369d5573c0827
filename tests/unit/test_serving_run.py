"""A server as a process: how it starts, what it refuses to be, and how it ends."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from reward_servers import SlowToy, add_options, expected, item, noise, process, ready

from calibri_lightning.errors import UserError
from calibri_lightning.serving.listening import open_socket
from calibri_lightning.serving.options import ServerOptions, is_loopback
from calibri_lightning.serving.run import script_main

TOKEN = "0123456789abcdef"


def score(url: str, seed: int = 0) -> requests.Response:
    body = {"reward": "toy", "items": [item(noise(seed))]}
    return requests.post(url + "/v1/score", json=body, timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_finish_and_refuses_new_ones(number: int) -> None:
    with process("--port", "0", "--score-seconds", "1.5") as running, ThreadPoolExecutor(1) as clients:
        url = ready(running)
        assert not url.endswith(":0")
        first = clients.submit(score, url)
        metrics = ""
        while "queue_seconds_count" not in metrics:  # until it is being scored
            metrics = requests.get(url + "/metrics", timeout=30).text
        running.send_signal(number)
        status = ""
        while status != "ending":
            status = requests.get(url + "/health", timeout=30).json()["status"]
        assert score(url).status_code == 503
        assert first.result().json()["results"][0]["scores"]["toy"] == expected(noise(0))
        assert running.wait(30) == 0
        assert "Traceback" not in (running.stderr.read() if running.stderr else "")


def test_a_second_signal_does_not_wait() -> None:
    with process("--port", "0", "--score-seconds", "3600") as running, ThreadPoolExecutor(1) as clients:
        url = ready(running)
        lost = clients.submit(score, url)
        metrics = ""
        while "queue_seconds_count" not in metrics:
            metrics = requests.get(url + "/metrics", timeout=30).text
        running.send_signal(signal.SIGTERM)
        while requests.get(url + "/health", timeout=30).json()["status"] != "ending":
            pass
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        assert_lost(lost)


def test_the_limit_of_grace_ends_what_never_ends() -> None:
    arguments = ("--port", "0", "--score-seconds", "3600", "--grace-seconds", "0.1")
    with process(*arguments) as running, ThreadPoolExecutor(1) as clients:
        url = ready(running)
        lost = clients.submit(score, url)
        metrics = ""
        while "queue_seconds_count" not in metrics:
            metrics = requests.get(url + "/metrics", timeout=30).text
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        assert_lost(lost)


def assert_lost(request: Future[requests.Response]) -> None:
    """Its client was told, or saw the connection end."""
    if request.exception() is None:
        assert request.result().status_code == 503
        assert "ending" in request.result().json()["error"]
    else:
        assert isinstance(request.exception(), requests.ConnectionError)


def test_a_signal_while_loading_ends_it() -> None:
    with process("--port", "0", "--load-seconds", "3600") as running:
        assert running.stdout is not None
        url = running.stdout.readline().split()[-1]
        status = None
        while status is None:
            try:
                status = requests.get(url + "/health", timeout=30).json()["status"]
            except requests.ConnectionError:
                continue
        assert status == "loading"
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0


def test_the_line_of_a_ready_server_says_what_it_takes() -> None:
    with process("--port", "0", "--max-body", "5", "--allow-jpeg", CALIBRI_REWARD_TOKEN=TOKEN) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline(), running.stdout.readline()]
    assert lines[0].startswith("loading 1 reward(s) for http://127.0.0.1:")
    assert "toy (toy @ 1, float32). Token required; at most 5 MiB and 256 pictures" in lines[1]
    assert "jpeg" in lines[1]
    assert TOKEN not in "".join(lines)


Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Starts a server that refuses to; what it says."""

    def start(*arguments: str, **environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            script_main(SlowToy, add_options, arguments)
        for name in environment:
            monkeypatch.delenv(name)
        assert end.value.code == 2
        return capsys.readouterr().err

    return start


def test_a_load_failure_ends_the_process_with_its_reason() -> None:
    with process("--port", "0", "--broken") as running:
        _, errors = running.communicate(timeout=60)
        assert running.returncode == 2
    assert "error: A reward could not be loaded: RuntimeError: these weights are broken" in errors


def test_a_public_host_needs_a_good_token(fails: Fails) -> None:
    assert "--host is 0.0.0.0, which other machines can reach, and there is no token" in fails("--host", "0.0.0.0")
    assert "has 5 characters" in fails("--host", "0.0.0.0", CALIBRI_REWARD_TOKEN="short")
    with process("--host", "0.0.0.0", "--port", "0", CALIBRI_REWARD_TOKEN=TOKEN) as running:
        url = ready(running).replace("0.0.0.0", "127.0.0.1")
        assert requests.get(url + "/v1/rewards", timeout=30).status_code == 401


def test_the_token_can_come_from_a_file_but_never_from_the_command_line(fails: Fails, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    with process("--port", "0", "--token-file", str(file)) as running:
        url = ready(running)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        assert requests.get(url + "/v1/rewards", headers=headers, timeout=30).ok
        assert requests.get(url + "/v1/rewards", timeout=30).status_code == 401
    assert "Unrecognized arguments: --token" in fails("--token", "x")
    assert "given twice" in fails("--token-file", str(file), CALIBRI_REWARD_TOKEN=TOKEN)
    assert "cannot be read" in fails("--token-file", str(tmp_path / "none"))


def test_an_address_in_use_is_said(fails: Fails) -> None:
    with process("--port", "0") as running:
        port = ready(running).rpartition(":")[2]
        assert f"cannot listen on 127.0.0.1 port {port}" in fails("--port", port)


def test_tls(fails: Fails, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    with process("--port", "0", "--tls-certificate", str(certificate), "--tls-key", str(key)) as running:
        url = ready(running)
        assert url.startswith("https://")
        assert requests.get(url + "/health", verify=str(certificate), timeout=30).ok
    assert "cannot be used" in fails("--port", "0", "--tls-certificate", str(key), "--tls-key", str(certificate))
    assert "TLS needs two files" in fails("--tls-key", str(key))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "--max-batch is 0; it must be at least 1"),
        ({"batch_window_ms": float("nan")}, "--batch-window-ms is nan"),
        ({"port": 65536}, "--port is 65536"),
        ({"read_seconds": 0}, "--read-seconds is 0"),
        ({"max_queue": 10, "max_items": 11}, r"--max-queue is 10; it must be at least max_items \(11\)"),
        ({"max_memory_bytes": 5}, "--max-memory is 5"),
        ({"token": ""}, "empty or has characters"),
        ({"token": "with space"}, "empty or has characters"),
        ({"token": "ümlaut"}, "empty or has characters"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServerOptions(**options)  # type: ignore[arg-type]


def test_what_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "", "8.8.8.8"))
    with pytest.raises(UserError, match="no such host"):
        is_loopback("no such host")


def test_answers_leave_at_once() -> None:
    # asyncio sets TCP_NODELAY only on sockets that name their protocol; without it each answer takes 40 ms.
    with open_socket("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_the_token_is_not_printed() -> None:
    assert TOKEN not in repr(ServerOptions(token=TOKEN))
