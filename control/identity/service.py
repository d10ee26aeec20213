"""The listener for requests for certificates (proxy/enrollment/messages.py): one request for each
connection, with limits for its size and time.

Clients have no certificate here, so this listener shares nothing with the directory channel but the
control plane's own certificate. An address that connects too often is closed before the handshake,
which is the expensive part.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Sequence
from contextlib import suppress

import h11
import trio

from control.identity.authority import Authority, Refused
from proxy.enrollment.messages import (
    MAX_HEAD_BYTES,
    PATH,
    Ask,
    Denied,
    Granted,
    InvalidMessage,
    decode,
    encode,
)
from proxy.identity.identity import Identity
from proxy.net.accept import Acceptor, Connection
from proxy.net.exceptions import NetError
from proxy.net.tls.handshake import TLSStream, tls_server

_log = logging.getLogger("isthmus.control")

_STATUS = {
    "not_found": 404,
    "method": 405,
    "too_large": 413,
    "malformed": 400,
    "token": 401,
    "identity_rate": 429,
    "issuer": 503,
    "review": 503,
}


class IssuingService:
    """Answers requests with what `authority` decides. `identity` is the control plane's own."""

    def __init__(self, authority: Authority, identity: Identity) -> None:
        self.authority = authority
        self._identity = identity

    async def serve(self, listeners: Sequence[socket.socket]) -> None:
        """Serve until cancelled. Closes `listeners`."""
        limit = self.authority.limits.max_connections
        await Acceptor(self._accept, limit=limit, on_error=self._failed).serve(listeners)

    def _failed(self, connection: Connection, error: BaseException) -> None:
        if isinstance(error, Refused):
            self._count(connection, error)
        elif isinstance(error, trio.TooSlowError):
            self._count(connection, Refused("timeout", "the request did not arrive in time"))
        elif isinstance(error, NetError):
            self._count(connection, Refused("lost", f"the connection was lost: {error}"))
        else:
            self.authority.counts.refused["internal"] += 1
            _log.error("internal error on the connection from %s", connection.peer, exc_info=error)

    def _count(self, connection: Connection, refused: Refused) -> None:
        self.authority.counts.refused[refused.reason] += 1
        # Repetitions of what any client can cause must not fill the log.
        level = logging.DEBUG if refused.reason in ("lost", "address_rate") else logging.WARNING
        _log.log(level, "no certificate for %s (%s): %s", connection.peer, refused.reason, refused)

    async def _accept(self, connection: Connection) -> None:
        self.authority.check_rate(_network(connection.peer.host))
        timeout = self.authority.limits.timeout
        stream = await tls_server(
            connection.stream, self._identity.open_server_context, verify=None, timeout=timeout
        )
        try:
            with trio.fail_after(timeout):
                await self._answer(connection, stream)
        finally:
            stream.close()

    async def _answer(self, connection: Connection, stream: TLSStream) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        answer: Granted | Denied
        headers = [("Content-Type", "application/json"), ("Connection", "close")]
        try:
            answer = await self.authority.issue(await self._read(http, stream))
            status = 200
        except Refused as refused:
            self._count(connection, refused)
            answer, status = Denied(refused.reason, str(refused)), _STATUS.get(refused.reason, 403)
            if refused.retry_after:
                headers.append(("Retry-After", str(math.ceil(refused.retry_after))))
        body = encode(answer)
        headers.append(("Content-Length", str(len(body))))
        if http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        sent = [
            http.send(h11.Response(status_code=status, headers=headers)),
            http.send(h11.Data(data=body)),
            http.send(h11.EndOfMessage()),
        ]
        await stream.send_all(b"".join(part for part in sent if part))
        # Wait until the client has closed: a reset would destroy the answer.
        with suppress(NetError):
            await stream.send_eof()
            await stream.receive_some()

    async def _read(self, http: h11.Connection, stream: TLSStream) -> Ask:
        """Read a request. Raises Refused."""
        most = self.authority.limits.max_body_bytes
        body = bytearray()
        try:
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Request):
                    _check_target(event)
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > most:
                        words = f"the body is larger than {most} bytes (issuing.max_body_bytes)"
                        raise Refused("too_large", words)
                elif isinstance(event, h11.EndOfMessage):
                    return decode(bytes(body), Ask)
                else:
                    raise Refused("lost", "the connection ended before the request")
        except h11.RemoteProtocolError as error:
            raise Refused("malformed", f"not HTTP/1.1: {error}") from None
        except InvalidMessage as error:
            raise Refused("malformed", str(error)) from None


def _check_target(request: h11.Request) -> None:
    if request.target != PATH.encode():
        raise Refused("not_found", f"only {PATH} is served here")
    if request.method != b"POST":
        raise Refused("method", "only POST is served here")


def _network(host: str) -> str:
    """What counts as one address: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex()
