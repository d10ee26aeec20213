"""Answers to queries.

Rules: any bytes lead to an answer, to forwarding of the query, or to nothing, and never to an
exception. An answer repeats the question as it was asked. A query for a foreign name is forwarded,
whatever else the message contains. dnspython parses the answers."""

from __future__ import annotations

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.tsigkeyring
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.dns.answers import PROBE, Answers, Forward, Reply, answers_to, failure
from proxy.dns.virtual_addresses import VirtualAddresses
from proxy.dns.zone import Zone
from tests.dns.documents import SEARCH, document
from tests.dns.ranges import RANGES
from tests.dns.stage import FOUR, SIX, made

ANSWERS = made()


def query(name: str, kind: str = "A", **more: object) -> dns.message.Message:
    return dns.message.make_query(name, kind, **more)  # type: ignore[arg-type]


def ask(question: dns.message.Message, answers: Answers = ANSWERS) -> dns.message.Message:
    reply = answers.answer(question.to_wire())
    assert isinstance(reply, Reply)
    answer = dns.message.from_wire(reply.wire)
    assert question.is_response(answer)
    return answer


def texts(answer: dns.message.Message) -> list[str]:
    return [record.to_text() for rrset in answer.answer for record in rrset]


@pytest.mark.parametrize(("kind", "found"), [("A", [FOUR]), ("AAAA", [SIX]), ("ANY", [FOUR, SIX])])
def test_a_name_has_the_services_virtual_addresses(kind: str, found: list[str]) -> None:
    answer = ask(query("c.east", kind))
    assert texts(answer) == found
    assert answer.rcode() == dns.rcode.NOERROR
    assert answer.flags & dns.flags.AA
    assert answer.flags & dns.flags.RA
    assert {rrset.ttl for rrset in answer.answer} == {30}


@pytest.mark.parametrize(
    "kind", ["MX", "HTTPS", "SVCB", "TXT", "SRV", "NS", "SOA", "CNAME", "TYPE65280"]
)
def test_other_types_exist_without_data_and_say_for_how_long(kind: str) -> None:
    answer = ask(query("c.east.default.svc.cluster.local", kind))
    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    (soa,) = answer.authority
    assert soa.rdtype == dns.rdatatype.SOA
    assert 0 < soa.ttl <= 30
    assert answer.question[0].name.is_subdomain(soa.name)


def test_unknown_names_of_a_mesh_zone_do_not_exist() -> None:
    answer = ask(query("gone.east"))
    assert answer.rcode() == dns.rcode.NXDOMAIN
    (soa,) = answer.authority
    assert soa.name == dns.name.from_text("east.")


def test_the_question_comes_back_letter_by_letter() -> None:
    question = query("C.eAsT").to_wire()
    reply = ANSWERS.answer(question)
    assert isinstance(reply, Reply)
    assert question[12:] in reply.wire
    assert dns.message.from_wire(reply.wire).answer[0].name.to_text() == "C.eAsT."


def test_edns_is_answered_by_edns_and_nothing_else_is() -> None:
    answer = ask(query("c.east", use_edns=0, payload=4096, want_dnssec=True))
    assert answer.edns == 0
    assert answer.payload == 1232
    assert ask(query("c.east")).edns == -1
    answer = ask(query("c.east", use_edns=1))
    assert answer.rcode() == dns.rcode.BADVERS
    assert answer.edns == 0
    assert not answer.answer


def test_virtual_addresses_have_names_and_others_of_the_range_have_none() -> None:
    for host in (FOUR, SIX):
        assert texts(ask(query(str(dns.reversename.from_address(host)), "PTR"))) == [
            "c.default.east."
        ]
    assert (
        ask(query(str(dns.reversename.from_address("240.0.0.7")), "PTR")).rcode()
        == dns.rcode.NXDOMAIN
    )
    assert ask(query(str(dns.reversename.from_address(FOUR)), "A")).rcode() == dns.rcode.NOERROR
    for name in (
        dns.reversename.from_address("10.0.0.1"),
        "240.in-addr.arpa",
        "x.ip6.arpa",
        "arpa",
        "1.2.3.4.5.in-addr.arpa",
        "home.arpa",
    ):
        assert isinstance(ANSWERS.answer(query(str(name), "PTR").to_wire()), Forward)


def test_the_probe_is_answered_here_and_never_passed_on() -> None:
    assert texts(ask(query(f"x1.{PROBE}", "TXT"))) == ['"isthmus"']
    assert ask(query(PROBE, "A")).rcode() == dns.rcode.NOERROR


def test_two_questions_are_a_format_error() -> None:
    question = query("c.east")
    question.question += query("example.com").question
    reply = ANSWERS.answer(question.to_wire())
    assert isinstance(reply, Reply)
    answer = dns.message.from_wire(reply.wire)
    assert answer.rcode() == dns.rcode.FORMERR
    assert answer.id == question.id


def test_names_beyond_the_bound_are_a_failure_and_not_a_lie() -> None:
    answers = made(most=1)
    codes = {ask(query(name), answers).rcode() for name in ("c.east", "db.shop.east")}
    assert codes == {dns.rcode.NOERROR, dns.rcode.SERVFAIL}


