"""The TLS handshake, as server and as client.

Everything about a connection that has been agreed on is in proxy.net.tls.tls_stream. Here is how it comes about: under one deadline,
with the stream owned and closed on every way out but the good one, and with the caller's own verification as a step of the handshake
itself: a peer that is refused by its name gets an alert that says so (verify.py).

Resumption is not a way around that step. A TLS 1.3 server that resumes a session does not see the client's certificate again, but
the ticket carries it; so the caller judges it anew on every connection. What it refuses then is closed without an alert: neither library
sends one after the handshake.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import trio
from OpenSSL import SSL, crypto
from trio.lowlevel import checkpoint_if_cancelled

from proxy.net.exceptions import TLSFailed
from proxy.net.linger import discard_unread
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.binding import was_resumed
from proxy.net.tls.info import TLSInfo
from proxy.net.tls.openssl_errors import explain
from proxy.net.tls.tls_stream import TLSStream
from proxy.net.tls.verify import Chain, Verdict, Verify, chain_end, demand_certificate, remembered_chain, verdict_of

__all__ = ["Chain", "TLSInfo", "TLSOffer", "TLSStream", "Verify", "demand_certificate", "tls_client", "tls_server"]


@dataclass(frozen=True, slots=True)
class TLSOffer:
    """What a client asks for. `session` must come from the same context; if it does not, a full handshake is made.

    `on_session` is called once, when the session can be resumed by a later connection.
    """

    server_name: str = ""
    alpn: tuple[bytes, ...] = ()
    session: SSL.Session | None = None
    on_session: Callable[[SSL.Session], None] | None = None


async def tls_server(stream: SocketStream, context: SSL.Context, *, verify: Verify | None, timeout: float) -> TLSStream:
    """Answer a client's handshake on `stream`, which must not have been read from (peeking is fine).

    `verify` gets the peer's verified chain (see tls_verdict.Verify), also when a session was resumed, and raises if the peer is not good
    enough; what it returns becomes `info.peer_identity`. Takes ownership of `stream`: whatever is raised, it is closed, and no
    application byte was read or written. Raises TLSFailed, ConnectionLost, and what `verify` raises, unchanged. `timeout` in
    seconds, for the handshake as a whole.
    """
    try:
        connection = SSL.Connection(context, stream.socket)
        connection.set_app_data(Verdict(verify))
        connection.set_accept_state()
        await _handshake(connection, stream, timeout)
        info = _info(connection, (connection.get_servername() or b"").decode("ascii", "replace"), verify)
    except BaseException:
        stream.close()
        raise
    return TLSStream(stream, connection, info, None)


async def tls_client(stream: SocketStream, context: SSL.Context, offer: TLSOffer, *, verify: Verify | None, timeout: float) -> TLSStream:
    """Open TLS as the client. Everything else as tls_server.

    In TLS 1.3 the client is done before the server has looked at its certificate: a refusal arrives as TLSFailed (`alert`) from
    the first read, or write, after this.
    """
    try:
        connection = SSL.Connection(context, stream.socket)
        connection.set_app_data(Verdict(verify))
        if offer.server_name:
            connection.set_tlsext_host_name(offer.server_name.encode("ascii"))
        if offer.alpn:
            connection.set_alpn_protos(list(offer.alpn))
        if offer.session is not None:
            with suppress(ValueError):  # made by another context: its trust or our certificate has changed since
                connection.set_session(offer.session)
        connection.set_connect_state()
        await _handshake(connection, stream, timeout)
        info = _info(connection, offer.server_name, verify)
    except BaseException:
        stream.close()
        raise
    return TLSStream(stream, connection, info, offer.on_session)


async def _handshake(connection: SSL.Connection, stream: SocketStream, timeout: float) -> None:
    with trio.move_on_after(timeout) as scope:
        await checkpoint_if_cancelled()
        while True:
            try:
                connection.do_handshake()
            except SSL.WantReadError:
                await trio.lowlevel.wait_readable(stream.socket)
            except SSL.WantWriteError:
                await trio.lowlevel.wait_writable(stream.socket)
            except SSL.Error as error:
                discard_unread(stream.socket)  # so that the alert we have just sent is not destroyed by a reset
                raise _refusal(connection) or explain(error, connection, "during the TLS handshake") from error
            else:
                return
    if scope.cancelled_caught:
        raise TLSFailed("timeout", f"the TLS handshake with {stream.peer} was not done within {timeout:g} s")


def _refusal(connection: SSL.Connection) -> Exception | None:
    """What the caller's own verification has raised within the handshake; once, because an exception leads back to where it was raised."""
    verdict = verdict_of(connection)
    error, verdict.error = verdict.error, None
    return error


def _info(connection: SSL.Connection, sni: str, verify: Verify | None) -> TLSInfo:
    verdict = verdict_of(connection)
    connection.set_app_data(None)
    chain, outcome = verdict.chain, verdict.outcome
    if not chain:  # a session was resumed, or the peer has shown nothing
        shown = connection.get_peer_certificate()
        if shown is not None:
            chain = remembered_chain(crypto.dump_certificate(crypto.FILETYPE_ASN1, shown))
        outcome = verify(chain) if verify is not None else None
    return TLSInfo(
        version=connection.get_protocol_version_name(),
        cipher=connection.get_cipher_name() or "",
        group=connection.get_group_name() or "",
        alpn=connection.get_alpn_proto_negotiated(),
        resumed=was_resumed(connection),
        peer_identity=None if outcome is None else str(outcome),
        sni=sni,
        peer_not_after=chain_end(chain),
        peer_root=chain[-1] if len(chain) > 1 else None,
    )
