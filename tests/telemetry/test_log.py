"""Logs: one line for one event whatever peers send, and a writer that never blocks the proxy."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.schema_process import LogConfig
from proxy.net.tls.handshake import TLSInfo
from proxy.telemetry.log import (
    ConnectionLine,
    JsonFormatter,
    QueueHandler,
    RateLimit,
    RequestLine,
    TextFormatter,
    configure,
    log_connection,
    log_request,
    warn,
)
from proxy.telemetry.log_output import describe_losses

LOGGER = logging.getLogger("isthmus.test")


def written(act: Callable[[], None], **settings: object) -> list[str]:
    stream = io.StringIO()
    close = configure(LogConfig(**settings), stream)  # type: ignore[arg-type]
    act()
    close()
    return stream.getvalue().splitlines()


CONNECTION = ConnectionLine(
    direction="inbound",
    peer="10.0.0.1:5",
    destination="10.0.0.2:80",
    protocol="http/1.1",
    identity="spiffe://t/ns/a/sa/b",
    tls=TLSInfo(
        "TLSv1.3",
        "TLS_AES_256_GCM_SHA384",
        "X25519MLKEM768",
        b"http/1.1",
        False,
        "spiffe://t/ns/a/sa/b",
        "b.a.sa.t",
    ),
    read=1,
    written=0,
    seconds=0.25,
    reason="closed",
)


def test_a_connection_is_one_json_object() -> None:
    (line,) = written(lambda: log_connection(CONNECTION), format="json")
    found = json.loads(line)
    assert (found["level"], found["message"], found["logger"]) == (
        "info",
        "connection",
        "isthmus.connection",
    )
    assert (found["identity"], found["tls"], found["group"], found["resumed"]) == (
        "spiffe://t/ns/a/sa/b",
        "TLSv1.3",
        "X25519MLKEM768",
        False,
    )
    assert (found["read"], found["written"], found["seconds"]) == (1, 0, 0.25)
    assert "upstream" not in found


def test_a_request_is_one_line_of_text() -> None:
    line = RequestLine(
        "outbound",
        "10.0.0.1:5",
        method=b"GET",
        target=b"/a b",
        authority=b"c",
        status=200,
        seconds=0.1,
    )
    (text,) = written(lambda: log_request(line))
    assert (
        'direction=outbound peer=10.0.0.1:5 method=GET target="/a b" authority=c status=200' in text
    )


def test_lines_below_the_level_are_not_written() -> None:
    assert written(lambda: log_connection(CONNECTION), level="warning") == []
    assert len(written(lambda: LOGGER.warning("x"), level="warning")) == 1


@given(st.text(), st.binary())
def test_nothing_that_a_peer_sends_makes_a_second_line_or_a_field(text: str, octets: bytes) -> None:
    record = LOGGER.makeRecord(
        "isthmus",
        logging.INFO,
        "f",
        1,
        text,
        (),
        None,
        extra={"line": RequestLine(text, text, target=octets, status=7)},
    )
    plain = TextFormatter().format(record)
    assert plain.isprintable()
    assert " status=7" in plain
    parsed = json.loads(JsonFormatter().format(record))
    assert parsed["status"] == 7
    assert len(JsonFormatter().format(record).splitlines()) == 1


def test_a_value_cannot_forge_another_field() -> None:
    line = RequestLine("inbound", "p", target=b'/ status=200 identity="spiffe://x"', status=403)
    (text,) = written(lambda: log_request(line))
    assert 'target="/ status=200 identity=\\"spiffe://x\\"" status=403' in text


def test_the_lines_of_a_traceback_are_indented() -> None:
    def fail() -> None:
        try:
            raise KeyError("a\n2026-01-01T00:00:00.000Z info forged")
        except KeyError:
            LOGGER.exception("failed")

    first, *rest = written(fail)
    assert first.endswith("failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)


class Stuck(io.StringIO):
    """A standard error whose reader has stopped, until `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.reached = threading.Event()

    def write(self, text: str) -> int:
        self.reached.set()
        self.go.wait(60)
        return super().write(text)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stream = Stuck()
    yield stream
    stream.go.set()


def test_a_stuck_reader_blocks_nothing_and_losses_are_counted_and_reported(stuck: Stuck) -> None:
    drops: list[int] = []
    close = configure(LogConfig(queue=16), stuck, lambda count, _: drops.append(count))
    LOGGER.warning("first")
    assert stuck.reached.wait(60)
    started = time.monotonic()
    for number in range(1000):
        LOGGER.warning("%d", number)
    assert time.monotonic() - started < 10
    assert sum(drops) == 1000 - 16
    stuck.go.set()
    close()
    assert "984 log lines were dropped: the reader is too slow" in stuck.getvalue()


def test_the_process_ends_although_the_reader_is_stuck(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.telemetry.log.CLOSING", 0.05)
    close = configure(LogConfig(), stuck)
    LOGGER.warning("x")
    assert stuck.reached.wait(60)
    started = time.monotonic()
    close()
    assert time.monotonic() - started < 10


def test_a_reader_that_has_gone_ends_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    drops: list[tuple[int, str]] = []
    with open(writer, "w", buffering=1, closefd=False) as stream:
        close = configure(LogConfig(), stream, lambda *drop: drops.append(drop))
        LOGGER.warning("x")
        LOGGER.warning("y")
        close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    os.close(writer)
    assert sum(count for count, _ in drops) == 2
    assert {why for _, why in drops} == {"closed"}


def test_a_message_that_does_not_fit_its_arguments_ends_nothing() -> None:
    stream = io.StringIO()
    handler = QueueHandler(stream, TextFormatter(), 16, lambda *_: None)
    for message in ("%d", "%s"):
        handler.handle(
            LOGGER.makeRecord("isthmus", logging.INFO, "file.py", 7, message, ("x",), None)
        )
    handler.close()
    first, second = stream.getvalue().splitlines()
    assert first == "a log line could not be formatted: TypeError (file.py:7)"
    assert second.endswith("isthmus: x")


def test_a_limit_lets_some_through_each_second_and_says_how_many_it_kept() -> None:
    now = [0.0]
    limit = RateLimit(2, lambda: now[0])

    def act() -> None:
        for _ in range(5):
            warn(LOGGER, limit, "bad %s", "thing")
        now[0] = 1.0
        warn(LOGGER, limit, "bad %s", "thing")

    lines = [line.split(": ", 1)[1] for line in written(act)]
    assert lines == ["bad thing", "bad thing", "bad thing (3 similar suppressed)"]


# What is logged of a target...


@pytest.mark.parametrize(
    ("target", "hidden", "shown"),
    [
        (b"/a", "/a", "/a"),
        (b"/a?token=secret", "/a", "/a?token=secret"),
        (b"/a?b?c=d", "/a", "/a?b?c=d"),
        (b"/?X-Amz-Signature=secret&a=b", "/", "/?X-Amz-Signature=REDACTED&a=b"),
        (
            b"http://user:word@host:80/a?token=secret",
            "http://host:80/a",
            "http://host:80/a?token=secret",
        ),
        (b"http://host?token=secret", "http://host", "http://host?token=secret"),
        (b"/a://b@c/d?e", "/a://b@c/d", "/a://b@c/d?e"),
        (b"host:443", "host:443", "host:443"),
        (b"*", "*", "*"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_query_is_not_written_unless_that_is_wanted_and_secrets_never_are(
    target: bytes, hidden: str, shown: str, form: str
) -> None:
    line = RequestLine(
        "outbound",
        "10.0.0.1:5",
        method=b"GET",
        target=target,
        authority=b"user:secret@host",
        status=200,
    )
    for query, expected in ((False, hidden), (True, shown)):
        (text,) = written(lambda: log_request(line), format=form, query=query)
        assert (f'"target": "{expected}",' if form == "json" else f"{expected}") in text
        assert ("secret" in text) is ("secret" in expected)


# What cannot be written...


class Drops:
    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def __call__(self, count: int, why: str) -> None:
        self.found.append((count, why))

    def total(self) -> int:
        return sum(count for count, _ in self.found)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_disk_is_called_that_and_reported_when_there_is_room_again(tmp_path: Path) -> None:
    drops = Drops()
    file = tmp_path / "log"
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(descriptor, "w", buffering=1) as stream:
        close = configure(LogConfig(), stream, drops)
        for number in range(3):
            LOGGER.warning("lost %d", number)
        until(lambda: drops.total() == 3)
        room = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(room, descriptor)
        os.close(room)
        LOGGER.warning("written")
        close()
    first, second = file.read_text().splitlines()
    assert {why for _, why in drops.found} == {"disk_full"}
    assert first.endswith("isthmus.test: written")
    assert second.endswith("isthmus: 3 log lines were dropped: the disk was full")


def test_standard_error_that_is_closed_is_called_that() -> None:
    drops = Drops()
    descriptor = os.open(os.devnull, os.O_WRONLY)
    stream = open(descriptor, "w", buffering=1, closefd=False)  # noqa: SIM115  # it is closed under the writer
    close = configure(LogConfig(), stream, drops)
    os.close(descriptor)
    LOGGER.warning("x")
    until(lambda: drops.total() == 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    close()
    assert drops.found == [(1, "closed")]


def test_a_pipe_that_does_not_block_is_waited_for_and_loses_nothing() -> None:
    """Another process that has the same pipe may have set it to non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    drops, got = Drops(), bytearray()
    with (
        os.fdopen(writer, "w", buffering=1) as stream,
        os.fdopen(reader, "rb", buffering=0) as other,
    ):
        close = configure(LogConfig(queue=100_000), stream, drops)
        for number in range(2000):
            LOGGER.warning("%d %s", number, "x" * 200)
        while got.count(b"\n") < 2000:
            got += other.read(100_000)
        close()
    assert drops.found == []
    assert [line.split()[3] for line in got.decode().splitlines()] == [
        str(number) for number in range(2000)
    ]


@pytest.mark.lab
def test_a_line_that_a_full_disk_has_cut_is_ended_before_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder], check=True)
    try:
        drops = Drops()
        with (folder / "log").open("a", buffering=1) as stream:
            close = configure(LogConfig(), stream, drops)
            for number in range(100):
                LOGGER.warning("%d %s", number, "x" * 1000)
            until(lambda: (folder / "log").read_bytes().count(b"\n") + drops.total() == 100)
            before = (folder / "log").read_text()
            assert not before.endswith("\n")
            os.truncate(folder / "log", len(before) - 8192)
            LOGGER.warning("room")
            close()
        lines = before[: len(before) - 8192].splitlines()
        after = (folder / "log").read_text().splitlines()
        assert after[: len(lines)] == lines, "what was cut there is unchanged"
        assert after[len(lines)].endswith("isthmus.test: room"), "on a line of its own"
        assert after[-1].endswith(
            f"isthmus: {drops.total()} log lines were dropped: the disk was full"
        )
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_losses_are_counted_by_reason() -> None:
    assert describe_losses({"slow_reader": 2, "disk_full": 1}) == (
        "3 log lines were dropped: the disk was full (1), the reader is too slow (2)"
    )
