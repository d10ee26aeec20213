"""TLSStream against peers that share no code with it: the standard library's ssl, and the openssl
command."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSOffer, tls_client, tls_server
from tests.net.conftest import Mesh, listen, read_all, sockets

BIG = bytes(range(256)) * 4096


@pytest.fixture
def files(mesh: Mesh, tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    return {
        "root": mesh.authority.root.write(tmp_path, "root"),
        "client": mesh.client.write(tmp_path, "client"),
        "server": mesh.server.write(tmp_path, "server"),
    }


def stdlib_context(side: str, files: dict[str, tuple[Path, Path]]) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_verify_locations(files["root"][0])
    made.load_cert_chain(*files[side])
    made.set_alpn_protocols(["h2"])
    return made


def converse(
    sock: socket.socket, context: ssl.SSLContext, *, server_side: bool
) -> tuple[bytes, str | None, str | None]:
    """A blocking peer: read to the end, then send the same back, then end."""
    with sock, context.wrap_socket(sock, server_side=server_side) as tls:
        received = bytearray()
        while data := tls.recv(65536):
            received += data
        tls.sendall(received)
        version, alpn = tls.version(), tls.selected_alpn_protocol()
        tls.unwrap()
        return bytes(received), version, alpn


@pytest.mark.parametrize("ours", ["client", "server"])
async def test_the_standard_library_interoperates(
    mesh: Mesh, files: dict[str, tuple[Path, Path]], ours: str
) -> None:
    near, far = sockets()
    theirs = "server" if ours == "client" else "client"
    context = stdlib_context(theirs, files)
    result: list[tuple[bytes, str | None, str | None]] = []

    async def peer() -> None:
        result.append(
            await trio.to_thread.run_sync(
                partial(converse, far, context, server_side=theirs == "server")
            )
        )

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer)
            stream = SocketStream(near)
            if ours == "client":
                tls = await tls_client(
                    stream, mesh.client_context, TLSOffer("a.b", (b"h2",)), verify=None, timeout=20
                )
            else:
                tls = await tls_server(stream, mesh.server_context, verify=None, timeout=20)
            await tls.send_all(BIG)
            await tls.send_eof()
            assert await read_all(tls) == BIG
            await tls.aclose()
    assert result == [(BIG, "TLSv1.3", "h2")]
    assert tls.info.alpn == b"h2"


def s_client(
    listener: socket.socket, files: dict[str, tuple[Path, Path]], *options: str
) -> list[str]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("the openssl command is not installed")
    return [
        program, "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}",
        "-CAfile", str(files["root"][0]), "-cert", str(files["client"][0]), "-key", str(files["client"][1]), *options,
    ]  # fmt: skip


async def accepted(listener: socket.socket) -> SocketStream:
    listener.setblocking(False)
    await trio.lowlevel.wait_readable(listener)
    return SocketStream(listener.accept()[0])


async def test_key_updates_of_the_peer_are_answered_while_both_directions_are_busy(
    mesh: Mesh, files: dict[str, tuple[Path, Path]]
) -> None:
    """`K` makes openssl s_client update its keys and request an update of ours. Our reader must
    write the response."""
    with listen(buffers=8192) as listener:
        command = s_client(listener, files)
        async with trio.open_nursery() as nursery:
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert process.stdin is not None
            assert process.stdout is not None
            output = bytearray()
            complete = trio.Event()

            async def collect() -> None:
                assert process.stdout is not None
                async for piece in process.stdout:
                    output.extend(piece)
                    if output.count(b"y") >= 2_000_000:
                        complete.set()

            with trio.fail_after(30):
                tls = await tls_server(
                    await accepted(listener), mesh.server_context, verify=None, timeout=20
                )
                nursery.start_soon(
                    tls.send_all, b"y" * 2_000_000
                )  # blocks: s_client's output is not read yet
                await trio.testing.wait_all_tasks_blocked(0.05)
                received = bytearray()
                for number in range(5):
                    await process.stdin.send_all(b"K\n")
                    await trio.sleep(0.02)
                    await process.stdin.send_all(b"line %d\n" % number)
                    if number == 0:
                        nursery.start_soon(collect)
                    while not received.endswith(b"line %d\n" % number):
                        received += await tls.receive_some()
                assert received == b"".join(b"line %d\n" % number for number in range(5))
                await complete.wait()
                await process.stdin.aclose()
                assert await tls.receive_some() == b""
                await tls.aclose()
                await process.wait()
            nursery.cancel_scope.cancel()


async def test_openssl_resumes_a_session_with_us(
    mesh: Mesh, files: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    saved = tmp_path / "session.pem"
    with listen() as listener, trio.fail_after(30):
        for number, option in enumerate(("-sess_out", "-sess_in")):
            command = s_client(listener, files, "-servername", "a.b", option, str(saved))
            process = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            assert process.stdin is not None
            assert process.stdout is not None
            tls = await tls_server(
                await accepted(listener), mesh.server_context, verify=None, timeout=20
            )
            await tls.send_all(b"hello from us")
            output = b""
            while b"hello from us" not in output:  # so it has read the ticket, too
                output += await process.stdout.receive_some()
            await process.stdin.aclose()
            assert await read_all(tls) == b""
            await tls.aclose()
            await process.stdout.aclose()
            await process.wait()
            assert tls.info.resumed is bool(number)
            assert tls.info.sni == "a.b"
