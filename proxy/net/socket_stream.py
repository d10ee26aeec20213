"""A slim byte stream on a non-blocking socket.

Theory of operation
===================

trio's own socket stream makes a scheduler pass for every operation, even if the system call
succeeds at once. This one tries the system call first, and waits for readiness only on EAGAIN. This
saves about half the CPU for small messages. The scheduler pass has two purposes, which must be met
in another way:

*Cancellation.* Every operation checks before its system call whether its task is already cancelled
(`checkpoint_if_cancelled`, a fraction of a microsecond). It never checks afterwards: a read that
has taken bytes from the kernel always returns them.

*Fairness.* An operation that succeeds at once does not let other tasks run. So a peer that always
has data could block the whole process, and no deadline would be noticed. Each stream counts its
operations since it last waited, and makes one real checkpoint in every `BURST`. Large reads count
for more. Streams that use up a burst take turns (fairness.py).

This is the only deviation from trio's stream contract, which requires a checkpoint in every
operation. With BURST = 1 the classes follow the contract exactly; trio's conformance suite is run
in this way.

Otherwise the contract is trio's. One task may read while another one writes; two readers (or two
writers) get `trio.BusyResourceError`. `b""` is a clean end. A closed stream raises
`trio.ClosedResourceError`, also in tasks that are waiting. A lost connection raises
`ConnectionLost`. A cancelled `send_all` may have sent a part of its data. After that only `close()`
and `reset()` work. Everything else raises, because continuing would silently corrupt the stream.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import trio
from trio.lowlevel import (
    checkpoint,
    checkpoint_if_cancelled,
    notify_closing,
    wait_readable,
    wait_writable,
)

from proxy.net.address import Address
from proxy.net.byte_stream import End, Stream
from proxy.net.exceptions import ConnectFailed, ConnectionLost, NetError, TLSFailed, again, lost
from proxy.net.fairness import let_others_run
from proxy.net.splice import Pipe

__all__ = [
    "BURST", "RECEIVE_SIZE", "Address", "ConnectFailed", "ConnectionLost", "End", "NetError",
    "SocketStream", "Stream", "TLSFailed",
]  # fmt: skip

# Operations that may succeed in a row before a stream lets other tasks run. A scheduler pass costs
# at least three microseconds (measured: sending and receiving 1 KiB takes 15.6 with a pass in each,
# 9.3 with one in 16, 8.8 without any). A read counts one more per 16 KiB, and a pipe one more per
# 64 KiB: a burst moves at most 256 KiB through our memory, in about 0.3 ms.
BURST, READ_SHIFT, PIPE_SHIFT = 16, 14, 16

# The size of one read. Measured for a relay, CPU seconds per GiB, plain and TLS on both sides: 16
# KiB 1.01 and 2.36, 64 KiB 0.68 and 2.23, 256 KiB 0.69 and 2.23. So a larger size only needs
# memory.
RECEIVE_SIZE = 65536

# The first pause (seconds) of a peek if the kernel reports "readable" without enough data, and the
# peer has not closed. The kernel does that for all sockets while it is short of memory for TCP
# (tcp_mem in tcp(7)), which can last. So each pause is twice as long as the one before it, up to
# the longest one.
_PEEK_PAUSE, _LONGEST_PEEK_PAUSE = 0.02, 0.32

_LINGER_NONE = struct.pack("ii", 1, 0)


class SocketStream(trio.abc.HalfCloseableStream):
    """A TCP connection.

    Takes ownership of `sock`, which must be connected. Makes it non-blocking and sets TCP_NODELAY.
    `local`: our address, if it is known. Raises ConnectionLost (and closes the socket) if the
    connection is already lost.
    """

    __slots__ = (
        "__weakref__", "_closed", "_eof_sent", "_loss", "_reading", "_recv", "_send", "_streak",
        "_torn", "_writing", "bytes_read", "bytes_written", "local", "on_close", "peer", "socket",
    )  # fmt: skip
    end_met = False  # see nonblocking.py

    def __init__(self, sock: socket.socket, local: Address | None = None) -> None:
        self.socket = sock
        self._recv, self._send = sock.recv, sock.send  # saves two attribute lookups per operation
        self.bytes_read = self.bytes_written = self._streak = 0
        self._reading = self._writing = False  # detect conflicts within the two halves
        self._closed = self._eof_sent = self._torn = False
        self._loss: ConnectionLost | None = None
        # Called once, while the socket is still open. Must not wait or raise.
        self.on_close: Callable[[], None] | None = None
        try:
            if sock.gettimeout() != 0.0:
                sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.peer = Address.of(sock.getpeername())
            self.local = local or Address.of(sock.getsockname())
        except OSError as error:
            sock.close()
            raise lost(error.errno or 0) from error

    def __repr__(self) -> str:
        return f"<SocketStream {self.local} -> {self.peer}{' closed' if self._closed else ''}>"

    @property
    def closed(self) -> bool:
        """Whether we have closed the stream."""
        return self._closed

    # Reading

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is None:
            max_bytes = RECEIVE_SIZE
        elif max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        self._begin_read()
        try:
            await self._pass()
            while True:
                try:
                    data = self._recv(max_bytes)
                except BlockingIOError:
                    self._streak = 0
                    await wait_readable(self.socket)
                except OSError as error:
                    raise self._lost(error) from error
                else:
                    break
        finally:
            self._reading = False
        if not data and (loss := self._loss) is not None:
            # The kernel reports a reset only once. If a send has got it, reading looks like a clean
            # end.
            raise again(loss)
        self.bytes_read += len(data)
        self._streak += len(data) >> READ_SHIFT
        return data

    async def receive_into(self, pipe: Pipe) -> Pipe:
        """Like receive_some, but into `pipe`, which must be empty.

        If it is still empty afterwards, the peer has ended cleanly.
        """
        # A separate loop: sharing one with receive_some would cost every read a call.
        self._begin_read()
        try:
            await self._pass()
            while True:
                try:
                    pipe.fill(self.socket)
                except BlockingIOError:
                    self._streak = 0
                    await wait_readable(self.socket)
                except OSError as error:
                    raise self._lost(error) from error
                else:
                    break
        finally:
            self._reading = False
        if not pipe and (loss := self._loss) is not None:
            raise again(loss)
        self.bytes_read += len(pipe)
        self._streak += len(pipe) >> PIPE_SHIFT
        return pipe

    def receive_nowait(self, max_bytes: int = RECEIVE_SIZE) -> bytes | None:
        """See nonblocking.py."""
        if self._closed:
            raise trio.ClosedResourceError("this connection was already closed")
        try:
            data = self._recv(max_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._lost(error) from error
        if not data and (loss := self._loss) is not None:
            raise again(loss)
        self.bytes_read += len(data)
        return data

    async def peek(self, max_bytes: int, at_least: int = 1) -> bytes:
        """Look at the next bytes without consuming them. Raises ConnectionLost.

        Waits until `at_least` bytes are there, or the peer has ended its direction. Then it returns
        what is there, up to `max_bytes`. SO_RCVLOWAT (socket(7)) makes the kernel wait for that
        many bytes. Readiness is level-triggered: otherwise the wait would return at once, again and
        again, as soon as one byte is there.
        """
        if not 1 <= at_least <= max_bytes:
            raise ValueError(f"cannot peek for at least {at_least} of at most {max_bytes} bytes")
        self._begin_read()
        lowered, pause = False, _PEEK_PAUSE
        try:
            await self._pass()
            while True:
                try:
                    data = self._recv(max_bytes, socket.MSG_PEEK)
                    if len(data) >= at_least or self._peer_ended():
                        return data
                    if lowered and data:
                        await trio.sleep(pause)
                        pause = min(2 * pause, _LONGEST_PEEK_PAUSE)
                    if not lowered:
                        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, at_least)
                        lowered = True
                except BlockingIOError:
                    if at_least > 1 and not lowered:
                        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, at_least)
                        lowered = True
                except OSError as error:
                    raise self._lost(error) from error
                self._streak = 0
                await wait_readable(self.socket)
        finally:
            self._reading = False
            if lowered and not self._closed:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def glance(self, max_bytes: int) -> bytes:
        """Like peek, but without waiting. Raises ConnectionLost.

        Returns b"" if nothing is there now; only peek distinguishes the end from a pause.
        """
        try:
            return self._recv(max_bytes, socket.MSG_PEEK)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self._lost(error) from error

    def is_idle(self) -> bool:
        if self._closed or self._loss is not None:
            return False
        try:
            self._recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def ended(self) -> End:
        if self._closed or self._loss is not None:
            return "lost"
        try:
            return "open" if self._recv(1, socket.MSG_PEEK) else "half"
        except BlockingIOError:
            return "open"
        except OSError as error:
            self._lost(error)  # keeps the error, because the kernel reports it only once
        return "lost"

    # Writing

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._begin_write()
        try:
            if self._eof_sent:
                raise trio.ClosedResourceError("this direction was ended by send_eof")
            await self._pass()
            size = len(data)
            sent = self._send_some(data) if size else 0
            if sent < size:
                await self._send_rest(memoryview(data), sent)
        finally:
            self._writing = False
        self.bytes_written += size

    def send_nowait(self, data: bytes | memoryview, *, sound: bool = False) -> int:  # noqa: ARG002  # for TLS
        """See nonblocking.py."""
        if self._closed or self._eof_sent:
            raise trio.ClosedResourceError(
                "this connection, or this direction of it, was already closed"
            )
        sent = self._send_some(data)
        self.bytes_written += sent
        return sent

    async def _send_rest(self, view: memoryview, sent: int) -> None:
        size = len(view)
        while sent < size:
            self._torn = sent > 0  # reset below when the rest is sent
            self._streak = 0
            await wait_writable(self.socket)
            with view[sent:] as rest:
                sent += self._send_some(rest)
        self._torn = False

    def _send_some(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._lost(error) from error

    async def send_from(self, pipe: Pipe) -> None:
        """Send everything that is in `pipe`. Raises as send_all."""
        self._begin_write()
        try:
            if self._eof_sent:
                raise trio.ClosedResourceError("this direction was ended by send_eof")
            await self._pass()
            self.bytes_written += len(pipe)
            self._torn = True  # reset below when everything is sent
            while pipe:
                try:
                    pipe.drain(self.socket)
                except BlockingIOError:
                    self._streak = 0
                    await wait_writable(self.socket)
                except OSError as error:
                    raise self._lost(error) from error
            self._torn = False
        finally:
            self._writing = False

    async def wait_send_all_might_not_block(self) -> None:
        self._begin_write()
        try:
            await wait_writable(self.socket)
        finally:
            self._writing = False

    async def send_eof(self) -> None:
        self._begin_write()
        try:
            await checkpoint()
            self.send_eof_nowait()
        finally:
            self._writing = False

    def send_eof_nowait(self) -> bool:
        """See nonblocking.py."""
        if not self._eof_sent:
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise self._lost(error) from error
            self._eof_sent = True
        return True

    # Closing

    async def aclose(self) -> None:
        """Close the stream. The kernel still delivers what was sent.

        linger.py handles a peer that may still be sending.
        """
        self.close()
        await (checkpoint if self._streak + 1 >= BURST else checkpoint_if_cancelled)()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            on_close, self.on_close = self.on_close, None
            if on_close is not None:
                on_close()
            notify_closing(self.socket)
            self.socket.close()

    def reset(self) -> None:
        if not self._closed:
            self.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE
            )  # close() then sends RST (socket(7))
            self.close()

    def fail(self, loss: ConnectionLost) -> None:
        """End the connection from our side: every operation raises `loss` from now on.

        `loss` has the reason `timeout` or `evicted`. Waiting operations raise it too. The owner
        must still close the stream. No effect if it is closed or lost already.
        """
        if not self._closed and self._loss is None:
            self._loss = loss
            self.cut()

    def cut(self) -> None:
        """Wake up the tasks that wait in this stream: nothing more can be read or sent."""
        if not self._closed:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            with suppress(OSError):  # ENOTCONN: it is already lost, and no task waits
                self.socket.shutdown(socket.SHUT_RDWR)

    # The parts of the operations

    def _begin_read(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this connection was already closed")
        if self._reading:
            raise trio.BusyResourceError("another task is already reading from this connection")
        self._reading = True

    def _begin_write(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this connection was already closed")
        if self._writing:
            raise trio.BusyResourceError("another task is already writing to this connection")
        if self._torn:
            raise ConnectionLost(
                "an earlier send to this connection was cancelled half-way", "torn"
            )
        self._writing = True

    async def _pass(self) -> None:
        """The checkpoint before a system call: see the theory of operation above."""
        self._streak += 1
        if self._streak >= BURST:
            self._streak = 0
            await let_others_run()
        else:
            await checkpoint_if_cancelled()
        if self._closed:
            raise trio.ClosedResourceError("this connection was closed meanwhile")

    def _peer_ended(self) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _lost(self, error: OSError) -> Exception:
        if self._closed:
            return trio.ClosedResourceError("this connection was closed meanwhile")
        if self._loss is not None and self._loss.reason in ("timeout", "evicted"):
            return again(self._loss)
        loss = lost(error.errno or 0)
        # EPIPE: the peer ended properly before, so what it sent can be read to its clean end.
        if loss.reason != "closed":
            self._loss = lost(error.errno or 0)  # a separate object, without a traceback to here
        return loss
