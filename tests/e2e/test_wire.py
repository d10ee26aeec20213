"""What an observer between the pods can see, and TLS that belongs to the application.

Rules: a capture on the pod's link has every frame that leaves or reaches the pod. The same capture
must also see a clear-text control. Otherwise it proves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.capture import Capture
from lab.process import Completed
from tests.e2e.conftest import Laboratory
from tests.e2e.stage import (
    ECHO,
    MAIL,
    SOCKET,
    WEB,
    Pair,
    client,
    counted,
    curl,
    echo_server,
    eventually,
    prepare,
    serve,
    web_server,
)
from tests.kit.library import AWS_LC

pytestmark = pytest.mark.lab

SECRET, CONTROL = "the-password-is-tangerine", "seen-by-everybody"
PLAIN, HTTPS = 8081, 8443

HTTPS_SERVER = """
import http.server, socket, ssl, sys
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"the application's own TLS: " + self.connection.version().encode())
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("own.pem", "own.key")
server = Server(("::", int(sys.argv[1])), Handler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def pair(laboratory: Laboratory) -> Pair:
    async def build() -> Pair:
        skip = {"skip_inbound_ports": [PLAIN], "skip_outbound_ports": [PLAIN]}
        ports = {WEB: "detect", SOCKET: "detect", MAIL: "opaque", ECHO: "opaque", HTTPS: "detect"}
        pair = prepare(laboratory.lab, ports, web={"intercept": skip}, shop={"intercept": skip})
        pair.cluster.pod("stranger")
        await own_certificate(pair)
        await web_server(pair.shop)
        await web_server(pair.shop, PLAIN)
        await serve(pair.shop, "chat", str(SOCKET), port=SOCKET)
        await serve(pair.shop, "mail", str(MAIL), port=MAIL)
        await echo_server(pair.shop)
        await pair.shop.python("https", HTTPS_SERVER, str(HTTPS), port=HTTPS)
        await pair.mesh.start()
        return pair

    return laboratory.run(build)


async def own_certificate(pair: Pair) -> None:
    """The application's own certificate: made by openssl, for the name `own.example`, and unrelated
    to the mesh."""
    request = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=own.example",
    ]
    files = ["-addext", "subjectAltName=DNS:own.example", "-keyout", "own.key", "-out", "own.pem"]
    done: Completed = await pair.shop.run([*request, *files])
    assert done.ok, done.stderr.decode()


async def talk(pair: Pair, version: int) -> None:
    """Traffic of each kind, with the secret in it, to the service's address; and the control
    outside of the mesh."""
    address = pair.service.address(version)
    host, plain = (
        (f"[{address}]", f"[{pair.shop.ipv6}]") if version == 6 else (address, pair.shop.ipv4)
    )
    for _ in range(3):
        seen = await curl(pair.web, "-H", f"X-Secret: {SECRET}", f"http://{host}:{WEB}/")
        assert SECRET.encode() in seen.body
    assert (await client(pair.web, "websocket", host, str(SOCKET), SECRET))["echoed"] == 50
    assert (await client(pair.web, "mail", address, str(MAIL), SECRET))["refused"] == 0
    stream = await pair.web.connect(address, ECHO)
    async with stream:
        await stream.send_all(SECRET.encode())
        assert await stream.receive_some() == SECRET.encode()
    assert (
        await curl(pair.web, "-H", f"X-Secret: {CONTROL}", f"http://{plain}:{PLAIN}/")
    ).status == 200


