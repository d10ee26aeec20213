"""The directory channel on loopback: a catalog whose entries the test sets, the control plane's end,
proxies' ends, and peers that are neither."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio
from OpenSSL import SSL

from control.channel.server import Announcement, Channel, ChannelLimits
from control.contract import Hint, SpiffeId
from control.discovery.catalog import Catalog, Changes
from control.discovery.entries import EndpointEntry, PortEntry, ServiceEntry
from proxy.config.schema_files import ControlPlaneConfig
from proxy.directory.channel.connector import Connector, Dial
from proxy.directory.channel.messages import (
    ALPN,
    Frames,
    FromControl,
    Hello,
    Ping,
    from_control,
)
from proxy.directory.channel.source import ControlSource
from proxy.directory.former_identities import FormerIdentities
from proxy.identity.identity import Identity, MaterialFiles, TLSSettings
from proxy.identity.issue import Issued, issue, make_root
from proxy.net.accept import Acceptor, Connection, bind
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.exceptions import NetError
from proxy.net.tls.expiry import Expiries
from proxy.net.tls.handshake import TLSOffer, TLSStream, tls_client, tls_server

DOMAIN = "cluster.local"
CONTROL = SpiffeId(DOMAIN, "isthmus", "isthmus-control")
WEB = SpiffeId(DOMAIN, "shop", "web")
LOOPBACK = "127.0.0.1"


class Entries(Catalog):
    """A catalog whose entries the test sets."""

    def __init__(self) -> None:
        super().__init__(DOMAIN)

    def owner(self, address: str) -> ServiceEntry | None:
        return next((s for s in self.services.values() if address in s.addresses), None)

    def listing(self, address: str) -> list[ServiceEntry]:  # type: ignore[override]
        return [
            self.services[key]
            for key in sorted(self.services)
            if any(end.address == address for end in self.services[key].endpoints)
        ]

    def put(self, entry: ServiceEntry) -> Changes:
        self.services[entry.key] = entry
        return Changes({entry.key: entry})

    def remove(self, name: str) -> Changes:
        del self.services["shop", name]
        return Changes({("shop", name): None})


def service(
    name: str, vip: str | None, pods: Iterable[str], port: int = 8080, **more: Any
) -> ServiceEntry:
    """A service of the namespace `shop`; each pod is on a node of its own, and all are meshed."""
    endpoints = tuple(
        EndpointEntry(
            pod,
            WEB,
            frozenset({4191}),
            ((80, port),),
            "ready",
            f"node-{pod.rpartition('.')[2]}",
        )
        for pod in sorted(pods)
    )
    addresses = (vip,) if vip is not None else ()
    ports = (PortEntry(80, 8080, Hint.DETECT),)
    return ServiceEntry(
        ("shop", name), f"uid-{name}", addresses, ports, endpoints, more.get("local", False)
    )


@dataclass
class Workshop:
    """Makes identities, and the two ends. `folder` holds the files."""

    folder: Path
    root: Issued = field(default_factory=lambda: make_root(DOMAIN))
    catalog: Entries = field(default_factory=Entries)
    expiries: Expiries = field(default_factory=lambda: Expiries(10.0, lambda _: None))
    opened: list[TLSStream] = field(default_factory=list)
    _made: int = 0

    def close(self) -> None:
        """Close what `peer` and `anonymous_peer` have opened."""
        for stream in self.opened:
            stream.close()

    def identity(
        self,
        name: SpiffeId,
        *roots: Issued,
        of: Issued | None = None,
        control: bool = False,
        lifetime: timedelta = timedelta(hours=1),
    ) -> Identity:
        """An identity that `of` has issued. It trusts `roots` in addition to its own."""
        self._made += 1
        place = self.folder / f"identity-{self._made}"
        place.mkdir()
        leaf = issue(of or self.root, name, lifetime)
        for kind, pem in (
            ("certificate", leaf.certificate_pem),
            ("key", leaf.key_pem),
            ("roots", b"".join(root.certificate_pem for root in (self.root, *roots))),
        ):
            (place / f"{kind}.pem").write_bytes(pem)
            (place / f"{kind}.pem").chmod(0o600)
        files = MaterialFiles(place / "certificate.pem", place / "key.pem", (place / "roots.pem",))
        settings = (
            TLSSettings(session_lifetime=0.0, protocols=frozenset((ALPN,)))
            if control
            else TLSSettings()
        )
        return Identity(files, settings)

    @asynccontextmanager
    async def control(
        self,
        *roots: Issued,
        port: int = 0,
        host: str = LOOPBACK,
        catalog: Catalog | None = None,
        **limits: Any,
    ) -> AsyncIterator[tuple[Channel, int]]:
        """A replica; yields its port."""
        identity = self.identity(CONTROL, *roots, control=True)
        known = catalog if catalog is not None else self.catalog
        channel = Channel(known, identity, ChannelLimits(**limits), Announcement("replica"))
        listener = bind(Address(host, port))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.serve, [listener])  # noqa: ASYNC113  # the socket listens already
            yield channel, listener.getsockname()[1]
            nursery.cancel_scope.cancel()

    def source(
        self,
        port: int,
        *,
        dial: Dial | None = None,
        identity: Identity | None = None,
        **settings: Any,
    ) -> ControlSource:
        """A proxy's end. It runs when `run` is started."""
        config = ControlPlaneConfig(
            **{
                "address": f"{LOOPBACK}:{port}",
                "identity": str(CONTROL),
                "min_pause": 0.05,
                "max_pause": 0.2,
                **settings,
            }
        )
        return ControlSource(
            config,
            Hello("node-1", "zone-1", "web-0"),
            Connector(identity or self.identity(WEB), dial or Dialer().dial, self.expiries),
            FormerIdentities(600.0, 100),
        )

    async def peer(self, port: int, identity: Identity) -> TLSStream:
        """A connection to the control plane that sends nothing yet."""
        stream = await tls_client(
            await Dialer().dial(Address(LOOPBACK, port)),
            identity.client_context,
            TLSOffer(CONTROL.sni, (ALPN,)),
            verify=None,
            timeout=10.0,
        )
        self.opened.append(stream)
        return stream

    async def anonymous_peer(self, port: int) -> TLSStream:
        """Connect to a replica without a certificate. The caller need not close it."""
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        stream = await tls_client(
            await Dialer().dial(Address(LOOPBACK, port)),
            context,
            TLSOffer(CONTROL.sni, (ALPN,)),
            verify=None,
            timeout=10.0,
        )
        self.opened.append(stream)
        return stream

    @asynccontextmanager
    async def impostor(
        self, serve: Callable[[TLSStream], Awaitable[None]], name: SpiffeId = CONTROL
    ) -> AsyncIterator[int]:
        """A server with a certificate of the mesh that is not the control plane; yields its
        port."""
        identity = self.identity(name, control=True)

        async def accept(connection: Connection) -> None:
            await serve(
                await tls_server(
                    connection.stream, identity.server_context, verify=None, timeout=10.0
                )
            )

        acceptor = Acceptor(accept, limit=10, on_error=lambda *_: None)
        listener = bind(Address(LOOPBACK, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve, [listener])  # noqa: ASYNC113  # the socket listens already
            yield listener.getsockname()[1]
            nursery.cancel_scope.cancel()


async def until(done: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Wait until `done` is true."""
    with trio.move_on_after(timeout):
        while not done():  # noqa: ASYNC110  # it is asked, which is no event
            await trio.sleep(0.01)
        return
    raise AssertionError(f"not within {timeout:g} s: {what}")


async def messages(stream: TLSStream, count: int | None = None) -> list[FromControl]:
    """The next `count` messages except pings; None: all until the connection ends."""
    frames = Frames(1 << 24)
    found: list[FromControl] = []
    with trio.fail_after(20):
        while count is None or len(found) < count:
            try:
                data = await stream.receive_some()
            except NetError:
                data = b""
            if not data:
                assert count is None, found
                return found
            found += [
                m for part in frames.feed(data) if not isinstance(m := from_control(part), Ping)
            ]
    return found
