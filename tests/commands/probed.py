"""What `isthmus check` finds: configurations, a proxy's admin port and TLS servers on loopback."""

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from proxy import directory
from proxy.commands.checks import Result, check_configuration
from proxy.config.schema import Config
from proxy.identity.spiffe import SpiffeId
from proxy.net.accept import bind
from proxy.net.address import Address
from proxy.net.exceptions import NetError
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import tls_server
from tests.kit.workloads import DOMAIN, Workload

LOOPBACK = Address("127.0.0.1", 0)
Handler = Callable[[SocketStream], Awaitable[None]]


def mapped(uid: int) -> bool:
    """Whether this user namespace has the user: a namespace of an ordinary user has only root."""
    ranges = [
        tuple(map(int, line.split()))
        for line in Path("/proc/self/uid_map").read_text().splitlines()
    ]
    return any(first <= uid < first + count for first, _, count in ranges)


def configuration(tmp_path: Path, **sections: Any) -> Config:
    """A configuration as the proxy reads it: JSON is YAML too."""
    path = tmp_path / "config.yaml"
    # Without the proxy's user, packets are marked, as in the pods of such a sandbox.
    exempt = {} if mapped(2102) else {"mark": 0x2102}
    quiet = {
        **exempt,
        "trust_domain": DOMAIN,
        "outbound": {"listen": []},
        "inbound": {"listen": []},
        "admin": {"listen": []},
        # Root can become the proxy's user. An ordinary user already is the proxy's user here.
        "intercept": {"uid": os.geteuid() or 2102},
    }
    path.write_text(json.dumps({**quiet, **sections}))
    results, config = check_configuration(path, {})
    assert config is not None, results
    return config


def identity_section(workload: Workload) -> dict[str, Any]:
    names = workload.files
    return {
        "certificate": str(names.certificate),
        "key": str(names.key),
        "roots": [str(path) for path in names.roots],
    }


def statuses(results: Iterable[Result]) -> list[str]:
    return [result.status for result in results]


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root becomes user 1 while the block runs. An ordinary user stays as it is."""
    before = os.geteuid()
    if mapped(1):
        os.seteuid(before or 1)
    try:
        yield
    finally:
        os.seteuid(before)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Address]:
    """A listener on loopback. The handler gets each connection as a stream of proxy.net. Yields its
    address."""
    with bind(LOOPBACK) as listener:
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    nursery.start_soon(answer, SocketStream(listener.accept()[0]))

            async def answer(stream: SocketStream) -> None:
                async with stream:
                    await handler(stream)

            nursery.start_soon(accept)
            yield Address.of(listener.getsockname())
            nursery.cancel_scope.cancel()


def meshed(workload: Workload, seen: list[Any]) -> Handler:
    """What the inbound side of a peer's proxy does with a connection that ends before its first
    request."""

    identity = workload.identity()

    async def handler(stream: SocketStream) -> None:
        try:
            tls = await tls_server(
                stream, identity.server_context, verify=identity.verify_chain, timeout=30
            )
            seen.append((tls.info.peer_identity, await tls.receive_some(100)))
            await tls.aclose()
        except NetError as error:
            seen.append((type(error).__name__, str(error)))

    return handler


def admin(
    answers: Mapping[str, tuple[int, str | Callable[[], str]]], *, date: str | None = None
) -> Handler:
    """An admin port. `answers` maps a path to (status, body). The body may be a function that is
    called for each request."""

    async def handler(stream: SocketStream) -> None:
        head = await stream.receive_some(4096)
        status, body = answers.get(head.split()[1].decode(), (404, ""))
        content = (body() if callable(body) else body).encode()
        fields = [
            f"Content-Length: {len(content)}",
            "Connection: close",
            *([f"Date: {date}"] if date else []),
        ]
        await stream.send_all(
            "\r\n".join([f"HTTP/1.1 {status} Whatever", *fields, "", ""]).encode() + content
        )

    return handler


def snapshot(*endpoints: tuple[Address, SpiffeId | None]) -> directory.Directory:
    """A directory of one service for each (address, identity)."""
    services = [
        {
            "name": f"s{number}",
            "ports": [{"port": address.port}],
            "endpoints": [
                {"address": address.host, **({"identity": str(identity)} if identity else {})}
            ],
        }
        for number, (address, identity) in enumerate(endpoints)
    ]
    return directory.parse(json.dumps({"services": services}), "directory.yaml")
