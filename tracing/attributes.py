"""The names of the span attributes, and the values that the conventions define.

OpenTelemetry's names are copied here, not imported: the library would cost the data path memory
even without tracing, and several names are in modules that move between releases. A test compares
them with the installed conventions.
"""

from __future__ import annotations

from enum import StrEnum


class Name(StrEnum):
    """Attributes of spans, and the names of their events."""

    METHOD = "http.request.method"
    METHOD_ORIGINAL = "http.request.method_original"
    RESEND_COUNT = "http.request.resend_count"
    REQUEST_SIZE = "http.request.body.size"
    RESPONSE_SIZE = "http.response.body.size"
    STATUS = "http.response.status_code"
    SCHEME = "url.scheme"
    PATH = "url.path"
    QUERY = "url.query"
    URL = "url.full"
    USER_AGENT = "user_agent.original"
    RPC_SYSTEM = "rpc.system.name"
    RPC_METHOD = "rpc.method"
    RPC_METHOD_ORIGINAL = "rpc.method_original"
    RPC_STATUS = "rpc.response.status_code"
    ERROR = "error.type"
    SERVER_ADDRESS = "server.address"
    SERVER_PORT = "server.port"
    CLIENT_ADDRESS = "client.address"
    CLIENT_PORT = "client.port"
    PEER_ADDRESS = "network.peer.address"
    PEER_PORT = "network.peer.port"
    PROTOCOL = "network.protocol.name"
    PROTOCOL_VERSION = "network.protocol.version"
    TRANSPORT = "network.transport"
    TLS = "tls.established"
    TLS_NAME = "tls.protocol.name"
    TLS_VERSION = "tls.protocol.version"
    TLS_CIPHER = "tls.cipher"
    TLS_GROUP = "tls.curve"
    TLS_RESUMED = "tls.resumed"
    TLS_ALPN = "tls.next_protocol"
    DIRECTION = "isthmus.direction"
    IDENTITY = "isthmus.peer.identity"
    DESTINATION = "isthmus.destination"
    SERVICE = "isthmus.service"
    CLUSTER = "isthmus.cluster"
    BACKEND = "isthmus.split.backend"
    GATEWAY = "isthmus.gateway"
    PROXY_STATUS = "isthmus.proxy_status"
    DETECTED = "isthmus.detected"
    READ = "isthmus.bytes.read"
    WRITTEN = "isthmus.bytes.written"
    LOOP_KIND = "isthmus.loop.kind"
    LOOP_CYCLE = "isthmus.loop.cycle"
    HEAD_EVENT = "isthmus.response.head"
    LOOP_EVENT = "isthmus.loop"


# The methods that the conventions call known (RFC 9110 §9 and RFC 5789).
METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
)

# In the order of their numbers (github.com/grpc/grpc, doc/statuscodes.md).
GRPC_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
# The codes that are errors of the server. For a client, all except OK are errors.
SERVER_ERRORS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

# Query parameters whose values should be hidden, by the conventions.
SECRET_PARAMETERS = frozenset(
    {
        "AWSAccessKeyId",
        "Signature",
        "sig",
        "X-Goog-Signature",
        "X-Amz-Signature",
        "X-Amz-Security-Token",
    }
)
