"""A peer that presents an authority's certificate, to each of the flows: it is not accepted as a
workload (X.509-SVID, section 5.2).

The table of all deviations is in tests/identity/test_certificate_verdicts.py. Tested here: the
flows apply it, and the errors on both sides."""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509

from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, inbound_port, outbound_port
from tests.kit.chains import Made, Profile, authority, make
from tests.kit.clusters import LISTEN
from tests.kit.http import connect, until

WORDS = "the peer's certificate is an authority's (CA), not a workload's"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def shown(folder: Path, who: str) -> tuple[Path, Made]:
    """A file with an authority's certificate that names a workload, and its key; and the root that
    has signed it."""
    name = x509.UniformResourceIdentifier(Fleet.identity(who))
    usage = frozenset({"digital_signature", "key_cert_sign"})
    root, leaf = make([authority("root"), Profile(ca=True, usage=usage, names=(name,))])
    file = folder / "authority.pem"
    file.write_bytes(leaf.key_pem + leaf.pem)
    return file, root


@dataclass
class Trusting(Fleet):
    """Proxies that trust another root beside their own."""

    other: bytes = b""

    def material(self, name: str) -> dict[str, Any]:
        paths = super().material(name)
        with Path(paths["roots"][0]).open("ab") as file:
            file.write(self.other)
        return paths


async def refused(app: App, file: Path) -> ssl.SSLError:
    """The error of a client that presents the file."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(file)
    context.set_alpn_protocols(["http/1.1"])
    raw = await trio.open_tcp_stream(HOST, inbound_port(app))
    stream = trio.SSLStream(
        raw, context, server_hostname="server.default.sa.cluster.local", https_compatible=True
    )
    await stream.do_handshake()
    with pytest.raises(trio.BrokenResourceError) as caught:
        await stream.receive_some()  # in TLS 1.3 a client gets the refusal only here
    await trio.aclose_forcefully(stream)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    return caught.value.__cause__


@pytest.mark.parametrize("side", ["inbound", "gateway"])
async def test_a_peer_that_is_not_a_client(
    tmp_path: Path, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "isthmus.connection")
    file, root = shown(tmp_path, "mallory")
    fleet = Trusting(tmp_path, other=root.pem)
    settings = (
        {"gateway": {**LISTEN, "enabled": True}}
        if side == "gateway"
        else {"inbound": {**LISTEN, "fixed_destination": f"{HOST}:9"}}
    )
    directory = {"cluster": "east", "services": []} if side == "gateway" else None
    async with fleet.running("server", directory, **settings) as app:
        error = await refused(app, file)
        assert "BAD_CERTIFICATE" in str(error)
        await until(lambda: bool(caplog.records))
        assert (
            f'isthmus_tls_failures_total{{direction="{side}",kind="certificate"}} 1.0'.encode()
            in app.render()
        )
    assert WORDS in caplog.records[-1].__dict__["line"].words


async def test_a_peer_that_is_not_a_server(tmp_path: Path) -> None:
    file, root = shown(tmp_path, "server")
    fleet = Trusting(tmp_path, other=root.pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    context.set_alpn_protocols(["http/1.1"])
    told: list[str] = []

    async def serve(raw: trio.SocketStream) -> None:
        stream = trio.SSLStream(raw, context, server_side=True, https_compatible=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            told.append(str(error.__cause__))
        with suppress(trio.BrokenResourceError):
            await trio.aclose_forcefully(stream)

    async with application(serve) as port:
        endpoint = {"address": HOST, "identity": fleet.identity("server"), "ports": {"80": port}}
        service = {
            "name": "c",
            "addresses": ["192.0.2.7"],
            "ports": [{"port": 80}],
            "endpoints": [endpoint],
        }
        outbound = {**LISTEN, "fixed_destination": "192.0.2.7:80"}
        async with fleet.running(
            "near", {"cluster": "west", "services": [service]}, outbound=outbound
        ) as near:
            peer = await connect(Address(HOST, outbound_port(near)))
            await peer.send(GET)
            answer = await peer.response()
            peer.close()
    assert answer.status == 502
    assert b"error=tls_certificate_error" in (answer.get(b"proxy-status") or b"")
    assert WORDS.encode() in answer.body
    assert "BAD_CERTIFICATE" in told[0]
