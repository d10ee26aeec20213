"""The end of a connection whose peer may still be sending."""

from __future__ import annotations

import socket

import trio

from proxy.net.streams import Stream

# Reads of unread bytes that are thrown away before closing, so that the kernel ends the connection with FIN: closing with unread bytes (a
# session ticket is enough) makes it RST, and RST destroys what the peer has not read yet.
_DISCARD_READS = 4
# Bytes that are read at a time, to be thrown away.
_READ = 65536


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
    which destroys the answer on its way. Gives up after `seconds` in all, or `quiet` seconds without a byte, however many bytes come: many
    clients read the answer behind their upload. A connection that is already lost is no error.
    """
    try:
        with trio.move_on_after(seconds):
            await stream.send_eof()
            while True:
                with trio.move_on_after(seconds if quiet is None else quiet) as pause:
                    if not await stream.receive_some(_READ):
                        return
                if pause.cancelled_caught:
                    return
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
