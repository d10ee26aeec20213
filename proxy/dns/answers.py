"""DNS messages: from the bytes of a query to the bytes of the response. No I/O; proxy/dns/server.py
has the sockets.

The proxy parses a query up to its question only. It forwards queries for other names unchanged, so
unknown options, signatures and types pass. dnspython builds the responses. The rules are:

    A, AAAA          the service's virtual address of that family
    ANY              both (RFC 8482 would allow less)
    other types      the name exists without such records (NODATA); browsers and curl ask for HTTPS
                     and SVCB
    PTR              of a virtual address: the service's name; of an unassigned one: NXDOMAIN,
                     and the query is not forwarded
    TXT              of a name below `PROBE`: `isthmus check` detects by it that this proxy answers

Negative responses have an SOA (RFC 2308), so that caches keep them for a short time. The response
repeats the question with the same case: some clients vary the case to detect forged responses. A
query with EDNS (RFC 6891) gets a response with EDNS, and an unknown version gets BADVERS. A message
with two questions is a format error (RFC 9619). No response is longer than 512 bytes, so none is
truncated. Responses and fragments of messages are dropped silently: a response to a response could
start an endless exchange between two servers.

Applications repeat the same queries. So verdicts are cached until the directory changes. The key is
the query without its id."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset

from proxy.dns.virtual_addresses import RemoteName, VirtualAddresses
from proxy.dns.zone import Verdict, Zone

Result = Literal[
    "answered", "nodata", "nxdomain", "no_address", "malformed", "overload", "unreachable"
]

# RFC 6761: the name is reserved, and no resolver finds anything below it.
PROBE = "isthmus-check.invalid"
PROBE_TEXT = "isthmus"

_HEADER = 12  # bytes: id, flags and four counts (RFC 1035 §4.1.1)
_PAYLOAD = 1232  # largest UDP payload without fragments (DNS flag day 2020)
_NEGATIVE_TTL = 5  # seconds: clients should find a new service soon
_REMEMBERED = 1024
_MOST_REMEMBERED_BYTES = 512


@dataclass(frozen=True, slots=True)
class Reply:
    """A response of this proxy."""

    wire: bytes
    result: Result


@dataclass(frozen=True, slots=True)
class Forward:
    """Forward the query. `question`: the bytes that the response must repeat, in any case. Empty if
    they are not known."""

    question: bytes


def answers_to(answer: bytes, forward: Forward) -> bool:
    """Whether a datagram is a response to the forwarded query. The caller has compared the id.

    Servers that cannot read the question, or refuse it, may omit it in an error response."""
    if len(answer) < _HEADER or not answer[2] << 8 & dns.flags.QR:
        return False
    _, flags, questions = struct.unpack_from("!3H", answer)
    if not questions:
        return not forward.question or dns.rcode.from_flags(flags, 0) != dns.rcode.NOERROR
    repeated = answer[_HEADER : _HEADER + len(forward.question)]
    # Compare type and class exactly. The length bytes of labels are not letters, so lower() keeps
    # them.
    return repeated[-4:] == forward.question[-4:] and repeated.lower() == forward.question.lower()


class Answers:
    """The responses for one snapshot of the directory. `ttl`: seconds, for positive responses."""

    def __init__(self, zone: Zone, virtual: VirtualAddresses, ttl: float) -> None:
        self._zone = zone
        self._virtual = virtual
        self._ttl = round(ttl)
        self._remembered: dict[bytes, Reply | Forward | None] = {}

    def answer(self, wire: bytes) -> Reply | Forward | None:
        """What to do with a query. None: drop it. Never raises, whatever the bytes."""
        if len(wire) < _HEADER:
            return None
        key = wire[2:]
        if (found := self._remembered.get(key)) is not None:
            return (
                Reply(wire[:2] + found.wire[2:], found.result)
                if isinstance(found, Reply)
                else found
            )
        found = self._judge(wire)
        if found is not None and len(key) <= _MOST_REMEMBERED_BYTES:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = found
        return found

    def _judge(self, wire: bytes) -> Reply | Forward | None:
        if wire[2] << 8 & dns.flags.QR:
            return None
        try:
            message = dns.message.from_wire(wire, question_only=True)
            if message.opcode() != dns.opcode.QUERY or not message.question:
                return Forward(b"")
            if len(message.question) > 1:
                return Reply(failure(wire, dns.rcode.FORMERR), "malformed")
            question = message.question[0]
            _, length = dns.name.from_wire(wire, _HEADER)
        except dns.exception.DNSException:
            return Reply(failure(wire, dns.rcode.FORMERR), "malformed")
        forward = Forward(wire[_HEADER : _HEADER + length + 4])
        if question.rdclass != dns.rdataclass.IN:
            return forward
        fill = self._words(question.name, question.rdtype)
        return forward if fill is None else _reply(wire, fill)

    def _words(
        self, name: dns.name.Name, kind: dns.rdatatype.RdataType
    ) -> Callable[[dns.message.Message], Result] | None:
        """A function that fills the response to a question. None: forward the query."""
        labels = [label.decode("latin-1") for label in name.labels if label]
        if labels and labels[-1].lower() == "arpa":
            return self._reverse(name, kind)
        if ".".join(labels[-2:]).lower() == PROBE:
            text = [f'"{PROBE_TEXT}"'] if kind == dns.rdatatype.TXT else []
            return lambda message: self._found(message, name, {dns.rdatatype.TXT: text})
        verdict = self._zone.judge(labels)
        match verdict:
            case Verdict.FORWARD:
                return None
            case Verdict.NXDOMAIN | Verdict.NODATA:
                return lambda message: _negative(message, dns.name.Name(name.labels[-2:]), verdict)
        return lambda message: self._addresses(message, name, kind, verdict)

    def _addresses(
        self,
        message: dns.message.Message,
        name: dns.name.Name,
        kind: dns.rdatatype.RdataType,
        meant: RemoteName,
    ) -> Result:
        hosts = self._virtual.addresses(meant)
        if not hosts:
            message.set_rcode(dns.rcode.SERVFAIL)
            return "no_address"
        found = {
            dns.rdatatype.A: [h for h in hosts if ":" not in h],
            dns.rdatatype.AAAA: [h for h in hosts if ":" in h],
        }
        return self._found(
            message,
            name,
            {own: texts for own, texts in found.items() if kind in (own, dns.rdatatype.ANY)},
        )

    def _reverse(
        self, name: dns.name.Name, kind: dns.rdatatype.RdataType
    ) -> Callable[[dns.message.Message], Result] | None:
        try:
            host = dns.reversename.to_address(name)
            host = str(ipaddress.ip_address(host))
        except (dns.exception.DNSException, ValueError):
            return None
        if not self._virtual.covers(host):
            return None
        remote = self._virtual.lookup(host)
        if remote is None or not self._virtual.addresses(remote):
            return lambda message: _negative(message, name, Verdict.NXDOMAIN)
        texts = [f"{remote}."] if kind in (dns.rdatatype.PTR, dns.rdatatype.ANY) else []
        return lambda message: self._found(message, name, {dns.rdatatype.PTR: texts})

    def _found(
        self,
        message: dns.message.Message,
        name: dns.name.Name,
        records: dict[dns.rdatatype.RdataType, list[str]],
    ) -> Result:
        for kind, texts in records.items():
            if texts:
                message.answer.append(
                    dns.rrset.from_text_list(name, self._ttl, dns.rdataclass.IN, kind, texts)
                )
        return "answered" if message.answer else _negative(message, name, Verdict.NODATA)


def _reply(wire: bytes, fill: Callable[[dns.message.Message], Result]) -> Reply:
    try:
        query = dns.message.from_wire(wire)
    except (
        dns.exception.DNSException
    ):  # invalid data after the question, or a signature with an unknown key
        return Reply(failure(wire, dns.rcode.FORMERR), "malformed")
    message = dns.message.make_response(query, recursion_available=True, our_payload=_PAYLOAD)
    message.flags |= dns.flags.AA
    if query.edns > 0:
        message.set_rcode(dns.rcode.BADVERS)
        return Reply(message.to_wire(), "malformed")
    result = fill(message)
    return Reply(message.to_wire(), result)


def _negative(message: dns.message.Message, zone: dns.name.Name, verdict: Verdict) -> Result:
    if verdict is Verdict.NXDOMAIN:
        message.set_rcode(dns.rcode.NXDOMAIN)
    start = f"ns.isthmus.invalid. hostmaster.isthmus.invalid. 1 3600 600 86400 {_NEGATIVE_TTL}"
    message.authority.append(
        dns.rrset.from_text(zone, _NEGATIVE_TTL, dns.rdataclass.IN, dns.rdatatype.SOA, start)
    )
    return "nxdomain" if verdict is Verdict.NXDOMAIN else "nodata"


def failure(wire: bytes, code: dns.rcode.Rcode) -> bytes:
    """An error response to a query of at least twelve bytes, with the parts of the query that can
    be parsed."""
    message = dns.message.Message(int.from_bytes(wire[:2], "big"))
    message.flags = dns.flags.Flag(dns.flags.QR)
    for question_only in (False, True):
        with suppress(dns.exception.DNSException):
            query = dns.message.from_wire(wire, question_only=question_only)
            message = dns.message.make_response(
                query, recursion_available=True, our_payload=_PAYLOAD
            )
            break
    message.question = message.question[:1]
    message.set_rcode(code)
    return message.to_wire()
