"""A proxy that cannot start prints the reason in one line, and has an exit code for it: 64 for
wrong settings, 69 for unavailable resources.

Rules: the real command, no pod. Each case is one change to a good configuration."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.pod import ROOT
from lab.sidecar import Authority


def run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """`isthmus run` with a configuration that it refuses: its exit code, and its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    command = [sys.executable, "-m", "proxy.cli", "run", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env={**clean, **(environment or {})},
    )
    return done.returncode, done.stderr


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A configuration whose files all exist, on free ports."""
    ours = Authority()
    issued = ours.issue(ours.identity("web"))
    for name, data in (
        ("certificate.pem", issued.certificate_pem),
        ("key.pem", issued.key_pem),
        ("roots.pem", ours.root.certificate_pem),
    ):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)
    (tmp_path / "directory.yaml").write_text("services: []\n")
    return {
        "outbound": {"listen": ["127.0.0.1:0"]},
        "inbound": {"listen": ["127.0.0.1:0"]},
        "admin": {"listen": ["127.0.0.1:0"]},
        "directory": {"file": str(tmp_path / "directory.yaml")},
        "identity": {
            "certificate": str(tmp_path / "certificate.pem"),
            "key": str(tmp_path / "key.pem"),
            "roots": [str(tmp_path / "roots.pem")],
        },
    }


def write(tmp_path: Path, config: dict[str, Any]) -> str:
    path = tmp_path / "isthmus.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.mark.parametrize(
    "missing", ["directory.yaml", "certificate.pem", "key.pem", "roots.pem", "isthmus.yaml"]
)
def test_a_file_that_is_missing_at_the_start_is_one_line_and_exit_code_64(
    tmp_path: Path, config: dict[str, Any], missing: str
) -> None:
    path = write(tmp_path, config)
    (tmp_path / missing).unlink()
    code, output = run("--config", path)
    assert code == 64
    assert output.count("\n") == 1
    assert output.startswith("isthmus: ")
    assert str(tmp_path / missing) in output
    assert "Traceback" not in output


@pytest.mark.parametrize("broken", ["directory.yaml", "certificate.pem", "key.pem", "roots.pem"])
def test_a_file_that_is_broken_at_the_start_is_named_and_exit_code_64(
    tmp_path: Path, config: dict[str, Any], broken: str
) -> None:
    (tmp_path / broken).write_text("nonsense: [")
    code, output = run("--config", write(tmp_path, config))
    assert code == 64
    assert str(tmp_path / broken) in output
    assert "Traceback" not in output


def test_an_expired_certificate_at_the_start_is_exit_code_64(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    ours = Authority()
    issued = ours.issue_expired(ours.identity("web"))
    for name, data in (
        ("certificate.pem", issued.certificate_pem),
        ("key.pem", issued.key_pem),
        ("roots.pem", ours.root.certificate_pem),
    ):
        (tmp_path / name).write_bytes(data)
    code, output = run("--config", write(tmp_path, config))
    assert code == 64
    assert "expired" in output
    assert output.count("\n") == 1


def test_all_mistakes_of_a_configuration_are_reported_at_once(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["http"] = {"head_timeout": "ten seconds", "max_head_byte": "64KiB"}
    config["outbound"] = {"listen": ["localhost:4140"]}
    config["log"] = {"level": "loud"}
    code, output = run(
        "--config", write(tmp_path, config), environment={"ISTHMUS_POOL__IDLE_TIMEOUT": "-1s"}
    )
    assert code == 64
    for path in (
        "http.head_timeout",
        "max_head_byte",
        "outbound.listen",
        "log.level",
        "pool.idle_timeout",
    ):
        assert path in output
    assert str(tmp_path / "isthmus.yaml") in output
    assert "Traceback" not in output


def test_a_port_that_is_taken_is_named_and_exit_code_69(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config["inbound"] = {"listen": [address]}
        code, output = run("--config", write(tmp_path, config))
    assert code == 69
    assert output == f"isthmus: cannot listen on {address}: another process listens there already\n"


def test_the_configuration_that_is_good_starts(tmp_path: Path, config: dict[str, Any]) -> None:
    """So the other tests fail for the reasons that they name."""
    command = [sys.executable, "-m", "proxy.cli", "run", "--config", write(tmp_path, config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            output = ""
            while "identity: spiffe://" not in output:
                line = process.stderr.readline()
                assert line, output
                output += line
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
