"""Checks that the directory's endpoints and the gateways of other clusters are reachable and have
the right identity.

A meshed endpoint must complete a mutual TLS handshake with our certificate and present the identity
that the directory expects. Then the connection ends, before any application data. An unmeshed
endpoint must accept a TCP connection.

These connections must bypass the redirection like the proxy's own, otherwise our own proxy would
answer in place of the peer. The packet filter recognises the proxy's connections by their owner or
their mark, so the check uses the same user or the same mark.
"""

import dataclasses
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import trio

from proxy.commands.checks import Result
from proxy.config.schema import Config
from proxy.directory import Directory, Endpoint
from proxy.identity.identity import ALPN_HTTP1, Identity, PeerRefused, SpiffeId
from proxy.net.dial import Dialer
from proxy.net.exceptions import ConnectFailed, ConnectionLost, TLSFailed
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSOffer, tls_client

# Enough to test the mesh. A directory may hold thousands of endpoints, and each handshake costs the
# endpoint.
MAX_PEERS = 50
_AT_ONCE = 10

_NAME = "peers"


@dataclass(frozen=True, slots=True)
class PeerCheck:
    """How to try one endpoint."""

    dialer: Dialer
    identity: Identity | None
    timeout: float

    async def run(self, endpoint: Endpoint) -> Result:
        who = f"{endpoint.address} ({endpoint.identity or 'not meshed'})"
        try:
            with trio.fail_after(self.timeout):
                stream = await self.dialer.dial(endpoint.address)
                with closing(stream):
                    return await self._talk(stream, endpoint, who)
        except trio.TooSlowError:
            return Result(
                _NAME,
                "failed",
                f"{who}: not done within {self.timeout:g} s",
                "is the peer overloaded?",
            )
        except ConnectFailed as error:
            remedy = (
                "is the endpoint up, is the directory's address right, does a network policy"
                " forbid it?"
            )
            return Result(_NAME, "failed", f"{who}: {error}", remedy)

    async def _talk(self, stream: SocketStream, endpoint: Endpoint, who: str) -> Result:
        expected = endpoint.identity
        if expected is None:
            return Result(_NAME, "ok", f"{who}: accepts connections")
        if self.identity is None:
            return Result(
                _NAME, "skipped", f"{who}: it cannot be tried without a certificate for this pod"
            )
        try:
            return await self._shake_hands(stream, self.identity, expected, who)
        except PeerRefused as error:
            remedy = (
                "the directory and the peer's certificate disagree on the identity: fix the"
                " wrong one"
            )
            return Result(_NAME, "failed", f"{who}: {error}", remedy)
        except (TLSFailed, ConnectionLost) as error:
            return Result(_NAME, "failed", f"{who}: {error}", _remedy(error))

    async def _shake_hands(
        self, stream: SocketStream, identity: Identity, expected: SpiffeId, who: str
    ) -> Result:
        offer = TLSOffer(server_name=expected.sni, alpn=(ALPN_HTTP1,))
        verify = partial(identity.verify_chain, expected=expected)
        tls = await tls_client(
            stream, identity.client_context, offer, verify=verify, timeout=self.timeout
        )
        # In TLS 1.3 the server verifies our certificate after our side of the handshake is done. So
        # close our direction and read: a rejection comes as an alert, acceptance as the end of the
        # stream.
        await tls.send_eof()
        try:
            await tls.receive_some(1)
        except ConnectionLost:
            pass  # the peer closed in another way, but did not reject us
        finally:
            tls.close()
        return Result(_NAME, "ok", f"{who}: mutual TLS, {tls.info.version}, {tls.info.group}")


def _remedy(error: TLSFailed | ConnectionLost) -> str:
    if isinstance(error, ConnectionLost):
        return "the server there does not complete TLS: is it the proxy's inbound port?"
    return {
        "certificate": (
            "both sides need each other's trust root: compare with `isthmus identity show`"
        ),
        "alert": (
            "the peer rejects our certificate: is our trust root among its roots, is its clock"
            " correct?"
        ),
        "protocol": (
            "the server there does not use the mesh's TLS: is the pod meshed, is its redirection"
            " installed?"
        ),
        "timeout": "is the peer overloaded?",
    }[error.kind]


