"""How a proxy of the mesh reports to the previous one that it created a response itself.

A sidecar that cannot connect to its application answers 502. The previous proxy must not take this
for a response of the application: the endpoint has failed, and another endpoint can serve the
request. So the response carries the reason in a field (`FAILURE`).

An application must not be able to set that field. Two rules ensure this:

    - A proxy accepts the field only on a mutual TLS connection whose peer it has verified, so the
      field comes from a proxy.
    - A proxy removes the field from everything that it forwards, in both directions (the field is
      in HOP_BY_HOP; the fast path hands such responses over), so it does not come from behind that
      proxy.

The status and Proxy-Status of such a response are for people, and for peers that do not know the
field.
"""

from __future__ import annotations

from proxy.errors import BROKEN, REPORTED, ErrorAnswer, Undelivered, UpstreamClosed
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.messages import FAILURE, ResponseHead

# The longest Proxy-Status of the other proxy, in bytes, that is passed on.
_LONGEST = 2048


def report(answer: ErrorAnswer, head: ResponseHead) -> None:
    """Set the field on a response head for a verified peer, if the reason of `answer` is one that
    the peer handles."""
    if answer.reason in REPORTED:
        head.headers.add(FAILURE, answer.reason.encode("ascii"))


def is_report(head: ResponseHead) -> bool:
    """Return whether a head has the field. The fast path of HTTP/2 hands such a response over."""
    return not head.headers.clean and FAILURE in head.headers


def reported(head: ResponseHead, stream: Stream) -> Undelivered | UpstreamClosed | None:
    """Return the failure that the peer of `stream` reports in `head`. None: no report, or not from
    a verified proxy. Call it before the hop-by-hop fields are removed."""
    headers = head.headers
    # the head recogniser accepts no head with this field
    if headers.clean or headers.block is not None:
        return None
    value = headers.get(FAILURE)
    if value is None or not isinstance(stream, TLSStream) or stream.info.peer_identity is None:
        return None
    reason = value.decode("latin-1")
    if reason not in REPORTED:
        return None
    words = f"the proxy at {stream.peer} reports: {reason}"
    failure = UpstreamClosed(words) if reason in BROKEN else Undelivered(words, reason)
    received_status = headers.get(b"proxy-status") or b""
    if len(received_status) <= _LONGEST:
        failure.received_status = received_status
    return failure
