"""TLS contexts made from material, and the sessions that clients resume.

Both contexts are TLS 1.3 only, ask the peer for a certificate and refuse to go on without one. Key-exchange groups are those of
proxy/net/tls/openssl.cnf, or OpenSSL's own, so that the post-quantum hybrid X25519MLKEM768 is negotiated wherever both sides know it.

Resumption and trust. A TLS 1.3 server that resumes a session does not look at the client's certificate chain again: the ticket
says that it was good once. Three things keep that honest. Tickets are sealed with keys that belong to the context, and every
change of material makes new contexts, so no ticket outlives the trust it was issued under; sessions have a limited lifetime;
and `Identity.verify_chain` checks the chain's validity and the name on every connection, resumed or not. Open connections
hold their own reference to the context they began with and go on undisturbed.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence

from OpenSSL import SSL, crypto

from proxy.identity.credentials import Material
from proxy.identity.spiffe import SpiffeId
from proxy.net.tls.certificate_rules import MAX_INTERMEDIATES
from proxy.net.tls.handshake import demand_certificate

ALPN_HTTP1 = b"http/1.1"
ALPN_HTTP2 = b"h2"
ALPN_TCP = b"isthmus-tcp"
# The same, and the server says first whether it has connected to its application (proxy/flows/confirmation.py).
ALPN_TCP_CONFIRMED = b"isthmus-tcp-confirmed"
# What the inbound side can take apart: the names of the protocol inside, agreed in the handshake.
INNER_PROTOCOLS = frozenset({ALPN_HTTP1, ALPN_HTTP2, ALPN_TCP, ALPN_TCP_CONFIRMED})

# In the order of their cost on common processors; TLS 1.3 has no weak ones, this leaves out the CCM suites, which nobody offers.
CIPHER_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

# Sessions are only resumed by a server that would make them again: the name ties tickets to this use. OpenSSL demands one as
# soon as client certificates are verified, and fails resumed handshakes without it.
SESSION_ID_CONTEXT = b"isthmus"

# SSL_MODE_NO_AUTO_CHAIN: pyOpenSSL has no name for it. Without it OpenSSL completes our chain from the trust store and sends the
# root in every handshake: bytes that each peer has, and must parse and throw away. AWS-LC has it set from the beginning.
_MODE_NO_AUTO_CHAIN = 0x8

# A session with its peer's certificate takes a few KiB; this bounds the cache to about 2 MiB and is more endpoints than one pod
# talks to at a time.
DEFAULT_SESSIONS = 512


class NoCommonProtocol(SSL.Error):
    """The client offered inner protocols, and we know none of them. Raised out of the handshake, which ends with a fatal alert.

    Its argument has the form of OpenSSL's own errors, a queue of (library, function, reason), so that whoever explains those
    can explain this one too.
    """

    def __init__(self, offers: Sequence[bytes]) -> None:
        super().__init__([("SSL routines", "", "no application protocol")])
        self.offers = tuple(offers)

    def __str__(self) -> str:
        shown = ", ".join(repr(offer) for offer in self.offers[:5])
        return f"the client offers only inner protocols that are not known here: {shown}"


_NO_SESSION: tuple[SSL.Session | None, float] = None, math.inf


class SessionCache:
    """TLS sessions of our clients, by the identity that was expected and the host that was dialled; the oldest use goes first.

    A cache belongs to one generation of the material and is replaced with it. So whoever dials takes `client_context` and
    `sessions` from the identity together, with no await between, and puts the session back into the very cache it took: a
    session that was verified under old trust then goes to the cache that nobody reads any more.
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
        """The session to offer to this peer, if there is one that has not ended by `now`. It stays in the cache: several connections may
        use it."""
        key = (expected, host)
        session, end = self._sessions.get(key, _NO_SESSION)
        if now >= end:
            del self._sessions[key]
            return None
        if session is not None:
            self._sessions.move_to_end(key)
        return session

    def put(self, expected: SpiffeId, host: str, session: SSL.Session | None, end: float = math.inf) -> None:
        """Keep a session after the peer was verified. None (the peer sent no ticket yet) changes nothing. `end`: when the peer's
        certificate ends, in seconds since the epoch: the session would bring it back."""
        if session is None:
            return
        key = (expected, host)
        self._sessions[key] = session, end
        self._sessions.move_to_end(key)
        if len(self._sessions) > self._limit:
            self._sessions.popitem(last=False)


class KeptSession:
    """Where the session of a connection goes that is being opened: TLSOffer.on_session. `end` is set when the peer is known."""

    __slots__ = ("_cache", "_expected", "_host", "end")

    def __init__(self, cache: SessionCache, expected: SpiffeId, host: str) -> None:
        self._cache = cache
        self._expected = expected
        self._host = host
        self.end = math.inf

    def __call__(self, session: SSL.Session) -> None:
        self._cache.put(self._expected, self._host, session, self.end)


def server_context(material: Material, session_lifetime: float) -> SSL.Context:
    """A new context for accepting. `session_lifetime` in seconds: how long a ticket can be resumed; 0: never."""
    context = _context(SSL.TLS_SERVER_METHOD, material, session_lifetime)
    demand_certificate(context, always=True)
    context.set_session_id(SESSION_ID_CONTEXT)
    context.set_alpn_select_callback(_select_protocol)
    return context


def client_context(material: Material, session_lifetime: float) -> SSL.Context:
    """A new context for dialling. SNI, ALPN and the session to resume are set on each connection."""
    context = _context(SSL.TLS_CLIENT_METHOD, material, session_lifetime)
    if session_lifetime > 0:
        # AWS-LC keeps a connection's session for whoever asks only if it is told to keep any.
        context.set_session_cache_mode(SSL.SESS_CACHE_CLIENT | SSL.SESS_CACHE_NO_INTERNAL)
    demand_certificate(context, always=False)
    return context


def _context(method: int, material: Material, session_lifetime: float) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHER_SUITES)
    # SSL_OP_ALL, which is usual here, only holds work-arounds for versions before TLS 1.3.
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION)
    # Releasing the buffers of idle connections saves about 34 KiB each (two records), of which a proxy has thousands. AWS-LC always
    # does, and the mode is 0 there.
    context.set_mode(SSL.MODE_RELEASE_BUFFERS | _MODE_NO_AUTO_CHAIN)
    # Tickets need no store on the server, and the client's sessions are in our own cache, by the peer's name.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    if session_lifetime > 0:
        context.set_timeout(max(1, round(session_lifetime)))
    else:
        # In TLS 1.3 this makes tickets refer to the session cache, which is off: none of them can be resumed.
        context.set_options(SSL.OP_NO_TICKET)
    context.set_verify_depth(MAX_INTERMEDIATES)
    context.use_certificate(material.leaf)
    context.use_privatekey(material.key)
    context.check_privatekey()
    for certificate in material.intermediates:
        context.add_extra_chain_cert(certificate)
    store = context.get_cert_store()
    if store is None:
        raise RuntimeError("OpenSSL gave a context without a certificate store")
    for root in material.roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    # The same rule as in material.verify_chain: all of the trust root files are anchors, self-signed or not.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    return context


def _select_protocol(_connection: SSL.Connection, offers: Sequence[bytes]) -> bytes:
    """The first of the client's offers that we know: the client has seen the traffic already, so its order counts."""
    for offer in offers:
        if offer in INNER_PROTOCOLS:
            return offer
    # Only an exception makes pyOpenSSL send the fatal alert no_application_protocol (RFC 7301, section 3.2); its sentinel for
    # "no overlap" would let the handshake go on without ALPN.
    raise NoCommonProtocol(offers)
