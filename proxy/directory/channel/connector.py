"""Opens the connections to the control plane: mutual TLS with the identity that is expected.

The addresses behind a name are tried in random order, so the proxies spread over the replicas. A
connection ends with the certificates that it depends on, and when their trust root is removed
(proxy/net/tls/expiry.py). It has no requests to wait for, so it ends at once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from proxy.config.schema_files import ControlPlaneConfig
from proxy.directory.channel.messages import ALPN, ChannelError
from proxy.identity.identity import Identity
from proxy.identity.spiffe import SpiffeId
from proxy.net.address import Address
from proxy.net.exceptions import ConnectionLost, NetError
from proxy.net.resolve import resolve
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.expiry import Expiries
from proxy.net.tls.handshake import TLSOffer, TLSStream, tls_client

Dial = Callable[[Address], Awaitable[SocketStream]]

# Addresses of the control plane's name that one attempt tries.
_TRIED = 3


@dataclass(frozen=True, slots=True)
class Connector:
    """How connections to the control plane are opened: `dial` opens one to an address. `expiries`
    ends them with their certificates."""

    identity: Identity
    dial: Dial
    expiries: Expiries

    async def open(
        self, settings: ControlPlaneConfig, chance: random.Random, avoid: Address | None = None
    ) -> TLSStream:
        """Connect to one of the addresses, to `avoid` only if no other answers. The caller closes
        the stream with `close`. Raises OSError, NetError, PeerRefused, ChannelError."""
        error: Exception = ChannelError("the name has no address")
        found = await resolve(settings.address, chance)
        addresses = sorted(found, key=lambda address: address == avoid)[:_TRIED]
        for address in addresses:
            with trio.move_on_after(settings.connect_timeout / len(addresses)):
                try:
                    stream = await self.dial(address)
                except NetError as failed:
                    error = failed
                    continue
                return await self._secure(stream, settings)
            error = ChannelError(f"{address} does not answer")
        raise error

    async def _secure(self, stream: SocketStream, settings: ControlPlaneConfig) -> TLSStream:
        identity, expected = self.identity, SpiffeId.parse(settings.identity)
        own_end, trust = identity.chain_end, self.expiries.trust
        tls = await tls_client(
            stream,
            identity.client_context,
            TLSOffer(expected.sni, (ALPN,)),
            verify=lambda chain: identity.verify_chain(chain, expected),
            timeout=settings.connect_timeout,
        )
        if tls.info.alpn != ALPN:
            tls.close()
            raise ChannelError("the peer does not speak the protocol of the directory channel")
        self.expiries.watch(tls, own_end, trust=trust)
        if tls.expiry is not None:
            tls.expiry.retire = partial(_expire, tls)
        return tls


def _expire(stream: TLSStream) -> None:
    """The certificates of the connection have ended. It has no requests to wait for."""
    if stream.expiry is not None:
        stream.fail(ConnectionLost(stream.expiry.words, "expired"))


def close(stream: TLSStream) -> None:
    """Close a connection that `Connector.open` has opened."""
    if stream.expiry is not None:
        stream.expiry.retire = None  # it refers to the stream: break the reference cycle
    stream.close()
