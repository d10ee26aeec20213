"""Whole proxies in this process, each with an identity of its own, and applications behind them: on
loopback, with real sockets.

The kernel chooses the ports. So a configuration that refers to a proxy is written when that proxy
runs: servers first, clients last."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import trio

from proxy.app import App
from proxy.config.load import load
from proxy.identity.issue import WORKLOAD_LIFETIME, issue, make_root
from proxy.identity.spiffe import SpiffeId
from proxy.telemetry.metrics import Metrics

HOST = "127.0.0.1"
Application = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def application(serve: Application, host: str = HOST) -> AsyncIterator[int]:
    """A TCP server; yields its port."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host=host)
        await nursery.start(trio.serve_listeners, serve, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def mirror(stream: trio.SocketStream) -> None:
    """An HTTP/1 server that answers each request, which has no body, with the head that it got."""
    data = b""
    async for piece in stream:
        data += piece
        while b"\r\n\r\n" in data:
            head, _, data = data.partition(b"\r\n\r\n")
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(head), head)
            )


@dataclass
class Fleet:
    """Proxies of one trust domain, whose files are in `folder`. `watching`: further settings of the
    section `directory`. `lifetimes`: of certificates, by name, if they are not the usual ones."""

    folder: Path
    root: Any = field(default_factory=lambda: make_root("cluster.local"))
    watching: dict[str, Any] = field(default_factory=dict)
    lifetimes: dict[str, timedelta] = field(default_factory=dict)

    @staticmethod
    def identity(name: str) -> str:
        return str(SpiffeId("cluster.local", "default", name))

    def material(self, name: str) -> dict[str, Any]:
        """Settings for the identity of `name`."""
        who = SpiffeId.parse(self.identity(name))
        leaf = issue(self.root, who, self.lifetimes.get(name, WORKLOAD_LIFETIME))
        place = self.folder / name
        place.mkdir(exist_ok=True)
        for kind, pem in (
            ("certificate", leaf.certificate_pem),
            ("key", leaf.key_pem),
            ("roots", self.root.certificate_pem),
        ):
            (place / f"{kind}.pem").write_bytes(pem)
            (place / f"{kind}.pem").chmod(0o600)
        return {
            "certificate": str(place / "certificate.pem"),
            "key": str(place / "key.pem"),
            "roots": [str(place / "roots.pem")],
            "settle": "0s",  # files are written as a whole here
        }

    def direct(self, directory: dict[str, Any], name: str) -> None:
        """Write, or replace, the directory of `name`."""
        place = self.folder / name
        place.mkdir(exist_ok=True)
        (place / "new.yaml").write_text(json.dumps(directory))
        (place / "new.yaml").rename(place / "directory.yaml")

    @asynccontextmanager
    async def running(
        self, name: str, directory: dict[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[App]:
        """A proxy with these settings. Listeners that are not named are off."""
        async with self.running_from(self.configure(name, directory, **settings)) as app:
            yield app

    @asynccontextmanager
    async def running_from(self, file: Path) -> AsyncIterator[App]:
        """A proxy with the settings in this file."""
        app = App(load(file, {}), Metrics())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.run)
            yield app
            nursery.cancel_scope.cancel()

    def configure(
        self, name: str, directory: dict[str, Any] | None = None, **settings: Any
    ) -> Path:
        """The same as a file."""
        document: dict[str, Any] = {
            "outbound": {"listen": []},
            "inbound": {"listen": []},
            "admin": {"listen": []},
            "identity": self.material(name),
            "pod": {"name": name},
        }
        if directory is not None:
            self.direct(directory, name)
            file = str(self.folder / name / "directory.yaml")
            document["directory"] = {
                "file": file,
                "poll_interval": "100ms",
                "settle": "0s",
                **self.watching,
            }
        for section, values in settings.items():
            document[section] = (
                {**document.get(section, {}), **values} if isinstance(values, dict) else values
            )
        path = self.folder / name / "isthmus.yaml"
        path.write_text(json.dumps(document))
        return path

    def tls(
        self, me: str, them: str, *, roots: Fleet | None = None, alpn: str = "http/1.1"
    ) -> tuple[ssl.SSLContext, str]:
        """A context with which `me` opens mutual TLS to `them`, and the server's name. `roots`: the
        roots that it trusts, if not its own."""
        paths = self.material(me)
        context = ssl.create_default_context(cadata=(roots or self).root.certificate_pem.decode())
        context.check_hostname = False  # the mesh's names are URIs, which ssl does not compare
        context.load_cert_chain(paths["certificate"], paths["key"])
        context.set_alpn_protocols([alpn])
        return context, SpiffeId.parse(self.identity(them)).sni

    async def meet(
        self, app: App, me: str, them: str, *, roots: Fleet | None = None, alpn: str = "http/1.1"
    ) -> trio.SSLStream[trio.SocketStream]:
        """A connection by mutual TLS, as `me`, to the inbound side of `app`, which is `them`. The
        test decides what the peer sends. `roots`: the roots that it trusts, if not its own."""
        context, name = self.tls(me, them, roots=roots, alpn=alpn)
        raw = await trio.open_tcp_stream(HOST, inbound_port(app))
        stream = trio.SSLStream(raw, context, server_hostname=name, https_compatible=True)
        await stream.do_handshake()
        return stream


def inbound_port(app: App) -> int:
    """The port of a sidecar's inbound side, or of a gateway."""
    port: int = app.listeners.inbound[0].getsockname()[1]
    return port


def outbound_port(app: App) -> int:
    port: int = app.listeners.outbound[0].getsockname()[1]
    return port
