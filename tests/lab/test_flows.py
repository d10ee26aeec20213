"""Analysis of frames: flows are assembled correctly, TLS is distinguished from clear text, and
damage is never taken for proof.

Rules: frames are built here from scratch. TLS comes from the standard library with both ends in
memory."""

import ipaddress
import ssl
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.flows import examine, flows, parse_frame, split_records
from lab.sidecar import Authority

CLIENT, SERVER = ("10.0.0.1", 40000), ("10.0.0.2", 443)
SYN, ACK = 0x02, 0x10


def frame(
    source: tuple[str, int],
    target: tuple[str, int],
    sequence: int,
    payload: bytes = b"",
    flags: int = ACK,
) -> bytes:
    hosts = [ipaddress.ip_address(host) for host in (source[0], target[0])]
    tcp = (
        struct.pack(
            "!HHIIBBHHH", source[1], target[1], sequence % 2**32, 0, 5 << 4, flags, 1000, 0, 0
        )
        + payload
    )
    if hosts[0].version == 4:
        network = (
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0)
            + hosts[0].packed
            + hosts[1].packed
        )
        return bytes(12) + b"\x08\x00" + network + tcp
    network = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64) + hosts[0].packed + hosts[1].packed
    return bytes(12) + b"\x86\xdd" + network + tcp


def conversation(
    to_server: bytes, to_client: bytes, piece: int = 1000, start: int = 1000
) -> list[bytes]:
    frames = [
        frame(CLIENT, SERVER, start, flags=SYN),
        frame(SERVER, CLIENT, start, flags=SYN | ACK),
    ]
    for source, target, data in ((CLIENT, SERVER, to_server), (SERVER, CLIENT, to_client)):
        frames += [
            frame(source, target, start + 1 + at, data[at : at + piece])
            for at in range(0, len(data), piece)
        ]
    return frames


@pytest.fixture(scope="module")
def tls13(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return handshake(tmp_path_factory, ssl.TLSVersion.TLSv1_3)


def handshake(paths: pytest.TempPathFactory, version: ssl.TLSVersion) -> tuple[bytes, bytes]:
    """The frames of a client and a server that complete a handshake and send `secret` to each
    other."""
    authority = Authority()
    issued = authority.issue(authority.identity("shop"))
    pem = paths.mktemp("tls") / "both.pem"
    pem.write_bytes(issued.certificate_pem + issued.key_pem)
    contexts = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    contexts[0].check_hostname, contexts[0].verify_mode = False, ssl.CERT_NONE
    contexts[1].load_cert_chain(pem)
    for context in contexts:
        context.minimum_version = context.maximum_version = version
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = contexts[0].wrap_bio(wires[1], wires[0], server_hostname="shop.example")
    server = contexts[1].wrap_bio(wires[0], wires[1], server_side=True)
    # Each side's output is recorded before the other reads it.
    seen = bytearray(), bytearray()

    def move() -> None:
        for index, wire in enumerate(wires):
            data = wire.read()
            seen[index].extend(data)
            wire.write(data)

    finished: set[ssl.SSLObject] = set()
    while len(finished) < 2:
        for side in (client, server):
            try:
                side.do_handshake()
                finished.add(side)
            except ssl.SSLWantReadError:
                pass
            move()
    for side in (client, server):
        side.write(b"secret" * 100)
    seen[0].extend(wires[0].read())
    seen[1].extend(wires[1].read())
    return bytes(seen[0]), bytes(seen[1])


@pytest.mark.parametrize("piece", [1, 7, 536, 100_000])
def test_tls_13_is_recognised_however_it_is_cut(tls13: tuple[bytes, bytes], piece: int) -> None:
    (flow,) = flows(conversation(*tls13, piece=piece))
    facts = examine(flow)
    assert facts.problem is None
    assert facts.version == "TLSv1.3"
    assert facts.server_name == "shop.example"
    assert facts.cipher.startswith("TLS_")
    assert facts.group
    assert not flow.carries(b"secret")


def test_older_tls_is_a_problem(tmp_path_factory: pytest.TempPathFactory) -> None:
    (flow,) = flows(conversation(*handshake(tmp_path_factory, ssl.TLSVersion.TLSv1_2)))
    assert examine(flow).problem is not None


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("where", ["first", "last"])
def test_clear_text_anywhere_is_a_problem(
    tls13: tuple[bytes, bytes], side: int, where: str
) -> None:
    halves = list(tls13)
    clear = b"GET / HTTP/1.1\r\n\r\n"
    halves[side] = clear + halves[side] if where == "first" else halves[side] + clear
    (flow,) = flows(conversation(halves[0], halves[1]))
    assert "not TLS" in (examine(flow).problem or "")
    assert flow.carries(b"GET / HTTP")


def test_a_hole_is_a_problem_and_does_not_hide_clear_text(tls13: tuple[bytes, bytes]) -> None:
    frames = conversation(tls13[0] + b"in the clear", tls13[1], piece=200)
    del frames[3]
    (flow,) = flows(frames)
    assert "hole" in (examine(flow).problem or "")
    assert flow.carries(b"the clear")


@given(
    st.binary(min_size=1, max_size=300),
    st.integers(1, 50),
    st.randoms(use_true_random=False),
    st.integers(0, 2**32 - 1),
)
def test_order_repetition_and_wrapping_numbers_do_not_matter(
    data: bytes, piece: int, random: object, start: int
) -> None:
    first, *rest = conversation(data, b"", piece=piece, start=start)
    shuffled = [*rest, *rest[:3]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (flow,) = flows([first, *shuffled])
    assert flow.client == CLIENT
    assert flow.to_server.data() == (data, True)


def test_a_needle_across_segments_is_found() -> None:
    (flow,) = flows(conversation(b"xxxxhay-needle-hayxxxx", b"", piece=3))
    assert flow.carries(b"hay-needle-hay")


def test_ipv6_and_padding_are_understood() -> None:
    segment = parse_frame(frame(("fd00::1", 1), ("fd00::2", 2), 7, b"hello") + bytes(20))
    assert segment is not None
    assert (segment.source, segment.destination, segment.payload) == (
        "fd00::1",
        "fd00::2",
        b"hello",
    )


def test_a_reused_port_is_a_new_flow() -> None:
    found = flows([*conversation(b"one", b"1"), *conversation(b"two", b"2", start=900_000)])
    assert [flow.to_server.data()[0] for flow in found] == [b"one", b"two"]


@given(st.binary(max_size=120))
def test_no_frame_breaks_the_parser(data: bytes) -> None:
    parse_frame(data)
    parse_frame(bytes(12) + b"\x08\x00" + data)
    parse_frame(bytes(12) + b"\x86\xdd" + data)


@given(st.binary(max_size=200))
def test_no_record_breaks_the_reader(data: bytes) -> None:
    def records() -> Iterator[tuple[int, bytes]]:
        try:
            yield from split_records(b"\x16\x03\x03" + data)
        except ValueError:
            return

    list(records())
    (flow,) = flows(conversation(b"\x16\x03\x01\x00\x64" + data, data))
    examine(flow)
