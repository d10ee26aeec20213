"""The messages of FetchX509SVID and FetchX509Bundles: certificates, keys and trust roots, as DER in
protobuf.

Each message is complete and replaces all earlier ones of its call. This module turns the first SVID
of a message, or a bundle, into the PEM parts that proxy/identity/credentials.py checks. It checks
only the form.

Bundles of other trust domains (federation) are understood, but the proxy does not use them: all its
trust roots verify identities of all trust domains, so a foreign root among them could sign a name
of our trust domain. Their trust domains are returned, so that the log can say so.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.enrollment.protobuf import InvalidProtobuf, fields, octets, text
from proxy.identity.spiffe import SCHEME

# Each has a certificate chain, a key and a bundle. The proxy uses the first one.
MAX_SVIDS = 256
# A chain has a leaf and at most three intermediates; bundles are larger.
MAX_CERTIFICATES = 1024
MAX_BUNDLES = 1024
_SEQUENCE = 0x30


class InvalidSvid(Exception):
    """A message has no usable SVID. The text says why, never with the key."""


@dataclass(frozen=True, slots=True)
class Svid:
    """One identity in PEM. `id`: the name that the server states; the certificate decides. `hint`:
    the operator's word for the use of this SVID, or "". `others`: how many more SVIDs the message
    has. `federated`: trust domains whose bundles the message has, too.
    """

    id: str
    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes
    hint: str
    others: int
    federated: tuple[str, ...]

    @property
    def trust_domain(self) -> str:
        """The trust domain of `id`."""
        return _domain(self.id)


def read_svid(message: bytes) -> Svid:
    """The first SVID of an X509SVIDResponse. Raises InvalidSvid."""
    try:
        return _read(message)
    except InvalidProtobuf as error:
        raise InvalidSvid(f"it is not the expected protobuf message: {error}") from None


def _read(message: bytes) -> Svid:
    svids: list[bytes] = []
    federated: list[str] = []
    for number, value in fields(message):
        if number == 1:
            svids.append(octets(number, value))
        elif number == 3:
            federated.append(_entry(octets(number, value))[0])
        if len(svids) > MAX_SVIDS:
            raise InvalidSvid(f"it has more than {MAX_SVIDS} SVIDs")
        if len(federated) > MAX_BUNDLES:
            raise InvalidSvid(f"it has more than {MAX_BUNDLES} bundles of other trust domains")
    if not svids:
        raise InvalidSvid("it has no SVID")
    parts: dict[int, bytes] = {}
    for number, value in fields(svids[0]):
        if number <= 5:
            parts[number] = octets(number, value)
    for number, what in ((1, "SPIFFE ID"), (2, "certificate"), (3, "key"), (4, "trust root")):
        if not parts.get(number):
            raise InvalidSvid(f"its first SVID has no {what}")
    return Svid(
        text(1, parts[1]),
        _certificates(parts[2], "certificate chain"),
        _pem("PRIVATE KEY", _only(parts[3])),
        _certificates(parts[4], "bundle"),
        text(5, parts.get(5, b"")),
        len(svids) - 1,
        tuple(federated),
    )


def read_bundles(message: bytes) -> Mapping[str, bytes]:
    """The bundles of an X509BundlesResponse: trust domain -> DER. Raises InvalidSvid."""
    found: dict[str, bytes] = {}
    try:
        for number, value in fields(message):
            if number == 2:
                name, bundle = _entry(octets(number, value))
                found[name] = bundle
            if len(found) > MAX_BUNDLES:
                raise InvalidSvid(f"it has more than {MAX_BUNDLES} bundles")
    except InvalidProtobuf as error:
        raise InvalidSvid(f"it is not the expected protobuf message: {error}") from None
    return found


def read_bundle(der: bytes) -> bytes:
    """The trust roots of one bundle in PEM. Raises InvalidSvid."""
    return _certificates(der, "bundle")


def _entry(data: bytes) -> tuple[str, bytes]:
    """An entry of a map of bundles. The key is a trust domain, or its SPIFFE ID."""
    name, bundle = "", b""
    for number, value in fields(data):
        if number == 1:
            name = text(number, value)
        elif number == 2:
            bundle = octets(number, value)
    return _domain(name), bundle


def _domain(name: str) -> str:
    """The trust domain in a SPIFFE ID or in its own name."""
    return name.removeprefix(SCHEME).partition("/")[0]


def _certificates(data: bytes, what: str) -> bytes:
    """Certificates in DER, one after the other, as PEM."""
    found = []
    at = 0
    while at < len(data):
        end = _end_of(data, at)
        if end is None:
            raise InvalidSvid(f"the {what} is not a sequence of DER certificates")
        found.append(_pem("CERTIFICATE", data[at:end]))
        if len(found) > MAX_CERTIFICATES:
            raise InvalidSvid(f"the {what} has more than {MAX_CERTIFICATES} certificates")
        at = end
    return b"".join(found)


def _only(data: bytes) -> bytes:
    if _end_of(data, 0) != len(data):
        raise InvalidSvid("the key is not one DER structure (PKCS #8)")
    return data


def _end_of(data: bytes, at: int) -> int | None:
    """Where the DER sequence that begins at `at` ends (X.690 §8.1). None: it is none, or is cut."""
    if len(data) - at < 2 or data[at] != _SEQUENCE:
        return None
    size, begin = data[at + 1], at + 2
    if size >= 0x80:
        count = size & 0x7F
        # Four bytes are 4 GiB; 0 would be the indefinite form, which DER does not have.
        if not 1 <= count <= 4:
            return None
        size, begin = int.from_bytes(data[begin : begin + count], "big"), begin + count
    end = begin + size
    return end if end <= len(data) else None


def _pem(label: str, der: bytes) -> bytes:
    """RFC 7468 §2: lines of 64 characters."""
    body = base64.b64encode(der)
    lines = b"\n".join(body[at : at + 64] for at in range(0, len(body), 64))
    begin, end = f"-----BEGIN {label}-----\n", f"\n-----END {label}-----\n"
    return begin.encode() + lines + end.encode()
