"""TLS contexts made from the credentials, and the sessions that clients resume.

Both contexts use TLS 1.3 only, and require a certificate from the peer. The key-exchange groups
come from proxy/net/tls/openssl.cnf or are OpenSSL's defaults, so the post-quantum hybrid
X25519MLKEM768 is negotiated wherever both sides support it.

Resumption and trust: a TLS 1.3 server that resumes a session does not verify the client's chain
again; the ticket stands for the earlier verification. Three rules keep that safe. Ticket keys
belong to the context, and every change of credentials makes new contexts, so no ticket outlives the
trust it was issued under. Sessions have a limited lifetime. `Identity.verify_chain` checks the
chain's validity and the name on every connection, resumed or not. Open connections keep a reference
to the context they started with, so they are not affected by a change.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from cryptography import x509
from OpenSSL import SSL, crypto

from proxy.identity.credentials import Material
from proxy.identity.spiffe import SpiffeId
from proxy.net.tls.certificate_rules import MAX_INTERMEDIATES
from proxy.net.tls.handshake import demand_certificate

ALPN_HTTP1 = b"http/1.1"
ALPN_HTTP2 = b"h2"
ALPN_TCP = b"isthmus-tcp"
# Like the protocol above, but the server first reports whether it has connected to its application
# (proxy/flows/confirmation.py).
ALPN_TCP_CONFIRMED = b"isthmus-tcp-confirmed"
# The inner protocols that the inbound side supports, negotiated with ALPN.
INNER_PROTOCOLS = frozenset({ALPN_HTTP1, ALPN_HTTP2, ALPN_TCP, ALPN_TCP_CONFIRMED})

# Ordered by cost on common processors. TLS 1.3 has no weak suites; the CCM suites are left out as
# unused.
CIPHER_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

# The session id context ties tickets to this use. OpenSSL requires one when client certificates are
# verified, and fails resumed handshakes without it.
SESSION_ID_CONTEXT = b"isthmus"

# SSL_MODE_NO_AUTO_CHAIN; pyOpenSSL has no name for it. Without it OpenSSL completes our chain from
# the trust store and sends the root in every handshake, although each peer has it. In AWS-LC it is
# on by default.
_MODE_NO_AUTO_CHAIN = 0x8

# A session with its peer's certificate takes a few KiB. The limit bounds the cache to about 2 MiB,
# for more endpoints than one pod usually uses at a time.
DEFAULT_SESSIONS = 512


class NoCommonProtocol(SSL.Error):
    """The client offered only unknown inner protocols. Raised in the handshake, which ends with a
    fatal alert.

    Its argument has the form of OpenSSL's errors, a list of (library, function, reason), so that
    the same code can explain it.
    """

    def __init__(self, offers: Sequence[bytes]) -> None:
        super().__init__([("SSL routines", "", "no application protocol")])
        self.offers = tuple(offers)

    def __str__(self) -> str:
        shown = ", ".join(repr(offer) for offer in self.offers[:5])
        return f"the client offers only unknown inner protocols: {shown}"


_NO_SESSION: tuple[SSL.Session | None, float] = None, math.inf


class SessionCache:
    """TLS sessions of our clients, by expected identity and dialled host. Evicts the least recently
    used.

    A cache belongs to one generation of the credentials and is replaced with it. A dialler takes
    `client_context` and `sessions` from the identity together, without an await between them, and
    puts the session back into the same cache. A session that was verified under old trust then ends
    up in a cache that is no longer read.
    """

    __slots__ = ("_limit", "_sessions")

    def __init__(self, limit: int = DEFAULT_SESSIONS) -> None:
        if limit < 1:
            raise ValueError("a session cache holds at least one session")
        self._limit = limit
        self._sessions: OrderedDict[tuple[SpiffeId, str], tuple[SSL.Session, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, expected: SpiffeId, host: str, now: float = 0.0) -> SSL.Session | None:
        """The session to offer to this peer, if there is one that has not ended by `now`. It stays
        in the cache: several connections may use it.
        """
        key = (expected, host)
        session, end = self._sessions.get(key, _NO_SESSION)
        if now >= end:
            del self._sessions[key]
            return None
        if session is not None:
            self._sessions.move_to_end(key)
        return session

    def put(
        self, expected: SpiffeId, host: str, session: SSL.Session | None, end: float = math.inf
    ) -> None:
        """Store a session after the peer was verified. None (the peer sent no ticket yet) changes
        nothing. `end`: when the peer's certificate expires, in seconds since the epoch; the session
        must not outlive it.
        """
        if session is None:
            return
        key = (expected, host)
        self._sessions[key] = session, end
        self._sessions.move_to_end(key)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)


class KeptSession:
    """Stores the session of a connection being opened: TLSOffer.on_session. `end` is set once the
    peer is known.
    """

    __slots__ = ("_cache", "_expected", "_host", "end")

    def __init__(self, cache: SessionCache, expected: SpiffeId, host: str) -> None:
        self._cache = cache
        self._expected = expected
        self._host = host
        self.end = math.inf

    def __call__(self, session: SSL.Session) -> None:
        self._cache.put(self._expected, self._host, session, self.end)


def server_context(
    material: Material,
    session_lifetime: float,
    protocols: frozenset[bytes] = INNER_PROTOCOLS,
    *,
    certificates: bool = True,
) -> SSL.Context:
    """A new context for accepting. `session_lifetime`: seconds in which a ticket can be resumed; 0:
    never. `protocols`: the ALPN names of which one must be offered. `certificates`: clients must
    present a certificate; False: they are not asked for one, so they are not authenticated.
    """
    context = _context(SSL.TLS_SERVER_METHOD, session_lifetime, material.roots)
    _present(context, material)
    if certificates:
        demand_certificate(context, always=True)
    context.set_session_id(SESSION_ID_CONTEXT)
    context.set_alpn_select_callback(partial(_select_protocol, protocols))
    return context


def client_context(material: Material, session_lifetime: float) -> SSL.Context:
    """A new context for dialling. SNI, ALPN and the session to resume are set per connection."""
    context = _context(SSL.TLS_CLIENT_METHOD, session_lifetime, material.roots)
    _present(context, material)
    if session_lifetime > 0:
        # AWS-LC only provides a connection's session if session caching is enabled.
        context.set_session_cache_mode(SSL.SESS_CACHE_CLIENT | SSL.SESS_CACHE_NO_INTERNAL)
    demand_certificate(context, always=False)
    return context


def bare_client_context(roots: Sequence[x509.Certificate]) -> SSL.Context:
    """A new context for dialling without a certificate of our own. The server is verified as in
    `client_context`.
    """
    context = _context(SSL.TLS_CLIENT_METHOD, 0.0, roots)
    demand_certificate(context, always=False)
    return context


def _context(
    method: int, session_lifetime: float, roots: Sequence[x509.Certificate]
) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHER_SUITES)
    # SSL_OP_ALL, which is usual, only contains workarounds for versions before TLS 1.3.
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    # Releasing the buffers of idle connections saves about 34 KiB each (two records), and a proxy
    # has thousands of them. AWS-LC always does this; there the mode is 0.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_NO_AUTO_CHAIN)
    # Tickets need no store on the server, and the client's sessions are in our own cache, by the
    # peer's name.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    if session_lifetime > 0:
        context.set_timeout(max(1, round(session_lifetime)))
    else:
        # In TLS 1.3 this makes tickets refer to the session cache, which is off: none can be
        # resumed.
        context.set_options(SSL.OP_NO_TICKET)
    context.set_verify_depth(MAX_INTERMEDIATES)
    store = context.get_cert_store()
    if store is None:
        raise RuntimeError("OpenSSL gave a context without a certificate store")
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    # As in credentials.verify_chain: every certificate in the root files is a trust anchor,
    # self-signed or not.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    return context


def _present(context: SSL.Context, material: Material) -> None:
    """Present our certificate and its intermediates."""
    context.use_certificate(material.leaf)
    context.use_privatekey(material.key)
    context.check_privatekey()
    for certificate in material.intermediates:
        context.add_extra_chain_cert(certificate)


def _select_protocol(
    protocols: frozenset[bytes], _connection: SSL.Connection, offers: Sequence[bytes]
) -> bytes:
    """The first of the client's offers that we support. The client has already seen the traffic, so
    its order counts.
    """
    for offer in offers:
        if offer in protocols:
            return offer
    # Only an exception makes pyOpenSSL send the fatal alert no_application_protocol (RFC 7301,
    # section 3.2). Its sentinel for "no overlap" would let the handshake continue without ALPN.
    raise NoCommonProtocol(offers)
