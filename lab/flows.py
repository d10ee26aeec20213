"""Analyses captured traffic: frames -> TCP flows -> TLS records. Pure: bytes in, facts out.

A flow is assembled by the sequence numbers of its segments (RFC 9293, section 3.4), so
retransmissions and reordering do not matter. A gap ends the known part of that direction and is
reported. TLS is recognised by its records (RFC 8446, section 5.1) and by the two hellos, the only
clear text of TLS 1.3; they name version, cipher suite and group.
"""

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

CIPHER_SUITES = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
}
GROUPS = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x0019: "secp521r1",
    0x001D: "X25519",
    0x001E: "X448",
    0x11EC: "X25519MLKEM768",
}
TLS13 = 0x0304
_SERVER_NAME, _SUPPORTED_VERSIONS, _KEY_SHARE = 0, 43, 51
_MAX_RECORD = 2**14 + 256  # bytes of an encrypted record (RFC 8446, section 5.2)
# The "random" of a ServerHello that is a HelloRetryRequest (RFC 8446, section 4.1.3).
_RETRY = bytes.fromhex("CF21AD74E59A6111BE1D8C021E65B891C2A211167ABB8C5E079E09E2C8A8339C")


class Segment(NamedTuple):
    """One TCP segment."""

    source: str
    source_port: int
    destination: str
    destination_port: int
    sequence: int
    flags: int
    payload: bytes

    @property
    def syn(self) -> bool:
        return bool(self.flags & 0x02)


def parse_frame(frame: bytes) -> Segment | None:
    """The TCP segment of an Ethernet frame; None for everything else (ARP, UDP, ICMP, fragments,
    truncated frames).
    """
    try:
        kind = int.from_bytes(frame[12:14])
        if kind == 0x0800 and frame[14] >> 4 == 4 and frame[23] == 6:
            if int.from_bytes(frame[20:22]) & 0x3FFF:
                return None  # a fragment; the lab's links have one MTU, so there are none
            start, end = 14 + (frame[14] & 15) * 4, 14 + int.from_bytes(frame[16:18])
            hosts = frame[26:30], frame[30:34]
        elif kind == 0x86DD and frame[20] == 6:
            start, end = 54, 54 + int.from_bytes(frame[18:20])
            hosts = frame[22:38], frame[38:54]
        else:
            return None
        source_port, destination_port, sequence = struct.unpack_from("!HHI", frame, start)
        payload = frame[start + (frame[start + 12] >> 4) * 4 : end]
        flags = frame[start + 13]
    except (IndexError, struct.error):
        return None
    source, destination = (str(ipaddress.ip_address(host)) for host in hosts)
    return Segment(source, source_port, destination, destination_port, sequence, flags, payload)


@dataclass(slots=True)
class Direction:
    """One half of a flow."""

    first: int | None = None  # sequence number of the first byte; None until it is known
    pieces: list[tuple[int, bytes]] = field(default_factory=list)

    def add(self, segment: Segment) -> None:
        if segment.syn:
            self.first = (segment.sequence + 1) & 0xFFFFFFFF
        if segment.payload:
            self.pieces.append((segment.sequence, segment.payload))

    def data(self) -> tuple[bytes, bool]:
        """The bytes in order, and whether they are complete (no gap, and the beginning was
        captured).
        """
        if not self.pieces:
            return b"", True
        first = self.first if self.first is not None else self.pieces[0][0]
        out = bytearray()
        # Offsets modulo 2**32, as signed numbers: a retransmission from before the capture began is
        # negative.
        offsets = sorted(
            (((sequence - first + 2**31) & 0xFFFFFFFF) - 2**31, payload)
            for sequence, payload in self.pieces
        )
        for offset, payload in offsets:
            if offset > len(out):
                return bytes(out), False
            if offset + len(payload) > len(out):
                out += payload[len(out) - offset :]
        return bytes(out), self.first is not None


@dataclass(slots=True)
class Flow:
    """A TCP connection as captured; the client is the sender of the first SYN (or of the first
    captured segment).
    """

    client: tuple[str, int]
    server: tuple[str, int]
    to_server: Direction = field(default_factory=Direction)
    to_client: Direction = field(default_factory=Direction)

    @property
    def name(self) -> str:
        return f"{self.client[0]} port {self.client[1]} -> {self.server[0]} port {self.server[1]}"

    def carries(self, needle: bytes) -> bool:
        """Whether these bytes are in the flow, in either direction; data after a gap is searched
        too.
        """
        halves = (self.to_server, self.to_client)
        return any(
            needle in half.data()[0] or any(needle in payload for _, payload in half.pieces)
            for half in halves
        )


