"""Large uploads through a proxy, of either version and on both paths: every byte arrives, and the
proxy's memory does not grow.

On each path one version carries 2 GiB, more than a signed 32-bit number can count. 256 MiB are
enough to show that memory does not grow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.wire.h2.frames import END_HEADERS, END_STREAM, PREFACE, Kind, Setting, frame
from tests.kit.floods import HOST, MIB, Flooded, program
from tests.kit.http2 import OK, POST, data, headers, long, settings
from tests.kit.ports import free_port

LONG, SHORT = 2 << 30, 256 * MIB
FRAME = 16384
PIECE = bytes(MIB)
# Seconds, on a busy machine; it takes three to ten.
PATIENCE = 120.0


class Server:
    """Reads one upload, discards it, and answers with the number of its bytes."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._serve = serve
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock:
            self._serve(sock)

    def close(self) -> None:
        self._listener.close()


def take1(sock: socket.socket) -> None:
    """HTTP/1, of a known length."""
    seen, buffer = b"", bytearray(MIB)
    while b"\r\n\r\n" not in seen:
        piece = sock.recv(65536)
        if not piece:
            return
        seen += piece
    head, _, rest = seen.partition(b"\r\n\r\n")
    length, total = (
        int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]),
        len(rest),
    )
    while total < length and (size := sock.recv_into(buffer)):
        total += size
    answer = b"%d" % total
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
    sock.recv(1)


class Frames:
    """The frames that arrive on a connection; DATA is counted and not kept."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""
        self.body = 0
        self.ended = False
        self.credit = [0, 0]  # given by the peer: for the connection, and for stream 1
        self.last = b""  # DATA

    def read(self) -> bool:
        """False: the connection has ended."""
        more = self._sock.recv(4 * MIB)
        buffer, at = self._buffer + more, 0
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            if len(buffer) - at < 9 + size:
                break
            kind, flags, stream = (
                buffer[at + 3],
                buffer[at + 4],
                int.from_bytes(buffer[at + 5 : at + 9], "big"),
            )
            if kind == Kind.DATA:
                self.body += size
                self.last = buffer[at + 9 : at + 9 + size]
            elif kind == Kind.WINDOW_UPDATE:
                self.credit[stream != 0] += int.from_bytes(buffer[at + 9 : at + 13], "big")
            elif kind == Kind.SETTINGS and not flags:
                for value in range(at + 9, at + 9 + size, 6):
                    if (
                        int.from_bytes(buffer[value : value + 2], "big")
                        == Setting.INITIAL_WINDOW_SIZE
                    ):
                        self.credit[1] += int.from_bytes(buffer[value + 2 : value + 6], "big")
            assert kind not in (Kind.RST_STREAM, Kind.GOAWAY), buffer[at : at + 60]
            self.ended = self.ended or (
                kind in (Kind.DATA, Kind.HEADERS) and bool(flags & END_STREAM)
            )
            at += 9 + size
        self._buffer = buffer[at:]
        return bool(more)


def take2(sock: socket.socket) -> None:
    """HTTP/2, with a window of 4 MiB that is refilled when half of it is used."""
    window = 4 * MIB
    sock.sendall(
        settings((Setting.INITIAL_WINDOW_SIZE, window))
        + long(Kind.WINDOW_UPDATE, 0, window - 65535)
    )
    if sock.recv(len(PREFACE), socket.MSG_WAITALL) != PREFACE:
        return
    frames, given = Frames(sock), 0
    while not frames.ended and frames.read():
        if frames.body - given >= window // 2:
            more, given = frames.body - given, frames.body
            sock.sendall(long(Kind.WINDOW_UPDATE, 0, more) + long(Kind.WINDOW_UPDATE, 1, more))
    sock.sendall(headers(1, OK, END_HEADERS) + data(1, b"%d" % frames.body, END_STREAM))
    sock.recv(1)


@contextmanager
def proxied(folder: Path, app: int, *, fast: bool) -> Iterator[Flooded]:
    """A sidecar in clear text before `app`."""
    port, admin = free_port(), free_port()
    (folder / "isthmus.yaml").write_text(
        f'{{"inbound": {{"listen": ["{HOST}:{port}"], "fixed_destination": "{HOST}:{app}"}},'
        f' "outbound": {{"listen": []}}, "admin": {{"listen": ["{HOST}:{admin}"]}}, "log":'
        f' {{"level": "error"}}, "fast_path": {str(fast).lower()}}}'
    )
    with program(
        "proxy.cli", "run", "--config", str(folder / "isthmus.yaml"), port=admin
    ) as process:
        yield Flooded(process, port, admin, 0)


def send1(sock: socket.socket, size: int, watch: Callable[[], None]) -> bytes:
    sock.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
    for _ in range(size // MIB):
        sock.sendall(PIECE)
        watch()
    return sock.recv(65536).partition(b"\r\n\r\n")[2]


def send2(sock: socket.socket, size: int, watch: Callable[[], None]) -> bytes:
    """Sixteen frames at a time, as the windows let them."""
    sock.sendall(PREFACE + settings() + headers(1, POST, END_HEADERS))
    frames, left = Frames(sock), size
    frames.credit[0] = 65535
    pieces = data(1, bytes(FRAME)) * 16
    while left:
        while min(frames.credit) < 16 * FRAME:
            assert frames.read()
        sock.sendall(pieces)
        left -= 16 * FRAME
        frames.credit = [credit - 16 * FRAME for credit in frames.credit]
        watch()
    sock.sendall(frame(Kind.DATA, END_STREAM, 1, b""))
    while not frames.ended and frames.read():
        pass
    return frames.last


VERSIONS: dict[
    str,
    tuple[
        Callable[[socket.socket], None], Callable[[socket.socket, int, Callable[[], None]], bytes]
    ],
] = {
    "HTTP/1": (take1, send1),
    "HTTP/2": (take2, send2),
}


@pytest.mark.parametrize(
    ("version", "fast", "size"),
    [
        ("HTTP/1", True, LONG),
        ("HTTP/1", False, SHORT),
        ("HTTP/2", True, SHORT),
        ("HTTP/2", False, LONG),
    ],
    ids=[
        "HTTP/1, fast path",
        "HTTP/1, ordinary path",
        "HTTP/2, fast path",
        "HTTP/2, ordinary path",
    ],
)
def test_a_large_upload_arrives_in_bounded_memory(
    tmp_path: Path, version: str, fast: bool, size: int
) -> None:
    take, send = VERSIONS[version]
    server = Server(take)
    with (
        proxied(tmp_path, server.port, fast=fast) as proxy,
        socket.create_connection((HOST, proxy.port)) as sock,
    ):
        sock.settimeout(PATIENCE)
        before, most, next_look = proxy.resident(), 0, 0.0

        def watch() -> None:
            nonlocal most, next_look
            if time.monotonic() >= next_look:
                most, next_look = max(most, proxy.resident()), time.monotonic() + 0.05

        assert send(sock, size, watch) == b"%d" % size
        assert 0 < most - before < 24 * MIB
    server.close()
