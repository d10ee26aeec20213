"""The end of a connection whose peer may still be sending."""

from __future__ import annotations

import socket

import trio

from proxy.net.socket_stream import Stream

# The number of reads that discard unread bytes before a close, so that the kernel sends FIN. A
# close with unread bytes (a session ticket is enough) sends RST, which destroys what the peer has
# not read yet.
_DISCARD_READS = 4
# The size of a read whose bytes are discarded.
_READ = 65536
# A lingering connection is read at full speed for its first bytes, and then at _RATE (bytes per
# second). So a client that floods after its refusal costs little, and TCP flow control slows it
# down. A client that reads while it uploads gets the answer in any case.
_AT_ONCE = 1 << 20
_RATE = 4 << 20


def discard_unread(sock: socket.socket) -> None:
    """Discard what has arrived, within limits: see _DISCARD_READS."""
    try:
        for _ in range(_DISCARD_READS):
            if not sock.recv(65536):
                return
    except OSError:  # nothing to read (EAGAIN), or the connection is lost
        return


async def linger(stream: Stream, *, seconds: float, quiet: float | None = None) -> None:
    """End our direction, then read and discard until the peer ends its own (RFC 9112 §9.6).

    Does not close. Use it if we answered before the peer finished sending: a close with unread
    bytes makes the kernel send RST, which destroys the answer in flight. Many clients read the
    answer only after their upload, so there is no limit in bytes. It stops after `seconds` in
    total, or after `quiet` seconds without a byte. Reads are paced after the first _AT_ONCE bytes,
    see _RATE. It is not an error if the connection is already lost.
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
