"""The end of a connection whose peer may still be sending."""

from __future__ import annotations

import trio

from proxy.net.streams import Stream


async def linger(stream: Stream, *, seconds: float, max_bytes: int = 1 << 20) -> None:
    """End our direction, then read and discard until the peer ends its own (RFC 9112, section 9.6). Does not close.

    For the case that we answered before the peer had finished sending: closing with unread bytes makes the kernel send RST,
    which destroys the answer on its way. Gives up after `seconds` or `max_bytes`; a connection that is already lost is no error.
    """
    try:
        with trio.move_on_after(seconds):
            await stream.send_eof()
            while max_bytes > 0 and (data := await stream.receive_some()):
                max_bytes -= len(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