async def check_peers(
    config: Config, identity: Identity | None, directory: Directory, limit: int, timeout: float
) -> list[Result]:
    """Try up to `limit` endpoints, `_AT_ONCE` at a time, each for at most `timeout` seconds."""
    endpoints = [endpoint for endpoint in _endpoints(directory) if not _is_own(endpoint, identity)]
    if not endpoints:
        return [
            Result(_NAME, "skipped", "the directory has no ready endpoint except this pod's own")
        ]
    results: list[Result | None] = [None] * min(limit, len(endpoints))
    slots = trio.CapacityLimiter(_AT_ONCE)
    with _as_the_proxy(config) as (dialer, unproven):
        check = PeerCheck(dialer, identity, timeout)

        async def one(index: int) -> None:
            async with slots:
                results[index] = await check.run(endpoints[index])

        async with trio.open_nursery() as nursery:
            for index in range(len(results)):
                nursery.start_soon(one, index)
    found = [result for result in results if result is not None]
    if len(endpoints) > limit:
        found.append(
            Result(
                _NAME,
                "skipped",
                f"{len(endpoints) - limit} more endpoints were not tried",
                "raise --max-peers",
            )
        )
    if unproven:
        found.append(Result(_NAME, "warning", unproven, "run it as root or as the proxy's user"))
    return found


def _endpoints(directory: Directory) -> list[Endpoint]:
    """Gateways of other clusters that have an address (not those with a DNS name), then each ready
    endpoint once, in the directory's order.
    """
    ways = (
        gateway
        for cluster in directory.clusters.values()
        for gateway in cluster.gateways
        if gateway.literal
    )
    found = {
        endpoint.address: endpoint for endpoint in (gateway.at(gateway.host) for gateway in ways)
    }
    targets = [target for service in directory.services for target in service.targets.values()]
    found |= {
        endpoint.address: endpoint
        for target in targets
        for endpoint in target.endpoints
        if endpoint.ready
    }
    return list(found.values())


def _is_own(endpoint: Endpoint, identity: Identity | None) -> bool:
    """Whether this is our own endpoint. Traffic inside a pod is not redirected, so it answers
    without TLS and proves nothing.
    """
    if identity is None or endpoint.identity != identity.id:
        return False
    family = socket.AF_INET6 if ":" in endpoint.address.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((endpoint.address.host, 0))
    except OSError:
        return False
    return True


@contextmanager
def _as_the_proxy(config: Config) -> Iterator[tuple[Dialer, str]]:
    """A dialer whose connections are not redirected; and "", or why this is not possible.

    Root changes to the proxy's user while the block runs, because the packet filter checks the
    owner of a socket. This command does nothing else at the same time, so changing the process's
    user for a moment is safe.
    """
    dialer = Dialer(timeout=config.tcp.connect_timeout)
    if config.mark is not None:
        if _may_mark(config.mark):
            yield dataclasses.replace(dialer, mark=config.mark), ""
        else:
            yield (
                dialer,
                (
                    "packets cannot be marked (needs CAP_NET_ADMIN), so this pod's own proxy may"
                    " have answered for peers"
                ),
            )
        return
    before = os.geteuid()
    if not _switch_user(config.intercept.uid):
        yield (
            dialer,
            (
                f"cannot run as user {config.intercept.uid}, so this pod's own proxy may have"
                " answered for peers"
            ),
        )
        return
    try:
        yield dialer, ""
    finally:
        os.seteuid(before)


def _may_mark(mark: int) -> bool:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    except OSError:
        return False
    return True


def _switch_user(uid: int) -> bool:
    try:
        os.seteuid(uid)
    except OSError:
        return False
    return True