async def test_a_listener_on_the_link_sees_tls_1_3_and_nothing_else(pair: Pair) -> None:
    await pair.near.restart()  # the capture would lack the start of connections in its pool
    async with Capture(pair.web) as wire:
        for version in (4, 6):
            await talk(pair, version)
    verdict = wire.verdict(WEB, SOCKET, MAIL, ECHO)
    assert verdict.ok, verdict.problems
    assert verdict.flows >= 7
    assert {fact.version for fact in verdict.facts} == {"TLSv1.3"}
    assert {fact.key_shares for fact in verdict.facts} == {2 if AWS_LC else 1}, (
        "AWS-LC cannot be configured"
    )
    groups = {fact.group for fact in verdict.facts}
    assert "X25519MLKEM768" in groups
    assert all("MLKEM768" in group for group in groups), groups
    assert {fact.server_name for fact in verdict.facts} == {
        pair.far.identity.sni if pair.far.identity else ""
    }
    assert wire.contains(CONTROL.encode())
    assert not wire.contains(SECRET.encode())
    assert not any(flow.carries(b"HTTP/1.1") for flow in wire.flows(WEB))


async def test_metrics_and_log_say_the_same(pair: Pair) -> None:
    for version in (4, 6):
        await talk(pair, version)
    for sidecar, side in ((pair.near, "client"), (pair.far, "server")):
        good = await counted(sidecar, "isthmus_tls_handshakes_total", side=side, result="ok")
        assert good >= 4
        assert (
            await counted(
                sidecar, "isthmus_tls_handshakes_total", side=side, result="ok", version="TLSv1.3"
            )
            == good
        )
        assert (
            await counted(sidecar, "isthmus_tls_handshakes_total", group="X25519MLKEM768") == good
        )
        assert await counted(sidecar, "isthmus_tls_failures_total") == 0
    stranger = pair.cluster.pods["stranger"]
    lines = [
        line
        for line in pair.far.logged()
        if line.get("message") == "connection"
        and line.get("tls")
        and not line["peer"].startswith(stranger.ipv4)
    ]
    assert {(line["identity"], line["group"]) for line in lines} == {
        (str(pair.near.identity), "X25519MLKEM768")
    }


async def test_sessions_are_resumed(pair: Pair) -> None:
    for _ in range(5):
        stream = await pair.web.connect(pair.service.ipv4, ECHO)
        async with stream:
            await stream.send_all(b"\0data")  # starts no request, so that it is forwarded at once
            assert await stream.receive_some() == b"\0data"
    await eventually(
        lambda: counted(pair.far, "isthmus_tls_handshakes_total", resumed="true"),
        "a resumed session",
    )


@pytest.mark.real
async def test_the_applications_own_tls_passes_through_untouched(pair: Pair) -> None:
    """curl accepts only the certificate of `own.example`, whose key no proxy has. In the mesh its
    TLS is inside the mesh's."""
    authority = str(Path(pair.shop.directory) / "own.pem")
    args = (
        "--cacert",
        authority,
        "--resolve",
        f"own.example:{HTTPS}:{pair.service.ipv4}",
        f"https://own.example:{HTTPS}/",
    )
    async with Capture(pair.web) as wire:
        seen = await curl(pair.web, *args)
    assert seen.body.startswith(b"the application's own TLS: TLSv1.3"), seen.errors
    assert {fact.server_name for fact in wire.verdict(HTTPS).facts} == {
        pair.far.identity.sni if pair.far.identity else ""
    }
    assert await counted(pair.near, "isthmus_detections_total", result="tls") >= 1


@pytest.mark.real
async def test_the_applications_own_tls_from_outside_the_mesh_passes_through_untouched(
    pair: Pair,
) -> None:
    stranger = pair.cluster.pods["stranger"]
    authority = str(Path(pair.shop.directory) / "own.pem")
    before = await counted(
        pair.far, "isthmus_connections_opened_total", direction="inbound", tls="passthrough"
    )
    args = (
        "--cacert",
        authority,
        "--resolve",
        f"own.example:{HTTPS}:{pair.shop.ipv4}",
        f"https://own.example:{HTTPS}/",
    )
    async with Capture(stranger) as wire:
        seen = await curl(stranger, *args)
    assert seen.body.startswith(b"the application's own TLS: TLSv1.3"), seen.errors
    assert {fact.server_name for fact in wire.verdict(HTTPS).facts} == {"own.example"}
    after = await counted(
        pair.far, "isthmus_connections_opened_total", direction="inbound", tls="passthrough"
    )
    assert after == before + 1
