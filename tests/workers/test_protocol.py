"""What is the same in all workers of a proxy, what is divided among them, and the messages to
them."""

from __future__ import annotations

import os
import socket

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from loopguard import OwnConnections, OwnListeners
from proxy.config.load import load
from proxy.config.schema import Config
from proxy.errors import LoopDetected
from proxy.exchange.exchange import ConnectionInfo
from proxy.flows.loop_guard import LoopGuard
from proxy.net.address import Address
from proxy.net.liveness import Liveness
from proxy.process.listeners import listen
from proxy.settings.sources import ConfigError
from proxy.telemetry.metrics import Metrics
from proxy.workers.connection_table import SharedConnectionTable, make, wipe
from proxy.workers.protocol import (
    ProcessGone,
    Start,
    WorkerInfo,
    read_start,
    receive,
    send,
    share,
    start_message,
)


def configured(**environ: str) -> Config:
    return load(None, {f"ISTHMUS_{name}": value for name, value in environ.items()})


def test_what_bounds_the_whole_proxy_is_divided_and_rounded_up() -> None:
    whole = configured(
        WORKERS="3",
        OUTBOUND__MAX_CONNECTIONS="10",
        POOL__MAX_IDLE_PER_ENDPOINT="0",
        DNS__MAX_IN_FLIGHT="512",
    )
    part = share(whole)
    assert part.outbound.max_connections == 4
    assert part.inbound.max_connections == 3334
    assert part.gateway.max_connections == 3334
    assert part.pool.max_connections_per_endpoint == 342
    assert part.pool.max_idle_per_endpoint == 0
    assert part.loops.max_self_calls == 86
    assert part.dns is not None
    assert (part.dns.max_in_flight, part.dns.max_connections) == (171, 22)
    assert part.admin.listen == ()
    assert part.http == whole.http


def test_without_names_there_is_no_share_of_them() -> None:
    assert share(configured(WORKERS="2")).dns is None


def test_a_worker_gets_the_whole_configuration() -> None:
    config = configured(
        WORKERS="2",
        INBOUND__ALLOW="{8080: ['spiffe://cluster.local/ns/*']}",
        INBOUND__REQUIRE_IDENTITY="[8080]",
        IDENTITY__CERTIFICATE="/c",
        IDENTITY__KEY="/k",
        IDENTITY__ROOTS="['/r']",
        DNS__TTL="3s",
    )
    start = Start(2, config, b"s" * 32)
    assert read_start(start_message(start)) == start


@pytest.mark.parametrize("setting", ["OUTBOUND__LISTEN", "INBOUND__LISTEN", "DNS__LISTEN"])
def test_an_ephemeral_port_is_a_mistake_where_all_workers_need_the_same(
    setting: str,
) -> None:
    listen = {setting: "['127.0.0.1:0']"}
    assert configured(**listen).workers == 1
    with pytest.raises(ConfigError, match="another port for each of the 2 workers"):
        configured(WORKERS="2", **listen)
    assert configured(WORKERS="2", ADMIN__LISTEN="['127.0.0.1:0']").workers == 2


@pytest.mark.parametrize("number", ["0", "257", "two"])
def test_a_number_of_workers_that_cannot_be_is_a_mistake(number: str) -> None:
    with pytest.raises(ConfigError, match="workers"):
        configured(WORKERS=number)


def test_a_token_that_one_worker_has_made_is_known_to_the_others_and_to_no_other_proxy() -> None:
    config, listeners = configured(), OwnListeners(frozenset({4140}), frozenset({"10.0.0.1"}))

    def token(worker: WorkerInfo | None) -> bytes:
        ((_, token),) = LoopGuard(config, listeners, Metrics(), worker).fields(b"GET", b"shop:80")
        return token

    one, other = two_tables()
    assert token(WorkerInfo(1, b"a" * 32, one)) == token(WorkerInfo(2, b"a" * 32, other))
    assert token(WorkerInfo(1, b"a" * 32, one)) != token(WorkerInfo(1, b"b" * 32, one))
    assert token(None) != token(None)


def two_tables() -> tuple[SharedConnectionTable, SharedConnectionTable]:
    memory = make(2)
    tables = (
        SharedConnectionTable(memory, 1, b"s" * 32),
        SharedConnectionTable(memory, 2, b"s" * 32),
    )
    os.close(memory)
    return tables


HERE, THERE, ELSEWHERE = (
    Address("10.1.0.5", 40000),
    Address("10.1.0.9", 8080),
    Address("fd00::9", 8080),
)


