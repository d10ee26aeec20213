"""The gateway, between whole proxies: west's sidecar -> east's gateway -> the sidecar of `c` in
east -> an application.

It serves only identities that are on its list, names that are exported, and endpoints of its own
cluster. The application gets the caller's identity, whatever any header contains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, inbound_port
from tests.kit.clusters import Clusters, ask, clusters
from tests.kit.http import Message, connect, until
from tests.kit.http2_peers import Peer2


async def echo(stream: trio.SocketStream) -> None:
    """A server that sends first, and then echoes everything."""
    await stream.send_all(b"220 ready\r\n")
    async for piece in stream:
        await stream.send_all(piece)
    await stream.send_eof()


async def ask_over(stream: trio.SSLStream[trio.SocketStream]) -> bytes:
    await stream.send_all(b"GET / HTTP/1.1\r\nHost: c.default\r\n\r\n")
    return bytes(await stream.receive_some())


def field_values(message: Message, name: str) -> list[str]:
    """The values of a field in the head that the application got."""
    lines = [line.partition(": ") for line in message.body.decode("latin-1").split("\r\n")]
    return [value for field, _, value in lines if field.lower() == name]


async def test_a_request_by_name_gets_to_the_other_cluster_under_its_name_there(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path) as all_:
        answer = await all_.ask("c.east")
    assert answer.status == 200
    assert answer.body.startswith(b"GET /path?x=1 HTTP/1.1")
    assert field_values(answer, "host") == ["c.default.svc.cluster.local"]


@pytest.mark.parametrize(
    "name", ["isthmus-client-id", "Isthmus_Client_Id", "Isthmus.Client+Id", "l5d-client-id"]
)
async def test_the_application_gets_the_caller_s_identity_and_no_header_can_change_it(
    tmp_path: Path, name: str
) -> None:
    async with clusters(tmp_path) as all_:
        answer = await all_.ask("c.east", f"{name}: spiffe://cluster.local/ns/default/sa/king")
        assert field_values(answer, "isthmus-client-id") == [all_.fleet.identity("west")]
    assert b"king" not in answer.body


async def test_a_peer_of_the_gateway_cannot_claim_another_identity(tmp_path: Path) -> None:
    async with (
        clusters(tmp_path) as all_,
        await all_.fleet.meet(all_.gateway, "mallory", "gateway") as stream,
    ):
        await stream.send_all(
            b"GET / HTTP/1.1\r\nHost: c.default\r\nIsthmus-Client-Id:"
            b" spiffe://cluster.local/ns/default/sa/king\r\n\r\n"
        )
        answer = bytes(await stream.receive_some())
    assert b"king" not in answer
    assert b"isthmus-client-id: spiffe://cluster.local/ns/default/sa/mallory" in answer


async def test_a_peer_that_is_not_a_trusted_gateway_is_the_caller_itself(tmp_path: Path) -> None:
    async with clusters(tmp_path, trusted=False) as all_:
        async with await all_.fleet.meet(all_.server, "mallory", "server") as stream:
            await stream.send_all(
                b"GET / HTTP/1.1\r\nHost: c\r\nIsthmus-Client-Id:"
                b" spiffe://cluster.local/ns/default/sa/king\r\n\r\n"
            )
            direct = bytes(await stream.receive_some())
        by_gateway = await all_.ask("c.east")
    assert b"king" not in direct
    assert b"isthmus-client-id: spiffe://cluster.local/ns/default/sa/mallory" in direct
    assert field_values(by_gateway, "isthmus-client-id") == [Fleet.identity("gateway")]


async def test_the_hop_is_appended_to_forwarded(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        answer = await all_.ask(
            "c.east",
            'Forwarded: for="[2001:db8::1]:80"',
            'Forwarded: for="open',
            "Forwarded: by=_x;BY=_y",
        )
        assert (
            b'isthmus_forwarded_dropped_total{reason="malformed"} 1.0' in all_.gateway.render()
        ), "requests are counted, not lines"
    assert field_values(answer, "forwarded") == [
        'for="[2001:db8::1]:80"',
        "by=_local.gateway.default.sa.cluster.local;for=_west.default.sa.cluster.local;host=c.default.svc.cluster.local;proto=https",
    ]


@pytest.mark.parametrize("host", ["hidden.east", "missing.east"])
async def test_what_is_not_exported_is_not_found_whether_it_exists_or_not(
    tmp_path: Path, host: str
) -> None:
    async with clusters(tmp_path) as all_:
        answer = await all_.ask(host)
        assert (
            b'isthmus_errors_total{direction="gateway",reason="not_exported"} 1.0'
            in all_.gateway.render()
        )
    assert answer.status == 404
    assert b"gateway.default.gateway;error=destination_not_found" in (
        answer.get(b"proxy-status") or b""
    )


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        f"{HOST}:80",
        "c.default.north",
        "c-north.default",
        "c",
        "c.default:81",
        "localhost:4191",
    ],
)
async def test_a_gateway_is_not_an_open_proxy(tmp_path: Path, host: str) -> None:
    async with (
        clusters(tmp_path) as all_,
        await all_.fleet.meet(all_.gateway, "west", "gateway") as stream,
    ):
        await stream.send_all(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 404 ")
        await stream.send_all(f"GET http://{host}/ HTTP/1.1\r\nHost: c.default\r\n\r\n".encode())
        assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 404 ")
        await stream.send_all(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert bytes(await stream.receive_some())[:12] in (b"HTTP/1.1 404", b"HTTP/1.1 400")


async def test_clients_without_tls_are_refused_and_http_gets_the_reason(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        answer = await ask(await connect(Address(HOST, inbound_port(all_.gateway))), "c.default")
        assert answer.status == 403
        assert answer.get(b"proxy-status") == b"isthmus;error=http_request_denied"
        async with await trio.open_tcp_stream(HOST, inbound_port(all_.gateway)) as raw:
            await raw.send_all(b"\x00\x01\x02\x03")
            with pytest.raises((trio.BrokenResourceError, AssertionError)):
                assert await raw.receive_some()


async def test_an_identity_that_is_not_on_the_list_is_refused_and_gets_no_names(
    tmp_path: Path,
) -> None:
    allow = {"allow": [Fleet.identity("somebody")]}
    async with clusters(tmp_path, gateway=allow) as all_:
        for host in ("c.east", "hidden.east", "missing.east"):
            answer = await all_.ask(host)
            assert answer.status == 403
            assert b"error=http_request_denied" in (answer.get(b"proxy-status") or b"")


async def test_a_certificate_of_another_root_does_not_get_past_the_handshake(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path) as all_:
        stranger = Fleet(tmp_path / "strange")
        stranger.folder.mkdir()
        # In TLS 1.3 the client's handshake is done before the server has verified it: the refusal
        # comes instead of a response.
        stream = await stranger.meet(all_.gateway, "west", "gateway", roots=all_.fleet)
        with pytest.raises(trio.BrokenResourceError):
            await ask_over(stream)
        await trio.aclose_forcefully(stream)


async def test_a_gateway_does_not_split_nor_fail_over_what_it_has_received(tmp_path: Path) -> None:
    """Both clusters may share their requests with each other: the sender chooses."""
    split = [{"service": "c", "weight": 0}, {"service": "c", "cluster": "north", "weight": 100}]
    async with clusters(
        tmp_path, split=split, failover={"clusters": ["north"], "below": 100}
    ) as all_:
        statuses = {(await all_.ask("c.east")).status for _ in range(20)}
    assert statuses == {200}


async def test_a_service_without_endpoints_there_fails_at_once_and_the_error_names_the_cluster(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path, endpoints=[]) as all_:
        answer = await all_.ask("c.east")
    assert answer.status == 503
    assert b"gateway.default.gateway;error=destination_unavailable" in (
        answer.get(b"proxy-status") or b""
    )


async def test_opaque_bytes_go_through_a_tunnel_whichever_side_sends_first(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path, echo, to="192.0.2.7:5432") as all_:
        peer = await all_.client()
        assert await peer.until(b"\r\n") == b"220 ready\r\n"
        blob = bytes(range(256)) * 4096
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.send, blob)
            assert await peer.exactly(len(blob)) == blob
        await peer.stream.send_eof()
        assert await peer.rest() == b""
        peer.close()


async def test_a_tunnel_that_is_refused_closes_the_connection_and_the_metrics_have_the_reason(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path, echo, to="192.0.2.7:5432", export=False) as all_:
        peer = await all_.client()
        with pytest.raises((trio.BrokenResourceError, AssertionError)):
            await peer.exactly(1)
        peer.close()
        await until(
            lambda: (
                b'isthmus_errors_total{direction="outbound",reason="tunnel_refused"} 1.0'
                in all_.west.render()
            ),
            20,
        )


async def test_an_open_tunnel_closes_the_circuit_breaker_of_its_endpoint(tmp_path: Path) -> None:
    async with clusters(tmp_path, echo, to="192.0.2.7:5432") as all_:
        runtime = all_.gateway.runtime
        target = runtime.directory.current.exported(b"c.default.svc.cluster.local:5432")
        assert target is not None
        fleet = runtime.balancer.endpoint_set(target.service or "")
        work = fleet.begin(target.policy, target.endpoints[0], alone=True)
        for _ in range(target.policy.breaker.failures):
            work.record_failure("test")
        work.end()
        assert fleet.broken
        peer = await all_.client()
        assert await peer.until(b"\r\n") == b"220 ready\r\n", "it waited, and is the trial request"
        assert not fleet.broken, "although the tunnel stays open"
        await peer.stream.send_eof()
        assert await peer.rest() == b""
        peer.close()


async def test_two_clients_at_once_over_http_2(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        peer = Peer2(await all_.client(), client=True)
        await peer.start()
        pseudo = [
            (b":method", b"GET"),
            (b":scheme", b"http"),
            (b":authority", b"c.east"),
            (b":path", b"/two"),
        ]
        streams = [await peer.request(pseudo, end=True) for _ in range(2)]
        answers = [await peer.message(stream) for stream in streams]
        peer.peer.close()
    assert [answer.status for answer in answers] == [200, 200]
    assert all(
        b"isthmus-client-id: spiffe://cluster.local/ns/default/sa/west" in answer.body
        for answer in answers
    )


async def test_a_gateway_answers_probes_of_peers_with_an_identity(tmp_path: Path) -> None:
    async with (
        clusters(tmp_path) as all_,
        await all_.fleet.meet(all_.gateway, "west", "gateway") as stream,
    ):
        await stream.send_all(b"GET /.well-known/isthmus/live HTTP/1.1\r\nHost: gateway\r\n\r\n")
        assert bytes(await stream.receive_some()).startswith(b"HTTP/1.1 200 ")


async def test_the_logs_of_the_three_proxies_name_the_identities_of_all_hops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "isthmus.access")
    async with clusters(tmp_path) as all_:
        for app in (all_.west, all_.gateway, all_.server):
            app.recorder.access = True
        await all_.ask("c.east")
        lines = [
            record.__dict__["line"] for record in caplog.records if record.name == "isthmus.access"
        ]
    west, gateway, server = (all_.fleet.identity(name) for name in ("west", "gateway", "server"))
    seen = {
        line.direction: (line.identity, line.caller, line.upstream_identity, line.authority)
        for line in lines
    }
    name = b"c.default.svc.cluster.local"
    assert seen == {
        "outbound": ("", "", gateway, b"c.east"),
        "gateway": (west, "", server, name),
        "inbound": (gateway, west, "", name),
    }


async def test_connect_of_an_application_to_a_proxy_elsewhere_gets_the_remedy(
    tmp_path: Path,
) -> None:
    async with clusters(tmp_path, to="192.0.2.7:80") as all_:
        peer = await all_.client()
        await peer.send(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
        assert (await peer.head()).startswith(b"HTTP/1.1 501 ")
        peer.close()


# Loops that only Forwarded shows...

BY = "_local.gateway.default.sa.cluster.local"
HERE = f"Forwarded: by={BY};host=c.default;proto=https"


async def straight(all_: Clusters, *fields: str) -> bytes:
    """What the gateway answers to west, which may send anything."""
    async with await all_.fleet.meet(all_.gateway, "west", "gateway") as stream:
        await stream.send_all(
            "\r\n".join(["GET / HTTP/1.1", "Host: c.default", *fields, "", ""]).encode("latin-1")
        )
        return bytes(await stream.receive_some())


@pytest.mark.parametrize(
    "fields",
    [
        [HERE] * 5,
        [f"{HERE}, for=_x ,{HERE.partition(': ')[2]}", *[HERE] * 3],
        [f'forwarded: Host="C.default" ; BY="{BY.upper()}"'] * 5,
        [*[HERE] * 5, "isthmus-hops: oAAAAAAAAAAAAAAAA:east/c"],
    ],
    ids=["lines", "commas", "quotes-and-case", "other-tokens"],
)
async def test_a_gateway_that_occurs_in_forwarded_too_often_refuses(
    tmp_path: Path, fields: list[str]
) -> None:
    async with clusters(tmp_path) as all_:
        answer = await straight(all_, *fields)
        assert b'isthmus_loops_total{kind="forwarded"} 1.0' in all_.gateway.render()
    assert answer.startswith(b"HTTP/1.1 508 ")
    assert b"error=proxy_loop_detected" in answer
    assert (
        b"Forwarded has this gateway 5 times already for the same host: local/gateway -> " in answer
    )


@pytest.mark.parametrize(
    "fields",
    [
        [HERE] * 4,
        [HERE.replace("c.default", "d.default")] * 30,
        [HERE.replace("_local.", "_west.")] * 30,
        [HERE.replace("_local.", "_")] * 30,
        [HERE.replace("by=", "for=")] * 30,
        [f'Forwarded: for="a, by={BY};host=c.default"'] * 30,
        [f'{HERE};x="open'] * 30,
    ],
    ids=[
        "as-often-as-allowed",
        "another-host",
        "another-cluster",
        "no-cluster",
        "for",
        "within-quotes",
        "broken",
    ],
)
async def test_similar_requests_are_not_refused(tmp_path: Path, fields: list[str]) -> None:
    async with clusters(tmp_path) as all_:
        assert (await straight(all_, *fields)).startswith(b"HTTP/1.1 200 ")


async def test_a_field_that_is_too_long_to_read_is_dropped(tmp_path: Path) -> None:
    async with clusters(tmp_path) as all_:
        line = "Forwarded: " + ",".join([f"by={BY};host=c.default"] * 200)
        answer = await straight(all_, *[line] * 4)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"by=") == 1, "it was dropped unread"
        assert b'isthmus_forwarded_dropped_total{reason="oversized"} 1.0' in all_.gateway.render()
        assert (await straight(all_)).startswith(b"HTTP/1.1 200 ")


@dataclass
class Callback:
    """An application in east that answers a request by sending it again to the gateway, with its
    Forwarded, and if `kept` also with its tokens, for so many `rounds`. `seen` counts its
    requests."""

    fleet: Fleet | None = None
    gateway: App | None = None
    kept: bool = False
    rounds: int = 1000
    seen: int = 0

    async def __call__(self, stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += await stream.receive_some()
        self.seen += 1
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        if self.seen <= self.rounds:
            assert self.fleet is not None
            assert self.gateway is not None
            lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")[1:]
            names = (b"forwarded:", b"isthmus-hops:") if self.kept else (b"forwarded:",)
            passed = [line for line in lines if line.lower().startswith(names)]
            async with await self.fleet.meet(self.gateway, "server", "gateway") as onward:
                again = [
                    b"GET / HTTP/1.1",
                    b"Host: c.default.svc.cluster.local",
                    *passed,
                    b"Connection: close",
                    b"",
                    b"",
                ]
                await onward.send_all(b"\r\n".join(again))
                answer = b"".join([bytes(piece) async for piece in onward])
        await stream.send_all(answer)


@pytest.mark.parametrize(("kept", "kind", "seen"), [(False, "forwarded", 5), (True, "request", 1)])
async def test_a_loop_is_cut_by_forwarded_where_the_tokens_are_lost_and_by_the_tokens_before_where_they_are_kept(
    tmp_path: Path, kept: bool, kind: str, seen: int
) -> None:
    app = Callback(kept=kept)
    async with clusters(tmp_path, app) as all_:
        app.fleet, app.gateway = all_.fleet, all_.gateway
        answer = await all_.ask("c.east", target="/")
        assert b'isthmus_loops_total{kind="%b"} 1.0' % kind.encode() in all_.gateway.render()
    assert answer.status == 508
    assert app.seen == seen


async def test_an_application_that_calls_back_with_forwarded_copied_is_not_refused(
    tmp_path: Path,
) -> None:
    app = Callback(rounds=4)
    async with clusters(tmp_path, app) as all_:
        app.fleet, app.gateway = all_.fleet, all_.gateway
        assert (await all_.ask("c.east", target="/")).status == 200
        assert b"isthmus_loops_total{" not in all_.gateway.render()
    assert app.seen == 5
