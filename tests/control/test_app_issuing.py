"""The control plane process with an issuer: it makes its own certificate, and a proxy that knows only
the trust roots and has a token gets what it needs to connect to the directory."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import trio

from control.app import ChannelConfig, Control, ControlConfig, IssuingConfig
from control.kube.client import Client
from control.metrics import Metrics, Parts
from lab.kube_api.server import ApiServer
from proxy.directory.channel.messages import ALPN
from proxy.identity.identity import Identity
from proxy.net.accept import bind
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.tls.handshake import TLSOffer, tls_client
from tests.control.conftest import AT
from tests.control.records import ONE, store
from tests.kit.channel import until
from tests.kit.issuing import CONTROL, DOMAIN, LOOPBACK, WEB, Issuing, write_issuer


class Replica:
    """A replica whose issuer is in the folder of `issuing`."""

    def __init__(self, issuing: Issuing, server: ApiServer) -> None:
        issuer = IssuingConfig(issuing.directory, (issuing.roots,))
        config = ControlConfig(DOMAIN, "isthmus", "a", None, ChannelConfig(None), issuer)
        self.control = Control(config, Client(AT, dial=server.dial))
        self.listeners = [bind(Address(LOOPBACK, 0)) for _ in range(2)]
        self.channel, issuing.port = (sock.getsockname()[1] for sock in self.listeners)
        self.ended = trio.Event()

    async def run(self) -> None:
        await self.control.run([], self.listeners[:1], self.listeners[1:])
        self.ended.set()

    def metrics(self) -> str:
        control = self.control
        parts = Parts(
            control.discovery, control.election, control.recorder, control.client,
            control.channel, control.issuing,
        )  # fmt: skip
        return Metrics(parts).render().decode()


@pytest.fixture
def issuing(tmp_path: Path, server: ApiServer) -> Issuing:
    store(server, *ONE)
    return Issuing(tmp_path, server)


async def test_a_proxy_gets_a_certificate_and_connects_to_the_directory_with_it(
    issuing: Issuing, server: ApiServer, nursery: trio.Nursery
) -> None:
    replica = Replica(issuing, server)
    nursery.start_soon(replica.run)
    token = issuing.folder / "token"
    token.write_text(issuing.account_token())
    await until(lambda: replica.control.not_ready() == "", "it is ready")
    own = replica.control.identity
    assert own is not None
    assert own.id == CONTROL
    identity = Identity(None)
    identity.use(await issuing.proxy(token).enroll())
    assert identity.id == WEB
    stream = await tls_client(
        await Dialer().dial(Address(LOOPBACK, replica.channel)),
        identity.client_context,
        TLSOffer(CONTROL.sni, (ALPN,)),
        verify=lambda chain: identity.verify_chain(chain, CONTROL),
        timeout=10.0,
    )
    assert stream.info.alpn == ALPN
    stream.close()
    text = replica.metrics()
    assert "isthmus_control_certificates_issued_total 1.0" in text
    expiry = re.search(r"(?m)^isthmus_control_issuer_expiry_timestamp_seconds (\S+)", text)
    assert expiry is not None
    assert float(expiry[1]) == issuing.root.certificate.not_valid_after_utc.timestamp()
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.fail_after(10):
        await replica.ended.wait()


async def test_without_an_issuer_it_is_not_ready_until_there_is_one(
    issuing: Issuing, server: ApiServer, nursery: trio.Nursery
) -> None:
    (issuing.directory / "tls.crt").unlink()
    replica = Replica(issuing, server)
    nursery.start_soon(replica.run)
    reason = "no own certificate: "
    await until(lambda: replica.control.not_ready().startswith(reason), "it says why")
    assert "tls.crt" in replica.control.not_ready()
    assert "isthmus_control_issuer_expiry_timestamp_seconds 0.0" in replica.metrics()
    write_issuer(issuing.directory, issuing.root)
    assert replica.control.issuing is not None
    replica.control.issuing.authority.issuer.read()
    await until(lambda: replica.control.not_ready() == "", "it is ready")
    os.kill(os.getpid(), signal.SIGTERM)
    with trio.fail_after(10):
        await replica.ended.wait()
