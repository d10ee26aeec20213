"""`isthmus directory`: a schema for editors, and a check that reports everything at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from proxy.cli import CUT_SHORT, main
from tests.directory.splits import SPLITS, TEXT, WRONG


def test_a_good_file_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "directory.yaml"
    file.write_text(TEXT)
    assert main(["directory", "check", str(file)]) == 0
    output = capsys.readouterr()
    own = "2 services (1 exported, 1 with split or failover), 4 endpoints"
    assert (
        output.out
        == f"{file}: ok: {own}, east: 2 gateways, 2 services; north: 1 gateway, 1 service\n"
    )
    assert not output.err


def test_all_errors_and_all_good_files_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("good", "services: []"), ("wrong", WRONG), ("round", SPLITS)):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("good", "wrong", "round", "missing")]
    assert main(["directory", "check", *files]) == 1
    output = capsys.readouterr()
    assert (
        output.out
        == f"{files[0]}: ok: 0 services (0 exported, 0 with split or failover), 0 endpoints, no"
        " other cluster\n"
    )
    lines = output.err.splitlines()
    assert len([line for line in lines if line.startswith(f"{files[1]}: ")]) > 25
    assert (
        f"{files[2]}: services[0]: its requests would go in a cycle: default/a -> default/b ->"
        " default/a" in lines
    )
    assert f"{files[3]}: cannot be read: No such file or directory" in lines or lines[
        -1
    ].startswith(f"{files[3]}: ")


def test_the_schema_is_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["directory", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert {
        "services",
        "clusters",
        "cluster",
        "domain",
        "skip_ports",
        "allow_identity_loss",
    } == set(schema["properties"])


def test_a_closed_output_pipe_is_not_an_error() -> None:
    """`isthmus directory schema | head`"""
    command = [sys.executable, "-m", "proxy.cli", "directory", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == CUT_SHORT
