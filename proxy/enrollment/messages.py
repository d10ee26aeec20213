"""The exchange in which the control plane certifies a proxy's key: one HTTP/1.1 POST over TLS.

The proxy has no certificate yet, so only the server is authenticated by TLS. The proxy proves who
it is with a token of its service account in the body. A token in a header could end up in a log.

    POST /v1/certificate      {"token": "...", "request": "-----BEGIN CERTIFICATE REQUEST-----..."}
    200                       {"chain": "-----BEGIN CERTIFICATE-----..."}
    4xx, 503                  {"reason": "token", "message": "..."}

A field that the receiver does not know is ignored, so both sides can get new ones.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TypeVar

import msgspec

PATH = "/v1/certificate"
ALPN = b"http/1.1"
# The audience that tokens for this exchange have, and no others.
AUDIENCE = "isthmus.dev/identity"
# A certificate is valid from this long before its creation: clocks differ.
SKEW = timedelta(minutes=5)
# A token has about 1 KiB, and a request for a certificate at most 16 KiB.
MAX_TOKEN_BYTES = 16 * 1024
MAX_BODY_BYTES = 48 * 1024
# A chain has a leaf and at most three intermediates.
MAX_ANSWER_BYTES = 64 * 1024
MAX_HEAD_BYTES = 8 * 1024

T = TypeVar("T")


class Ask(msgspec.Struct, frozen=True):
    """The body of a request. `request`: a certificate signing request in PEM."""

    token: str
    request: str


class Granted(msgspec.Struct, frozen=True):
    """The body of an answer with a certificate: the leaf first, in PEM."""

    chain: str


class Denied(msgspec.Struct, frozen=True):
    """The body of any other answer. `reason`: one of the words in docs/identity.md."""

    reason: str
    message: str


class InvalidMessage(Exception):
    """A body is not the expected message."""


def encode(message: Ask | Granted | Denied) -> bytes:
    """A message as a body."""
    return msgspec.json.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """A body as a message. Raises InvalidMessage, never with the contents."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidMessage(f"the body is not a valid message ({kind.__name__})") from None
