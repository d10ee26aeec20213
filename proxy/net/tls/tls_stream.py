"""TLS 1.3 on the non-blocking socket itself.

Theory of operation
===================

OpenSSL reads and writes the socket; each of its calls either succeeds, or says which readiness it misses (WantRead, WantWrite). Then
we wait for that and make *the same call again*. Five things about this are easy to get wrong:

*Readable is not the same as "something to read".* Decrypted bytes may already lie in OpenSSL, and bytes on the socket may be a session
ticket only. So the call always comes first, and waiting second. But what is not decrypted is in the socket, whose readiness tells of it:
of each record first the header is read, then the rest and no more (by AWS-LC too: ssl_buffer.cc). The fast path rests on that.

*Reading may want to write, and the reverse.* A key update (RFC 8446, section 4.6.3) must be answered by the reader, and a writer may meet
a half-arrived post-handshake message. Then two tasks wait for the same direction of one socket, which trio forbids. `Readiness` lets
the first one wait, and the others wait for the first. (AWS-LC keeps the answer for its next write, as a server does with its tickets.)

*A refused write must be repeated with the same bytes.* The record is already encrypted, and a part of it may be on its way. The memory may
have moved (SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER, set by pyOpenSSL), the contents may not have changed. So a send that was cancelled while
it waited has torn the stream: nothing can be sent any more, not even close_notify.

*A failed write kills the reading half too.* OpenSSL does not read from a connection on which a write failed, although the peer's last
words (an early answer, or the alert that says why it refuses us) may have arrived. So every write first asks the socket for its error
(SO_ERROR, a third of a microsecond) and fails without OpenSSL hearing of it. Only who has no use for last words need not ask. AWS-LC does
read on; but it asks for the error by itself, and throws it away: a read may have taken it from the write, which then fails in the library.

*The end has two layers.* close_notify ends one direction (RFC 8446, section 6.1), and the other goes on. The end of TCP without
it is an attack or an accident, never an end: ConnectionLost with reason `truncated`.

Session tickets come behind the handshake, before the server's first data. So a client asks for its session when it has first read data.
Fairness and cancellation are those of proxy.net.socket_stream, with the same deviation from trio's contract.
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

# The most plain text that one record carries (RFC 8446, section 5.1), and so the most that one call of OpenSSL reads or writes.
_RECORD = 16384

# How long aclose() waits, in seconds, until the kernel takes the 24 bytes of close_notify. If it does not, the peer is stuck.
_CLOSE_TIMEOUT = 1.0


class TLSStream(trio.abc.HalfCloseableStream):
    """An established TLS connection; made by tls_server and tls_client. See proxy.net.socket_stream.Stream for what its methods promise."""

    __slots__ = (
        "__weakref__", "_connection", "_eof_sent", "_failure", "_on_session", "_option", "_raw", "_readiness", "_reading", "_recv", "_send",
        "_streak", "_torn", "_writing", "bytes_read", "bytes_written", "end_met", "expiry", "info", "local", "peer", "socket",
    )  # fmt: skip

    def __init__(
        self, raw: SocketStream, connection: SSL.Connection, info: TLSInfo, on_session: Callable[[SSL.Session], None] | None
    ) -> None:
        self._raw = raw
        self.socket = raw.socket
        self.peer, self.local = raw.peer, raw.local
        self.info = info
        self.bytes_read = self.bytes_written = self._streak = 0  # of plain text; `raw` is not told of the bytes on the wire
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
        return f"<TLSStream {self.local} -> {self.peer} {self.info.peer_identity or ''}{' closed' if self._raw.closed else ''}>"

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
                # Waiting is done outside of the handlers: an exception that is being handled keeps its traceback, and with it the
                # binding's buffer of 16 KiB, for as long as an idle connection waits.
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
        """A full record is seldom the last one: take those with it that are here already. No call of OpenSSL's gives more than one, and
        its binding allocates as much as it is asked for."""
        records, size = [data], _RECORD
        try:
            while size < max_bytes and len(data) == _RECORD:
                data = self._recv(min(_RECORD, max_bytes - size))
                records.append(data)
                size += len(data)
        except (SSL.WantReadError, SSL.WantWriteError):
            pass
        except SSL.Error as error:  # to be told to whoever asks next; OpenSSL repeats a clean end by itself
            self.end_met = True
            if not isinstance(error, SSL.ZeroReturnError):
                self._failed(error, "while reading")
        return b"".join(records)

    def receive_nowait(self, max_bytes: int = socket_stream.RECEIVE_SIZE) -> bytes | None:
        """See net/nonblocking.py. Whole records only, of which OpenSSL keeps nothing back."""
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
            # Somebody waits for the socket, and has taken all that OpenSSL had. A peek would move what has come from the socket into
            # OpenSSL, and the reader would wait for ever.
            return self._raw.is_idle()
        if self._raw.is_idle() and not self._connection.pending():
            return True  # as nearly always; asking OpenSSL would cost an exception more
        try:
            self._recv(1, socket.MSG_PEEK)  # takes in what is not data: session tickets, key updates
        except SSL.Error as error:
            return isinstance(error, SSL.WantReadError)
        return False

    def ended(self) -> End:
        if self._raw.closed or self._torn or self._failure is not None:
            return "lost"
        if self._reading:
            return "open"  # whoever waits will hear of it
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
                if sent < size:  # one call takes one record at most; only longer messages need a view
                    await self._send_rest(memoryview(data), sent)
        finally:
            self._writing = False
        self.bytes_written += size

    async def _send_rest(self, view: memoryview, sent: int) -> None:
        size = len(view)
        while sent < size:
            self._streak += 1
            if self._streak >= socket_stream.BURST:
                self._torn = True  # unless we come back: a part is on its way
                await self._pass()
                self._torn = False
            with view[sent : sent + _RECORD] as record:
                sent += await self._send_some(record)

    async def _send_some(self, data: bytes | bytearray | memoryview) -> int:
        """One record of `data`; how much of it that was."""
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
            sound = False  # this record may meet a peer that has closed
            try:
                sent += self._send(data if size <= _RECORD else memoryview(data)[sent : sent + _RECORD])
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
        """A peer that refuses us sends an alert and closes: the better reason, if nobody is about to read it anyway."""
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
        self._torn = False  # whoever was told no comes back
        return done

    def _close_notify(self) -> bool:
        """Send it; False: the socket has to take more first, and the connection is torn until this is called again."""
        self._torn = True
        if code := self._option(socket.SOL_SOCKET, socket.SO_ERROR):
            raise self._refused(lost(code))
        try:
            self._connection.shutdown()
        except SSL.WantWriteError:
            return False
        except SSL.WantReadError:
            pass  # sent: it is the peer's that OpenSSL is waiting for
        except SSL.Error as error:
            raise self._unsent(error, "while ending TLS") from error
        self._torn = False
        self._eof_sent = True
        return True

    # Closing

    async def aclose(self) -> None:
        """Send close_notify if it has not been sent, do not wait for the peer's, close. Takes at most a second."""
        try:
            if not (self._raw.closed or self._torn or self._writing or self._eof_sent):
                with trio.move_on_after(_CLOSE_TIMEOUT):
                    while not self._close_notify():  # it takes it at once, as a rule: it is sent even if our task is cancelled
                        await self._wait_writable()
                discard_unread(self.socket)
        except NetError:
            pass  # the peer was faster
        finally:
            self.close()
        await (checkpoint if self._streak + 1 >= socket_stream.BURST else checkpoint_if_cancelled)()

    def close(self) -> None:
        # From here on the number of the descriptor may belong to another connection: OpenSSL must never be called again.
        self._raw.close()

    def reset(self) -> None:
        self._raw.reset()

    def fail(self, loss: ConnectionLost) -> bool:
        """See SocketStream.fail. Whether the stream was neither closed nor lost."""
        if self._raw.closed or self._failure is not None:
            return False
        self._failure, self._torn = loss, True
        self._raw.cut()
        return True

    # The parts of the operations

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
        return ConnectionLost("an earlier operation on this connection failed or was cancelled half-way", "torn")

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
