"""The end of an HTTP/2 connection."""

from __future__ import annotations

import trio

from proxy.net.exceptions import NetError
from proxy.net.linger import linger
from proxy.net.socket_stream import Stream
from proxy.wire.h2.connection import Http2Connection
from proxy.wire.h2.frames import Code


async def close_after_goaway(stream: Stream, http: Http2Connection, *, lingers: bool) -> None:
    """Send the last frames (GOAWAY), if possible within a second, and close `stream`. `lingers`:
    meanwhile, read what the peer still sends. Closing with unread bytes would destroy responses
    that are on their way to the peer."""
    http.close(Code.NO_ERROR)
    with trio.move_on_after(1, shield=True):
        try:
            await stream.send_all(http.data_to_send())
            if lingers:
                await linger(stream, seconds=1)
            await stream.aclose()
        except (NetError, trio.ClosedResourceError):
            pass