def flows(frames: Iterable[bytes]) -> list[Flow]:
    """The TCP connections in these frames, in the order of their first segments. A reused port
    starts a new one.
    """
    found: list[Flow] = []
    current: dict[tuple[tuple[str, int], tuple[str, int]], Flow] = {}
    for segment in filter(None, map(parse_frame, frames)):
        source, destination = (
            (segment.source, segment.source_port),
            (segment.destination, segment.destination_port),
        )
        flow = current.get((source, destination)) or current.get((destination, source))
        opens = segment.flags & 0x12 == 0x02  # SYN without ACK
        if flow is None or (opens and flow.to_client.pieces):
            flow = Flow(source, destination)
            current.pop((destination, source), None)
            current[(source, destination)] = flow
            found.append(flow)
        (flow.to_server if source == flow.client else flow.to_client).add(segment)
    return found


@dataclass(slots=True)
class TLSFacts:
    """The facts about a flow. `problem` is None if all of it is TLS 1.3."""

    problem: str | None = None
    server_name: str = ""
    version: str = ""
    cipher: str = ""
    group: str = ""
    key_shares: int = 0  # sent by the client in its first hello
    records: int = 0


def examine(flow: Flow) -> TLSFacts:
    """Check whether a flow is TLS 1.3 from its first byte to its last."""
    facts = TLSFacts()
    facts.problem = _examine(flow, facts)
    return facts


def _examine(flow: Flow, facts: TLSFacts) -> str | None:
    for side, half in (("client", flow.to_server), ("server", flow.to_client)):
        data, complete = half.data()
        if not complete:
            return f"the capture has a hole in what the {side} sent"
        try:
            records = list(split_records(data))
            facts.records += len(records)
            if not records:
                continue  # the connection was closed before this side sent anything
            _hello(records[0], facts)
        except ValueError as error:
            return f"what the {side} sent is not TLS: {error}"
    if facts.version and facts.version != "TLSv1.3":
        return f"the server chose {facts.version}"
    return None


def split_records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, body) of each TLS record; the last may be truncated. Raises ValueError at the first
    byte that is not a record.
    """
    position = 0
    while position < len(data):
        header = data[position : position + 5]
        if len(header) < 5:
            return
        kind, version, length = struct.unpack("!BHH", header)
        if (
            kind not in (20, 21, 22, 23)
            or version not in (0x0301, 0x0303)
            or not 0 < length <= _MAX_RECORD
        ):
            raise ValueError(f"at byte {position} stands {data[position : position + 24]!r}")
        if position == 0 and kind not in (21, 22):
            raise ValueError(f"it begins with a record of type {kind}")
        yield kind, data[position + 5 : position + 5 + length]
        position += 5 + length


def _hello(record: tuple[int, bytes], facts: TLSFacts) -> None:
    """Note what a ClientHello or ServerHello says (RFC 8446, section 4.1).  Raises ValueError when
    it is neither."""
    kind, body = record
    if kind == 21:
        return  # an alert as the first record: a rejection
    try:
        position = 4 + 2 + 32
        position += 1 + body[position]
        if body[0] == 1:
            position += 2 + int.from_bytes(body[position : position + 2])
            position += 1 + body[position]
            _client_extensions(dict(_extensions(body[position:])), facts)
        elif body[0] == 2:
            suite = int.from_bytes(body[position : position + 2])
            facts.cipher = CIPHER_SUITES.get(suite, f"{suite:#06x}")
            _server_extensions(dict(_extensions(body[position + 3 :])), facts)
            if body[6:38] == _RETRY:
                facts.group += " (requested)"
        else:
            raise ValueError(f"the first handshake message has type {body[0]}")
    except (IndexError, struct.error):
        raise ValueError("the first handshake message is cut off") from None


def _extensions(block: bytes) -> Iterator[tuple[int, bytes]]:
    end = 2 + int.from_bytes(block[:2])
    position = 2
    while position < end:
        kind, length = struct.unpack_from("!HH", block, position)
        yield kind, block[position + 4 : position + 4 + length]
        position += 4 + length


def _client_extensions(extensions: dict[int, bytes], facts: TLSFacts) -> None:
    versions = extensions.get(_SUPPORTED_VERSIONS, b"\0")[1:]
    offered = {int.from_bytes(versions[i : i + 2]) for i in range(0, len(versions), 2)}
    if TLS13 not in offered:
        raise ValueError("the ClientHello does not offer TLS 1.3")
    facts.server_name = extensions.get(_SERVER_NAME, b"")[5:].decode("ascii", errors="replace")
    facts.key_shares = sum(
        1 for _ in _extensions(extensions.get(_KEY_SHARE, b"\0\0"))
    )  # which are laid out in the same way


def _server_extensions(extensions: dict[int, bytes], facts: TLSFacts) -> None:
    chosen = int.from_bytes(extensions.get(_SUPPORTED_VERSIONS, b"\x03\x03"))
    facts.version = {TLS13: "TLSv1.3", 0x0303: "TLSv1.2 or older"}.get(chosen, f"{chosen:#06x}")
    group = int.from_bytes(extensions.get(_KEY_SHARE, b"")[:2])
    # A resumed session may do without a key share (RFC 8446, section 2.2).
    facts.group = GROUPS.get(group, f"{group:#06x}") if group else "none (pre-shared key only)"
