"""One exchange with the control plane: resolve, connect, TLS, one request, one answer.

The server is verified as any peer of the mesh is: its chain ends at a trust root, and its name is
the configured one. So the token goes to the control plane only, although the proxy has no
certificate to present.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import h11
import trio
from cryptography import x509

from proxy.config.schema_files import EnrollmentConfig
from proxy.enrollment.messages import (
    ALPN,
    MAX_ANSWER_BYTES,
    MAX_HEAD_BYTES,
    PATH,
    Ask,
    Denied,
    Granted,
    InvalidMessage,
    decode,
    encode,
)
from proxy.identity.credentials import visible
from proxy.identity.identity import PeerRefused, verify_peer
from proxy.identity.spiffe import SpiffeId
from proxy.identity.tls_contexts import bare_client_context
from proxy.net.address import Address
from proxy.net.exceptions import NetError
from proxy.net.resolve import resolve
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.handshake import TLSOffer, TLSStream, tls_client

Dial = Callable[[Address], Awaitable[SocketStream]]

# Addresses of the control plane's name that one attempt tries.
_TRIED = 3
_MAX_WORDS = 500


class EnrollmentFailed(Exception):
    """There is no certificate. The message says why. `retry_after`: seconds that the control plane
    asks to wait."""

    def __init__(self, words: str, retry_after: float = 0.0) -> None:
        super().__init__(words)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Enroller:
    """Asks the control plane that `settings` names. `dial` opens a connection to an address."""

    settings: EnrollmentConfig
    dial: Dial
    clock: Callable[[], datetime]
    chance: random.Random

    async def ask(self, ask: Ask, roots: Sequence[x509.Certificate]) -> str:
        """The certificate chain for a request, in PEM. Raises EnrollmentFailed."""
        address = self.settings.address
        try:
            with trio.fail_after(self.settings.timeout):
                stream = await self._open(roots)
                try:
                    return await _exchange(stream, address, encode(ask))
                finally:
                    stream.close()
        except trio.TooSlowError:
            words = f"no answer from {address} within {self.settings.timeout:g} s"
            raise EnrollmentFailed(words) from None
        except (NetError, PeerRefused, OSError, UnicodeError, InvalidMessage) as error:
            words = f"the control plane at {address}: {error or type(error).__name__}"
            raise EnrollmentFailed(words) from error
        except h11.RemoteProtocolError as error:
            raise EnrollmentFailed(f"{address} does not speak HTTP/1.1: {error}") from error

    async def _open(self, roots: Sequence[x509.Certificate]) -> TLSStream:
        expected = SpiffeId.parse(self.settings.identity)
        stream = await self._connect()
        return await tls_client(
            stream,
            bare_client_context(roots),
            TLSOffer(expected.sni, (ALPN,)),
            verify=lambda chain: verify_peer(
                chain[0] if chain else None, expected, {expected.trust_domain}, self.clock()
            ),
            timeout=self.settings.timeout,
        )

    async def _connect(self) -> SocketStream:
        addresses = (await resolve(self.settings.address, self.chance))[:_TRIED]
        error: Exception = OSError("the name has no address")
        for address in addresses:
            with trio.move_on_after(self.settings.timeout / (2 * len(addresses))):
                try:
                    return await self.dial(address)
                except NetError as failed:
                    error = failed
                    continue
            error = OSError(f"{address} does not answer")
        raise error


async def _exchange(stream: TLSStream, address: str, body: bytes) -> str:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    headers = [
        ("Host", address),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    sent = [
        http.send(h11.Request(method="POST", target=PATH, headers=headers)),
        http.send(h11.Data(data=body)),
        http.send(h11.EndOfMessage()),
    ]
    await stream.send_all(b"".join(part for part in sent if part))
    response: h11.Response | None = None
    answer = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await stream.receive_some())
        elif isinstance(event, h11.Response):
            response = event
        elif isinstance(event, h11.Data):
            answer += event.data
            if len(answer) > MAX_ANSWER_BYTES:
                raise InvalidMessage(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        elif isinstance(event, h11.EndOfMessage):
            break
        elif not isinstance(event, h11.InformationalResponse):
            raise InvalidMessage("the connection ended before the answer")
    if response is None:
        raise InvalidMessage("there is no answer")
    if response.status_code == 200:
        return decode(bytes(answer), Granted).chain
    raise _failure(response, bytes(answer))


def _failure(response: h11.Response, answer: bytes) -> EnrollmentFailed:
    fields = dict(response.headers)
    try:
        denied = decode(answer, Denied)
        words = f"{visible(denied.message[:_MAX_WORDS])} ({visible(denied.reason[:40])})"
    except InvalidMessage:
        words = f"it answered {response.status_code}"
    after = fields.get(b"retry-after", b"")
    pause = float(after) if after.isdigit() and len(after) < 6 else 0.0
    return EnrollmentFailed(f"the control plane gives no certificate: {words}", pause)
