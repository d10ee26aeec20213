"""A request on an HTTP/1 connection, read on demand: the rest of its head, and its body."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from proxy.errors import ClientGone, RequestTimeout
from proxy.exchange.prefixed_stream import READ_SIZE
from proxy.net.exceptions import NetError
from proxy.net.memory_budget import Charge, Share
from proxy.net.socket_stream import Stream
from proxy.wire.h1.body import Length
from proxy.wire.h1.connection import Http1Connection
from proxy.wire.messages import EndOfMessage, ProtocolError, RequestHead, Signal

if TYPE_CHECKING:
    from proxy.exchange.server_settings import ServerSettings


async def rest_of_head(
    connection: Http1Connection, stream: Stream, share: Share
) -> RequestHead | Signal:
    """Read the rest of a head that has begun to arrive. The incomplete head is charged to `share`.
    CLOSED: the client has closed the connection. Raises ProtocolError, and the errors of `stream`.
    """
    waiting = Charge(share)
    head: RequestHead | Signal = Signal.NEED_DATA
    try:
        while head is Signal.NEED_DATA:
            waiting.become(connection.buffered)
            connection.receive_data(await stream.receive_some(share.read_size(READ_SIZE)))
            head = connection.next_request()
    finally:
        waiting.become(0)
    return head


class RequestBody:
    """The body of the current request. An exchange.Body. Raises ProtocolError, ClientGone and
    RequestTimeout."""

    __slots__ = ("_connection", "_received", "_settings", "_share", "_stream", "_waited")

    def __init__(
        self, connection: Http1Connection, stream: Stream, settings: ServerSettings, share: Share
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._settings = settings
        self._share = share
        self._received = 0
        # seconds spent waiting for the client; time spent on a slow server does not count
        self._waited = 0.0

    @property
    def length(self) -> Length:
        return self._connection.body_length

    def receive_nowait(self) -> bytes | EndOfMessage | None:
        try:
            event = self._connection.next_body()
        except ProtocolError:
            self._connection.keep_alive = False
            raise
        if isinstance(event, Signal):
            return None
        if isinstance(event, bytes):
            self._received += len(event)
        return event

    async def receive(self) -> bytes | EndOfMessage:
        while (event := self.receive_nowait()) is None:
            started = trio.current_time()
            with trio.move_on_after(self._patience()) as scope:
                try:
                    self._connection.receive_data(
                        await self._stream.receive_some(self._share.read_size(READ_SIZE))
                    )
                except NetError as error:
                    raise ClientGone(
                        f"the client's connection broke during the request body: {error}"
                    ) from error
            if scope.cancelled_caught:
                self._connection.keep_alive = False
                raise RequestTimeout(f"the request's body stopped after {self._received} bytes")
            self._waited += trio.current_time() - started
        return event

    def _patience(self) -> float:
        """Return the seconds that may pass until the next piece."""
        patience = self._settings.body_timeout
        if self._settings.body_min_rate > 0:
            allowed = patience + self._received / self._settings.body_min_rate
            patience = min(patience, max(0.0, allowed - self._waited))
        return patience
