"""TLS 1.3 on the non-blocking socket itself.

Theory of operation
===================

OpenSSL reads and writes the socket. Each of its calls either succeeds, or reports which readiness
it needs (WantRead, WantWrite). Then we wait for this and repeat *the same call*. Five points are
easy to get wrong:

*Readable does not mean that there is data.* OpenSSL may hold decrypted bytes, and the bytes on the
socket may be only a session ticket. So the call comes first, and the wait second. But bytes that
are not decrypted yet are in the socket, and its readiness shows them. Of each record the header is
read first, then the rest and no more (also by AWS-LC: ssl_buffer.cc). The fast path relies on this.

*Reading may need to write, and the reverse.* The reader must answer a key update (RFC 8446, section
4.6.3), and a writer may meet an incomplete post-handshake message. Then two tasks wait for the same
direction of one socket, which trio forbids. `Readiness` lets the first one wait for the socket, and
the others wait for the first. (AWS-LC sends the answer with its next write, as a server does with
its tickets.)

*A blocked write must be repeated with the same bytes.* The record is already encrypted, and a part
of it may be sent. The memory may move (SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, set by pyOpenSSL), but
its contents must not change. So a send that was cancelled while waiting has torn the stream:
nothing more can be sent, not even close_notify.

*A failed write also ends reading.* OpenSSL does not read from a connection after a failed write.
But the peer's last data may have arrived: an early answer, or the alert with the reason of a
refusal. So every write first reads the socket's error (SO_ERROR, a third of a microsecond), and
fails without calling OpenSSL. A caller that does not need this data may skip the check. AWS-LC
still reads after a failed write. But it reads SO_ERROR itself and ignores it: a read may have
consumed the error before the write, which then fails in the library.

*The end has two layers.* close_notify ends one direction (RFC 8446, section 6.1), and the other
continues. The end of TCP without it is an attack or an accident, never a clean end: it raises
ConnectionLost with the reason `truncated`.

Session tickets arrive after the handshake, before the server's first data. So a client asks for its
session when it has first read data. Fairness and cancellation are as in socket_stream.py, with the
same deviation from trio's contract.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio
from OpenSSL import SSL
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from proxy.net import socket_stream
from proxy.net.exceptions import ConnectionLost, NetError, again, lost
from proxy.net.fairness import let_others_run
from proxy.net.linger import discard_unread
from proxy.net.readiness import Readiness
from proxy.net.socket_stream import End, SocketStream
from proxy.net.tls.info import Expiry, TLSInfo
from proxy.net.tls.openssl_errors import AWS_LC, explain

# The most plain text in one record (RFC 8446, section 5.1), so the most that one OpenSSL call reads
# or writes.
_RECORD = 16384

# How long (seconds) aclose() waits until the kernel accepts the 24 bytes of close_notify. If it
# does not, the peer does not read.
_CLOSE_TIMEOUT = 1.0


class TLSStream(trio.abc.HalfCloseableStream):
    """An established TLS connection, created by tls_server and tls_client.

    It implements byte_stream.Stream.
    """

    __slots__ = (
        "__weakref__", "_connection", "_eof_sent", "_failure", "_on_session", "_option", "_raw",
        "_readiness", "_reading", "_recv", "_send", "_streak", "_torn", "_writing", "bytes_read",
        "bytes_written", "end_met", "expiry", "info", "local", "peer", "socket",
    )  # fmt: skip

    def __init__(
        self,
        raw: SocketStream,
        connection: SSL.Connection,
        info: TLSInfo,
        on_session: Callable[[SSL.Session], None] | None,
    ) -> None:
        self._raw = raw
        self.socket = raw.socket
        self.peer, self.local = raw.peer, raw.local
        self.info = info
        self.bytes_read = self.bytes_written = self._streak = 0  # plain text; `raw` does not count
        self.expiry: Expiry | None = None
        self._connection = connection
        self._recv, self._send = connection.recv, connection.send
        self._option = raw.socket.getsockopt
        self._failure: NetError | None = None  # what ended the reading half
        self.end_met = False  # see net/nonblocking.py
        self._on_session = on_session
        self._readiness = Readiness(raw.socket)
        self._reading = self._writing = self._eof_sent = self._torn = False

    def __repr__(self) -> str:
        return (
            f"<TLSStream {self.local} -> {self.peer}"
            f" {self.info.peer_identity or ''}{' closed' if self._raw.closed else ''}>"
        )

    # Reading

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is None:
            max_bytes = socket_stream.RECEIVE_SIZE
        elif max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        self._check_open()
        if self._reading:
            raise trio.BusyResourceError("another task is already reading from this connection")
        if self._failure is not None:
            raise again(self._failure)
        self._reading = True
        try:
            await self._pass()
            while True:
                # Wait outside of the handlers: an exception that is being handled keeps its
                # traceback, and so the binding's buffer of 16 KiB, as long as an idle connection
                # waits.
                try:
                    data: bytes = self._recv(min(_RECORD, max_bytes))
                    break
                except SSL.WantReadError:
                    wait = self._wait_readable
                except SSL.WantWriteError:
                    wait = self._wait_writable
                except SSL.ZeroReturnError:
                    return b""
                except SSL.Error as error:
                    raise self._failed(error, "while reading") from error
                await wait()
        finally:
            self._reading = False
        if len(data) == _RECORD < max_bytes:
            data = self._with_more(data, max_bytes)
        self.bytes_read += len(data)
        self._streak += len(data) >> socket_stream.READ_SHIFT
        if self._on_session is not None:
            self._hand_on_session()
        return data

    def _with_more(self, data: bytes, max_bytes: int) -> bytes:
        """Read further records that have already arrived: a full record is rarely the last one.

        One OpenSSL call returns at most one record, and its binding allocates the requested size.
        """
        records, size = [data], _RECORD
        try:
            while size < max_bytes and len(data) == _RECORD:
                data = self._recv(min(_RECORD, max_bytes - size))
                records.append(data)
                size += len(data)
        except (SSL.WantReadError, SSL.WantWriteError):
            pass
        except SSL.Error as error:  # raised by the next call; OpenSSL repeats a clean end itself
            self.end_met = True
            if not isinstance(error, SSL.ZeroReturnError):
                self._failed(error, "while reading")
        return b"".join(records)

    def receive_nowait(self, max_bytes: int = socket_stream.RECEIVE_SIZE) -> bytes | None:
        """See net/nonblocking.py. Reads whole records only, so OpenSSL keeps no data back."""
        self._check_open()
        if self._failure is not None:
            raise again(self._failure)
        try:
            data: bytes = self._recv(_RECORD)
        except (SSL.WantReadError, SSL.WantWriteError):
            return None
        except SSL.ZeroReturnError:
            return b""
        except SSL.Error as error:
            raise self._failed(error, "while reading") from error
        if len(data) == _RECORD:
            data = self._with_more(data, max_bytes)
        self.bytes_read += len(data)
        if self._on_session is not None:
            self._hand_on_session()
        return data

    def _hand_on_session(self) -> None:
        on_session, self._on_session = self._on_session, None
        session = self._connection.get_session()
        if on_session is not None and session is not None:
            on_session(session)

    def _failed(self, error: SSL.Error, doing: str) -> NetError:
        self._torn = True
        if self._failure is not None:
            return again(self._failure)
        self._failure = again(failure := explain(error, self._connection, doing))
        return failure

    def is_idle(self) -> bool:
        if self._raw.closed or self._torn or self._failure is not None or self.end_met:
            return False
        if self._reading:
            # A task waits for the socket, and has taken all that OpenSSL had. A peek would move new
            # bytes from the socket into OpenSSL, and the waiting task would never wake up.
            return self._raw.is_idle()
        if self._raw.is_idle() and not self._connection.pending():
            return True  # the usual case; asking OpenSSL would cost another exception
        try:
            self._recv(1, socket.MSG_PEEK)  # processes session tickets and key updates
        except SSL.Error as error:
            return isinstance(error, SSL.WantReadError)
        return False

    def ended(self) -> End:
        if self._raw.closed or self._torn or self._failure is not None:
            return "lost"
        if self._reading:
            return "open"  # the waiting reader will notice the end
        try:
            self._recv(1, socket.MSG_PEEK)
        except SSL.ZeroReturnError:
            return "half"
        except (SSL.WantReadError, SSL.WantWriteError):
            return "open" if self._raw.ended() == "open" else "lost"  # without the end of TLS
        except SSL.Error as error:
            self._failed(error, "while reading")
        return "open" if self._failure is None else "lost"

    # Writing

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._begin_write()
        try:
            if self._eof_sent:
                raise trio.ClosedResourceError("this direction was ended by send_eof")
            await self._pass()
            size = len(data)
            if size:
                sent = await self._send_some(data)
                if sent < size:  # one call sends at most one record; only longer data needs a view
                    await self._send_rest(memoryview(data), sent)
        finally:
            self._writing = False
        self.bytes_written += size

    async def _send_rest(self, view: memoryview, sent: int) -> None:
        size = len(view)
        while sent < size:
            self._streak += 1
            if self._streak >= socket_stream.BURST:
                self._torn = True  # a part is sent; reset below if the rest is sent
                await self._pass()
                self._torn = False
            with view[sent : sent + _RECORD] as record:
                sent += await self._send_some(record)

    async def _send_some(self, data: bytes | bytearray | memoryview) -> int:
        """Send one record of `data`. Return the number of bytes."""
        self._torn = True
        while True:
            if code := self._option(socket.SOL_SOCKET, socket.SO_ERROR):
                raise self._refused(lost(code))
            try:
                sent = self._send(data)
            except SSL.WantWriteError:
                await self._wait_writable()
            except SSL.WantReadError:
                await self._wait_readable()
            except SSL.Error as error:
                raise self._unsent(error, "while sending") from error
            else:
                self._torn = False
                return sent

    def send_nowait(self, data: bytes | memoryview, *, sound: bool = False) -> int:
        """See net/nonblocking.py."""
        self._check_open()
        if self._torn:
            raise self._unusable()
        size, sent = len(data), 0
        while sent < size:
            if not sound and (code := self._option(socket.SOL_SOCKET, socket.SO_ERROR)):
                raise self._refused(lost(code))
            sound = False  # the peer may close before the next record
            try:
                sent += self._send(
                    data if size <= _RECORD else memoryview(data)[sent : sent + _RECORD]
                )
            except (SSL.WantWriteError, SSL.WantReadError):
                break
            except SSL.Error as error:
                raise self._unsent(error, "while sending") from error
        self.bytes_written += sent
        return sent

    def _unsent(self, error: SSL.Error, doing: str) -> NetError:
        if AWS_LC and isinstance(error, SSL.SysCallError):
            return self._refused(explain(error, self._connection, doing))
        return self._failed(error, doing)

    def _refused(self, loss: NetError) -> NetError:
        """Return the peer's alert, if it sent one before it closed; otherwise `loss`.

        The alert has the better reason. It is read only if no other task is reading.
        """
        self._torn = True
        if not self._reading:
            try:
                self._recv(1, socket.MSG_PEEK)
            except (SSL.WantReadError, SSL.WantWriteError, SSL.ZeroReturnError, SSL.SysCallError):
                return loss
            except SSL.Error as error:
                return self._failed(error, "while sending")
        return loss

    async def wait_send_all_might_not_block(self) -> None:
        self._begin_write()
        try:
            await self._wait_writable()
        finally:
            self._writing = False

    async def send_eof(self) -> None:
        self._begin_write()
        try:
            await checkpoint()
            self._check_open()
            while not (self._eof_sent or self._close_notify()):
                await self._wait_writable()
        finally:
            self._writing = False

    def send_eof_nowait(self) -> bool:
        """See net/nonblocking.py."""
        self._check_open()
        if self._torn:
            raise self._unusable()
        done = self._eof_sent or self._close_notify()
        self._torn = False  # if not done, the caller repeats the call
        return done

    def _close_notify(self) -> bool:
        """Send close_notify. False: the socket is full.

        Then the connection counts as torn until this is called again.
        """
        self._torn = True
        if code := self._option(socket.SOL_SOCKET, socket.SO_ERROR):
            raise self._refused(lost(code))
        try:
            self._connection.shutdown()
        except SSL.WantWriteError:
            return False
        except SSL.WantReadError:
            pass  # sent; OpenSSL waits for that of the peer
        except SSL.Error as error:
            raise self._unsent(error, "while ending TLS") from error
        self._torn = False
        self._eof_sent = True
        return True

    # Closing

    async def aclose(self) -> None:
        """Send close_notify if it is not sent yet, and close. Takes at most a second.

        Does not wait for the peer's close_notify.
        """
        try:
            if not (self._raw.closed or self._torn or self._writing or self._eof_sent):
                with trio.move_on_after(_CLOSE_TIMEOUT):
                    # Usually this succeeds at once, even if our task is cancelled.
                    while not self._close_notify():
                        await self._wait_writable()
                discard_unread(self.socket)
        except NetError:
            pass  # the peer closed first
        finally:
            self.close()
        await (checkpoint if self._streak + 1 >= socket_stream.BURST else checkpoint_if_cancelled)()

    def close(self) -> None:
        # From here on another connection may have this descriptor number: never call OpenSSL again.
        self._raw.close()

    def reset(self) -> None:
        self._raw.reset()

    def fail(self, loss: ConnectionLost) -> bool:
        """See SocketStream.fail. Return whether the stream was neither closed nor lost."""
        if self._raw.closed or self._failure is not None:
            return False
        self._failure, self._torn = loss, True
        self._raw.cut()
        return True

    # Parts of the operations

    def _check_open(self) -> None:
        if self._raw.closed:
            raise trio.ClosedResourceError("this connection was already closed")

    def _begin_write(self) -> None:
        self._check_open()
        if self._writing:
            raise trio.BusyResourceError("another task is already writing to this connection")
        if self._torn:
            raise self._unusable()
        self._writing = True

    def _unusable(self) -> NetError:
        failure = self._failure
        if isinstance(failure, ConnectionLost) and failure.reason in ("timeout", "expired"):
            return again(failure)
        return ConnectionLost(
            "an earlier operation on this connection failed or was cancelled half-way", "torn"
        )

    async def _pass(self) -> None:
        self._streak += 1
        if self._streak >= socket_stream.BURST:
            self._streak = 0
            await let_others_run()
        else:
            await checkpoint_if_cancelled()
        self._check_open()

    async def _wait_readable(self) -> None:
        self._streak = 0
        await self._readiness.wait_readable()
        self._check_open()

    async def _wait_writable(self) -> None:
        self._streak = 0
        await self._readiness.wait_writable()
        self._check_open()
