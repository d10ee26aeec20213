"""The conformance suite h2spec against a small server with our engine, on the loopback interface.

It runs when there is an h2spec: in PATH, or named by ISTHMUS_TEST_H2SPEC. All of its cases must
pass. Some cases of RFC 7540 are optional in RFC 9113 (a stream that depends on itself); the engine
follows RFC 7540 there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

import pytest
import trio

from proxy.net.socket_stream import SocketStream
from tests.kit.http2 import Server

H2SPEC = os.environ.get("ISTHMUS_TEST_H2SPEC") or shutil.which("h2spec")


async def serve(listener: trio.SocketListener) -> None:
    async with listener, trio.open_nursery() as nursery:
        while True:
            accepted = await listener.accept()
            sock = socket.socket(fileno=accepted.socket.detach())
            sock.setblocking(False)
            nursery.start_soon(Server(SocketStream(sock)).serve)


@pytest.mark.skipif(H2SPEC is None, reason="no h2spec in PATH, nor named by ISTHMUS_TEST_H2SPEC")
async def test_h2spec_finds_nothing_wrong() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = str(listener.socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, listener)
        command = [
            str(H2SPEC),
            "generic",
            "http2",
            "hpack",
            "--strict",
            "-h",
            "127.0.0.1",
            "-p",
            port,
            "-o",
            "1",
        ]
        with trio.fail_after(60):
            done = await trio.run_process(
                command, capture_stdout=True, stderr=subprocess.STDOUT, check=False
            )
        nursery.cancel_scope.cancel()
    report = done.stdout.decode()
    assert done.returncode == 0, report
    assert ", 0 skipped, 0 failed" in report, report
