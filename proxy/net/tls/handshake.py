"""The TLS handshake, as server and as client.

The handshake has one deadline. It owns the stream, and closes it unless it succeeds. The caller's
verification is a step of the handshake itself, so a peer that is refused by its name gets an alert
with the reason (verify.py). tls_stream.py has the connection after the handshake.

Resumption does not skip this step. A TLS 1.3 server that resumes a session does not receive the
client's certificate again, but the ticket contains it. So the caller verifies it on every
connection. If it refuses then, the connection is closed without an alert: neither library sends one
after the handshake.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import trio
from OpenSSL import SSL, crypto
from trio.lowlevel import checkpoint_if_cancelled

from proxy.net.exceptions import TLSFailed
from proxy.net.fairness import take_step
from proxy.net.linger import discard_unread
from proxy.net.socket_stream import SocketStream
from proxy.net.tls.binding import was_resumed
from proxy.net.tls.info import TLSInfo
from proxy.net.tls.openssl_errors import explain
from proxy.net.tls.tls_stream import TLSStream
from proxy.net.tls.verify import (
    Chain,
    VerificationState,
    Verify,
    chain_end,
    demand_certificate,
    remembered_chain,
    verdict_of,
)

__all__ = [
    "Chain",
    "TLSInfo",
    "TLSOffer",
    "TLSStream",
    "Verify",
    "demand_certificate",
    "tls_client",
    "tls_server",
]


@dataclass(frozen=True, slots=True)
class TLSOffer:
    """What a client offers.

    `session` must come from the same context; otherwise a full handshake is made. `on_session` is
    called once, when a later connection can resume the session.
    """

    server_name: str = ""
    alpn: tuple[bytes, ...] = ()
    session: SSL.Session | None = None
    on_session: Callable[[SSL.Session], None] | None = None


async def tls_server(
    stream: SocketStream, context: SSL.Context, *, verify: Verify | None, timeout: float
) -> TLSStream:
    """Handshake as the server on `stream`, from which nothing may have been read (peeks are fine).

    `verify` gets the peer's verified chain (see verify.Verify), also if a session was resumed, and
    raises to refuse the peer. What it returns becomes `info.peer_identity`. Takes ownership of
    `stream`: if anything is raised, it is closed, and no application byte was read or written.
    Raises TLSFailed, ConnectionLost, and what `verify` raises, unchanged. `timeout`: seconds for
    the whole handshake.
    """
    try:
        await take_step()  # thousands of clients may send their ClientHello at once
        connection = SSL.Connection(context, stream.socket)
        connection.set_app_data(VerificationState(verify))
        connection.set_accept_state()
        await _handshake(connection, stream, timeout)
        info = _info(
            connection, (connection.get_servername() or b"").decode("ascii", "replace"), verify
        )
    except BaseException:
        stream.close()
        raise
    return TLSStream(stream, connection, info, None)


async def tls_client(
    stream: SocketStream,
    context: SSL.Context,
    offer: TLSOffer,
    *,
    verify: Verify | None,
    timeout: float,
) -> TLSStream:
    """Handshake as the client on `stream`. Ownership and errors as in `tls_server`.

    In TLS 1.3 the client completes before the server has checked its certificate. So a refusal is
    raised as TLSFailed (`alert`) by the first read or write after this.
    """
    try:
        connection = SSL.Connection(context, stream.socket)
        connection.set_app_data(VerificationState(verify))
        if offer.server_name:
            connection.set_tlsext_host_name(offer.server_name.encode("ascii"))
        if offer.alpn:
            connection.set_alpn_protos(list(offer.alpn))
        if offer.session is not None:
            # ValueError: of another context. Our certificate or the trust roots have changed.
            with suppress(ValueError):
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
                discard_unread(stream.socket)  # otherwise a reset would destroy our alert
                raise _refusal(connection) or explain(
                    error, connection, "during the TLS handshake"
                ) from error
            else:
                return
    if scope.cancelled_caught:
        raise TLSFailed(
            "timeout", f"the TLS handshake with {stream.peer} timed out after {timeout:g} s"
        )


def _refusal(connection: SSL.Connection) -> Exception | None:
    """Return the exception of the caller's `verify` during the handshake.

    Only once, because its traceback refers to this connection.
    """
    verdict = verdict_of(connection)
    error, verdict.error = verdict.error, None
    return error


def _info(connection: SSL.Connection, sni: str, verify: Verify | None) -> TLSInfo:
    verdict = verdict_of(connection)
    connection.set_app_data(None)
    chain, outcome = verdict.chain, verdict.outcome
    if not chain:  # a session was resumed, or the peer presented no certificate
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
        peer_serial=chain[0].serial_number if chain else None,
    )