def test_a_connection_that_one_worker_has_opened_is_known_to_the_others() -> None:
    one, other = two_tables()
    one[HERE, THERE] = 2
    assert one.get((HERE, THERE), 0) == other.get((HERE, THERE), 0) == 2
    assert other.get((HERE, ELSEWHERE), 0) == other.get((THERE, HERE), 0) == 0
    other.pop((HERE, THERE), None)
    assert other.get((HERE, THERE), 0) == 2, "only its owner closes it"
    one.pop((HERE, THERE), None)
    one.pop((HERE, THERE), None)
    assert one.get((HERE, THERE), 0) == other.get((HERE, THERE), 0) == len(one) == 0


def test_own_connections_are_nested_whichever_worker_they_come_back_to() -> None:
    workers = [OwnConnections(2, "west/web-1", table) for table in two_tables()]
    depth = 0
    for port in range(1, 4):
        opener, met = workers[port % 2], workers[(port + 1) % 2]
        opener.add(Address("10.1.0.5", port), THERE, depth + 1)
        depth = met.depth(Address("10.1.0.5", port), THERE)
        assert depth == port
        assert (met.check_depth(depth, "there") is None) == (port < 3)


def test_a_connection_that_comes_back_before_its_worker_has_entered_it_is_recognised_at_its_first_bytes() -> (
    None
):
    tables = two_tables()
    config, listeners = (
        configured(LOOPS__MAX_NESTING="0"),
        OwnListeners(frozenset({4140}), frozenset({"10.1.0.5"})),
    )
    guard = LoopGuard(config, listeners, Metrics(), WorkerInfo(1, b"a" * 32, tables[0]))
    opener = OwnConnections(0, "west/web-1", tables[1])
    about = ConnectionInfo("outbound", HERE, THERE)
    guard.check_again(about)
    assert about.depth == 0, "an application's"
    opener.add(HERE, THERE, 1)
    with pytest.raises(LoopDetected, match="has come back to it 1 times"):
        guard.check_again(about)
    assert opener.stopped(HERE, THERE) is not None


def test_the_worker_that_opened_a_connection_is_notified_of_its_stop() -> None:
    one, other = (OwnConnections(0, "west/web-1", table) for table in two_tables())
    one.add(HERE, THERE, 1)
    other.add(HERE, ELSEWHERE, 1)
    other.stop(HERE, THERE)
    other.stop(THERE, HERE)  # no connection of this proxy
    loop = one.stopped(HERE, THERE)
    assert loop is not None
    assert (loop.kind, loop.cycle) == ("own_connection", "west/web-1 -> west/web-1")
    assert other.depth(HERE, THERE) == 1, "the mark is not part of the depth"
    assert other.stopped(HERE, ELSEWHERE) is None
    one.remove(HERE, THERE)
    assert other.depth(HERE, THERE) == 0
    one.add(HERE, THERE, 1)
    assert one.stopped(HERE, THERE) is None, "the mark belonged to the connection before"


def test_what_a_dead_worker_has_left_is_forgotten_and_nothing_else() -> None:
    memory = make(2)
    one, other = (SharedConnectionTable(memory, number, b"s" * 32) for number in (1, 2))
    one[HERE, THERE] = 3
    other[HERE, ELSEWHERE] = 1
    wipe(memory, 1)
    os.close(memory)
    assert other.get((HERE, THERE), 0) == 0
    assert one.get((HERE, ELSEWHERE), 0) == 1


@settings(max_examples=30)
@given(st.dictionaries(st.integers(1, 65535), st.integers(1, 300), max_size=300))
def test_siblings_may_forget_a_connection_and_never_mistake_one(opened: dict[int, int]) -> None:
    one, other = two_tables()
    for port, depth in opened.items():
        one[Address("10.1.0.5", port), THERE] = depth
    for port in range(1, 400):
        assert one.get((Address("10.1.0.5", port), THERE), 0) == opened.get(port, 0)
        assert other.get((Address("10.1.0.5", port), THERE), 0) in (
            0,
            min(opened.get(port, 0), 127),
        )


async def test_messages_arrive_whole_whatever_pieces_they_come_in() -> None:
    one, other = trio.testing.memory_stream_pair()
    for message in (b"", b"x", b"y" * 100_000):
        await send(one, message)
    assert [await receive(other) for _ in range(3)] == [b"", b"x", b"y" * 100_000]
    await one.send_all(b"\x00\x00\x00\x05abc")
    await one.aclose()
    with pytest.raises(ProcessGone):
        await receive(other)


async def test_a_length_that_cannot_be_is_not_waited_for() -> None:
    one, other = trio.testing.memory_stream_pair()
    await one.send_all(b"\xff\xff\xff\xff")
    with pytest.raises(ProcessGone, match="4294967295"):
        await receive(other)


def test_a_proxy_of_one_process_does_not_share_its_ports() -> None:
    config = configured(
        OUTBOUND__LISTEN="['127.0.0.1:0']", INBOUND__LISTEN="[]", ADMIN__LISTEN="[]"
    )
    (sock,) = listen(config, Liveness()).outbound
    with sock, socket.socket() as other:
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(sock.getsockname())