def other_people_s() -> list[dns.message.Message]:
    plain = [
        query("example.com"),
        query("www.example.com", "HTTPS"),
        query(".", "NS"),
        query("c.east", rdclass=dns.rdataclass.CH),
    ]
    signed = query("example.com")
    signed.use_tsig(dns.tsigkeyring.from_text({"key.": "c2VjcmV0"}))
    optioned = query(
        "example.com",
        use_edns=0,
        options=[dns.edns.GenericOption(dns.edns.OptionType.make(65001), b"x" * 100)],
    )
    update = dns.message.from_text("id 1\nopcode UPDATE\n;ZONE\neast. IN SOA\n")
    empty = dns.message.Message()
    return [*plain, signed, optioned, update, empty]


@pytest.mark.parametrize("message", other_people_s(), ids=lambda message: str(message.question[:1]))
def test_foreign_queries_are_forwarded_whatever_they_contain(message: dns.message.Message) -> None:
    assert isinstance(ANSWERS.answer(message.to_wire()), Forward)


def test_a_malformed_query_for_a_foreign_name_is_passed_on_too() -> None:
    wire = query("example.com").to_wire() + b"what is this?"
    assert isinstance(ANSWERS.answer(wire), Forward)
    ours = ANSWERS.answer(query("c.east").to_wire() + b"what is this?")
    assert isinstance(ours, Reply)
    assert ours.result == "malformed"


def test_responses_and_fragments_are_dropped() -> None:
    response = query("c.east")
    response.flags |= dns.flags.QR
    assert ANSWERS.answer(response.to_wire()) is None
    for wire in (b"", b"x", query("c.east").to_wire()[:11]):
        assert ANSWERS.answer(wire) is None


def test_remembered_verdicts_have_the_id_of_the_question_and_change_with_the_directory() -> None:
    question = query("c.east")
    assert ask(question).id == question.id
    question.id ^= 0xFFFF
    assert ask(question).id == question.id
    gone = Answers(
        Zone(document(remote=()), "default", SEARCH), VirtualAddresses(RANGES, 1, 60, lambda: 0), 30
    )
    assert ask(question, gone).rcode() == dns.rcode.NXDOMAIN


def test_a_flood_of_different_questions_does_not_fill_the_memory() -> None:
    answers = made()
    for number in range(5000):
        answers.answer(query(f"n{number}.east").to_wire())
    assert len(answers._remembered) <= 1024


parts = [
    b"c",
    b"C",
    b"east",
    b"default",
    b"svc",
    b"cluster",
    b"local",
    b"arpa",
    b"ip6",
    b"\xff.",
    b"x" * 63,
]
names = st.lists(st.sampled_from(parts), max_size=7)
questions = st.builds(
    lambda labels, kind, number, flags: (
        number.to_bytes(2, "big") + flags.to_bytes(2, "big") + bytes([0, 1, 0, 0, 0, 0, 0, 0])
        + b"".join(bytes([len(label)]) + label for label in labels) + b"\0" + kind.to_bytes(2, "big") + b"\0\x01"
    ),
    names, st.sampled_from([1, 28, 12, 16, 255, 65, 0, 65535]), st.integers(0, 65535), st.sampled_from([0, 0x0100, 0x2800, 0x8000, 0x0110]),
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    wire = bytearray(draw(questions) + draw(st.binary(max_size=40)))
    for _ in range(draw(st.integers(0, 4))):
        wire[draw(st.integers(0, len(wire) - 1))] = draw(st.integers(0, 255))
    return bytes(wire[: draw(st.integers(0, len(wire)))]) if draw(st.booleans()) else bytes(wire)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=600) | questions | mutated())
@example(b"\0" * 12)
@example(b"\0\0\0\0\0\1" + b"\0" * 6 + b"\xc0\x0c\0\1\0\1")
def test_any_bytes_are_answered_passed_on_or_dropped(wire: bytes) -> None:
    judged = made().answer(wire)
    if isinstance(judged, Reply):
        answer = dns.message.from_wire(judged.wire)
        assert judged.wire[:2] == wire[:2]
        assert answer.flags & dns.flags.QR
        assert len(judged.wire) <= 512
        assert len(answer.question) <= 1
    elif isinstance(judged, Forward):
        assert judged.question in wire
        # Answers of a resolver to it are recognised, and so is the refusal that the proxy makes
        # itself.
        assert answers_to(wire[:2] + bytes([wire[2] | 0x80]) + wire[3:], judged)
        assert answers_to(failure(wire, dns.rcode.SERVFAIL), Forward(judged.question))


@settings(max_examples=200)
@given(st.binary(max_size=100), st.binary(max_size=60))
def test_any_bytes_are_an_answer_or_not(answer: bytes, question: bytes) -> None:
    assert isinstance(answers_to(answer, Forward(question)), bool)


def test_a_response_to_another_question_is_ignored() -> None:
    asked = ANSWERS.answer(query("www.example.com").to_wire())
    assert isinstance(asked, Forward)

    def response(name: str, kind: str = "A") -> bytes:
        return dns.message.make_response(query(name, kind)).to_wire()

    assert answers_to(response("www.example.com"), asked)
    assert answers_to(response("WWW.Example.com"), asked)
    assert not answers_to(response("www.example.org"), asked)
    assert not answers_to(response("www.example.com", "AAAA"), asked)
    assert not answers_to(query("www.example.com").to_wire(), asked)
    silent = dns.message.Message()
    silent.flags |= dns.flags.QR
    assert not answers_to(silent.to_wire(), asked)
    silent.set_rcode(dns.rcode.FORMERR)
    assert answers_to(silent.to_wire(), asked)
