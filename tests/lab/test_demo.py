"""The demonstration: its claims hold, its exit code reports that, and its table fits a terminal."""

import io
import subprocess
import sys

import pytest

from lab.console import WIDTH
from lab.report import Report, latency_line, percentile


@pytest.mark.lab
def test_the_demonstration_holds() -> None:
    command = [sys.executable, "-m", "proxy.cli", "demo", "--size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All proofs held" in done.stdout
    assert "FAIL" not in done.stdout
    for label in (
        "WebSocket",
        "SMTP",
        "bidirectional",
        "balanced by call",
        "deadline",
        "cancellation",
        "servers stopped",
        "gRPC: from",
    ):
        assert f" ok   {label} " in done.stdout
    assert "the client had 1 TCP connection" in " ".join(done.stdout.split())
    assert "UNAVAILABLE, Proxy-Status: " in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= WIDTH


def test_a_size_that_makes_no_sense_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "proxy.cli", "demo", "--size", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 64
    assert "--size 0" in done.stderr


def report(*held: bool) -> tuple[Report, str]:
    out = io.StringIO()
    made = Report(out=out)
    made.section = "A section"
    for number, each in enumerate(held):
        made.prove(f"proof {number}", "word " * 60, each)
    made.finish(1.0)
    return made, out.getvalue()


def test_all_proofs_together_make_it_hold() -> None:
    made, text = report(True, True)
    assert made.held
    assert "All proofs held: 2 of 2" in text
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("held", [(), (False,), (True, False)])
def test_one_failure_or_no_proof_at_all_does_not_hold(held: tuple[bool, ...]) -> None:
    made, text = report(*held)
    assert not made.held
    assert "NOT all proofs held" in text


def test_the_lines_below_the_proofs_fit_too() -> None:
    out = io.StringIO()
    made = Report(out=out, section="A section")
    made.prove("proof", "held", True)
    made.show(["x" * (2 * WIDTH)])
    made.finish(1.0)
    assert max(map(len, out.getvalue().splitlines())) == WIDTH


def test_trouble_of_the_laboratory_does_not_hold() -> None:
    made, _ = report(True)
    made.broke("a pod could not be made")
    assert not made.held


def test_percentiles_are_of_the_values() -> None:
    values = [float(number) for number in range(1, 101)]
    assert percentile(values, 0.5) == 51
    assert percentile(values, 0.99) == 100
    assert percentile([7.0], 0.99) == 7
    assert "p50 0.05 ms, p99 0.10 ms" in latency_line(values, values)
