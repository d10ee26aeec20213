"""DNS messages: what to say to a question, from its bytes to the bytes of the answer. Pure; the sockets are proxy/dns/server.py's.

A query is looked at as far as its question and no further, and what is not for us is forwarded in its own bytes: options, signatures
and types that nobody here has heard of pass. Answers are made by dnspython; what we decide is small:

    A, AAAA          the service's virtual address of that family
    ANY              both (RFC 8482 would allow less)
    other types      the name exists, and has none (NODATA); HTTPS and SVCB are what browsers and curl ask for
    PTR              of a virtual address: the service's name; of one that nobody has: NXDOMAIN, and the question stays here
    TXT              of a name below `PROBE`: how `isthmus check` knows that it is us who answer

Negative answers have an SOA (RFC 2308), so that caches keep them, and not for long. The question comes back as it was asked, letter by
letter: some clients vary the case against forgers. EDNS (RFC 6891) is answered by EDNS, a version that we do not know by BADVERS. Two
questions in one message are a format error (RFC 9619). No answer of ours is longer than 512 bytes, so none is ever truncated. Responses
and fragments are dropped without a word: an answer to an answer is how two servers begin to talk for ever.

Applications ask the same questions again and again: verdicts are remembered, by the bytes of the query behind its id, as long as the
directory stays the same.
"""

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

Result = Literal["answered", "nodata", "nxdomain", "no_address", "malformed", "overload", "unreachable"]

# RFC 6761: nobody's name, and no resolver may find anything below it.
PROBE = "isthmus-check.invalid"
PROBE_TEXT = "isthmus"

_HEADER = 12  # bytes: id, flags and four counts (RFC 1035 §4.1.1)
_PAYLOAD = 1232  # what we take over UDP without fragments (DNS flag day 2020)
_NEGATIVE_TTL = 5  # seconds: a service that has just been added should be found soon
_REMEMBERED = 1024
_MOST_REMEMBERED_BYTES = 512


@dataclass(frozen=True, slots=True)
class Reply:
    """Our own answer."""

    wire: bytes
    result: Result


@dataclass(frozen=True, slots=True)
class Forward:
    """Not ours. `question` are the bytes that the answer has to repeat, in whatever case; none where we do not know what to expect."""

    question: bytes


def answers_to(answer: bytes, forward: Forward) -> bool:
    """Whether a datagram, of which the id has been compared, is a response to what was passed on.

    Servers that cannot read a question, or do not want to, may leave it out when they say so.
    """
    if len(answer) < _HEADER or not answer[2] << 8 & dns.flags.QR:
        return False
    _, flags, questions = struct.unpack_from("!3H", answer)
    if not questions:
        return not forward.question or dns.rcode.from_flags(flags, 0) != dns.rcode.NOERROR
    repeated = answer[_HEADER : _HEADER + len(forward.question)]
    # The type and the class are compared as they are; no byte of a label's length is a letter.
    return repeated[-4:] == forward.question[-4:] and repeated.lower() == forward.question.lower()


class Answers:
    """What we say, by one snapshot of the directory. `ttl` is in seconds, of positive answers."""

    def __init__(self, zone: Zone, virtual: VirtualAddresses, ttl: float) -> None:
        self._zone = zone
        self._virtual = virtual
        self._ttl = round(ttl)
        self._remembered: dict[bytes, Reply | Forward | None] = {}

    def answer(self, wire: bytes) -> Reply | Forward | None:
        """What becomes of a query; None: it is dropped. Never fails, whatever the bytes."""
        if len(wire) < _HEADER:
            return None
        key = wire[2:]
        if (found := self._remembered.get(key)) is not None:
            return Reply(wire[:2] + found.wire[2:], found.result) if isinstance(found, Reply) else found
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
            asked = message.question[0]
            _, length = dns.name.from_wire(wire, _HEADER)
        except dns.exception.DNSException:
            return Reply(failure(wire, dns.rcode.FORMERR), "malformed")
        forward = Forward(wire[_HEADER : _HEADER + length + 4])
        if asked.rdclass != dns.rdataclass.IN:
            return forward
        say = self._words(asked.name, asked.rdtype)
        return forward if say is None else _reply(wire, say)

    def _words(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> Callable[[dns.message.Message], Result] | None:
        """What fills the answer to a question; None: it is not for us."""
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

    def _addresses(self, message: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType, meant: RemoteName) -> Result:
        hosts = self._virtual.addresses(meant)
        if not hosts:
            message.set_rcode(dns.rcode.SERVFAIL)
            return "no_address"
        found = {dns.rdatatype.A: [h for h in hosts if ":" not in h], dns.rdatatype.AAAA: [h for h in hosts if ":" in h]}
        return self._found(message, name, {own: texts for own, texts in found.items() if kind in (own, dns.rdatatype.ANY)})

    def _reverse(self, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> Callable[[dns.message.Message], Result] | None:
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

    def _found(self, message: dns.message.Message, name: dns.name.Name, records: dict[dns.rdatatype.RdataType, list[str]]) -> Result:
        for kind, texts in records.items():
            if texts:
                message.answer.append(dns.rrset.from_text_list(name, self._ttl, dns.rdataclass.IN, kind, texts))
        return "answered" if message.answer else _negative(message, name, Verdict.NODATA)


def _reply(wire: bytes, say: Callable[[dns.message.Message], Result]) -> Reply:
    try:
        query = dns.message.from_wire(wire)
    except dns.exception.DNSException:  # what stands behind the question is no message, or is signed by a key that we do not have
        return Reply(failure(wire, dns.rcode.FORMERR), "malformed")
    message = dns.message.make_response(query, recursion_available=True, our_payload=_PAYLOAD)
    message.flags |= dns.flags.AA
    if query.edns > 0:
        message.set_rcode(dns.rcode.BADVERS)
        return Reply(message.to_wire(), "malformed")
    result = say(message)
    return Reply(message.to_wire(), result)


def _negative(message: dns.message.Message, zone: dns.name.Name, verdict: Verdict) -> Result:
    if verdict is Verdict.NXDOMAIN:
        message.set_rcode(dns.rcode.NXDOMAIN)
    start = f"ns.isthmus.invalid. nobody.isthmus.invalid. 1 3600 600 86400 {_NEGATIVE_TTL}"
    message.authority.append(dns.rrset.from_text(zone, _NEGATIVE_TTL, dns.rdataclass.IN, dns.rdatatype.SOA, start))
    return "nxdomain" if verdict is Verdict.NXDOMAIN else "nodata"


def failure(wire: bytes, code: dns.rcode.Rcode) -> bytes:
    """A response to a query of at least twelve bytes that says only that it failed, with what of the query can be read."""
    message = dns.message.Message(int.from_bytes(wire[:2], "big"))
    message.flags = dns.flags.Flag(dns.flags.QR)
    for question_only in (False, True):
        with suppress(dns.exception.DNSException):
            query = dns.message.from_wire(wire, question_only=question_only)
            message = dns.message.make_response(query, recursion_available=True, our_payload=_PAYLOAD)
            break
    message.question = message.question[:1]
    message.set_rcode(code)
    return message.to_wire()
