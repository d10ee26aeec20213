"""What one proxy of the mesh reports to the next about a request that it answers itself.

A sidecar that cannot connect to its application answers 502. To the proxy before it that must not look like an answer of the application:
the endpoint has failed, and another one can take the request. So the response carries the reason in a field (`FAILURE`).

An application must not be able to write that field. Two rules hold that:

    - A proxy believes the field only on a connection by mutual TLS whose peer it has verified. So it comes from a proxy.
    - A proxy removes the field from all that it passes on, in both directions (it is in HOP_BY_HOP; the fast path hands over
      what has it). So it does not come from behind that proxy.

The status and Proxy-Status of such a response are for people, and for peers that do not know the field.
"""

from __future__ import annotations

from proxy.errors import BROKEN, REPORTED, Answer, Undelivered, UpstreamClosed
from proxy.net.socket_stream import Stream
from proxy.net.tls.handshake import TLSStream
from proxy.wire.messages import FAILURE, ResponseHead

# Bytes of the other proxy's Proxy-Status; a longer one is not passed on.
_LONGEST = 2048


def report(answer: Answer, head: ResponseHead) -> None:
    """Put the reason of `answer` on the head of a response to a verified peer, if it is one that the peer acts on."""
    if answer.reason in REPORTED:
        head.headers.add(FAILURE, answer.reason.encode("ascii"))


def is_report(head: ResponseHead) -> bool:
    """Whether a head has the field, for the fast path of HTTP/2, which hands such a response over."""
    return not head.headers.clean and FAILURE in head.headers


def reported(head: ResponseHead, stream: Stream) -> Undelivered | UpstreamClosed | None:
    """The failure that the peer of `stream` reports by `head`; None: it reports none, or is not to be believed. To be asked before the
    fields of the hop are removed."""
    headers = head.headers
    if headers.clean or headers.block is not None:  # the recogniser of heads takes none with this field
        return None
    value = headers.get(FAILURE)
    if value is None or not isinstance(stream, TLSStream) or stream.info.peer_identity is None:
        return None
    reason = value.decode("latin-1")
    if reason not in REPORTED:
        return None
    words = f"the proxy at {stream.peer} says: {reason}"
    failure = UpstreamClosed(words) if reason in BROKEN else Undelivered(words, reason)
    said = headers.get(b"proxy-status") or b""
    if len(said) <= _LONGEST:
        failure.said = said
    return failure
