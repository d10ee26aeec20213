"""The end of a connection whose peer may still be sending."""

from __future__ import annotations

import socket

import trio

from proxy.net.socket_stream import Stream

# Reads of unread bytes that are thrown away before closing, so that the kernel ends the connection with FIN: closing with unread bytes (a
# session ticket is enough) makes it RST, and RST destroys what the peer has not read yet.
_DISCARD_READS = 4
# Bytes that are read at a time, to be thrown away.
_READ = 65536
# A lingering connection is read at full speed for its first bytes. After them it is read at _RATE (bytes per second), so that a client that
# floods after its refusal costs little, and TCP flow control slows it down. A client that reads while it uploads gets the answer anyway.
_AT_ONCE = 1 << 20
_RATE = 4 << 20


def discard_unread(sock: socket.socket) -> None:
    """Throw away what has arrived, within reason: see _DISCARD_READS."""
    try:
        for _ in range(_DISCARD_READS):
            if not sock.recv(65536):
                return
    except OSError:  # nothing there (EAGAIN), or the connection is gone
        return


async def linger(stream: Stream, *, seconds: float, quiet: float | None = None) -> None:
    """End our direction, then read and discard until the peer ends its own (RFC 9112 §9.6). Does not close.

    For the case that we answered before the peer had finished sending: closing with unread bytes makes the kernel send RST,
    which destroys the answer on its way. Many clients read the answer only after their upload, so there is no limit in bytes: it gives up
    after `seconds` in all, or `quiet` seconds without a byte. Reads are paced after the first _AT_ONCE bytes, see _RATE. A connection that
    is already lost is no error.
    """
    dropped = 0
    try:
        with trio.move_on_after(seconds):
            await stream.send_eof()
            while True:
                with trio.move_on_after(seconds if quiet is None else quiet) as pause:
                    size = len(await stream.receive_some(_READ))
                    if not size:
                        return
                if pause.cancelled_caught:
                    return
                dropped += size
                if dropped > _AT_ONCE:
                    await trio.sleep(size / _RATE)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
