"""What a sidecar reports about its application to the proxy before it, between whole proxies:
west's sidecar -> two endpoints' sidecars.

The rules: where a verified sidecar could not connect to its application, the endpoint counts as one
that refuses connections, and another one gets the request, whatever its method. Where the
application has closed, it counts as a server that closes. No application, and no peer without a
verified identity, can make these reports, and clients do not see them."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import h2.events
import pytest
import trio

from proxy.app import App
from proxy.net.address import Address
from tests.kit.apps import HOST, Application, Fleet, application, inbound_port, outbound_port
from tests.kit.clusters import LISTEN, east_directory, west_directory
from tests.kit.http import GET, Message, Peer, connect, until
from tests.kit.http2_peers import OK, POST, Answer, Peer2, reserve, speaking

SERVICE = "192.0.2.7"
FIELD = b"isthmus-failure"
BOTH_PATHS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "ordinary"])


def post(body: bytes, chunked: bool = False) -> bytes:
    if chunked:
        return (
            b"POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding:"
            b" chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )
    return b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Server:
    """An HTTP/1 application. `answer` gives the response; None: it closes without one."""

    answer: Callable[[Message], bytes | None]
    received: list[Message] = field(default_factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        peer = Peer(stream.socket)
        while True:
            try:
                request = await peer.request()
            except Exception:
                return
            self.received.append(request)
            said = self.answer(request)
            if said is None:
                return
            await peer.send(said)


def well(message: Message) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(message.body), message.body)


@dataclass
class Shop:
    """`west`, which calls the service, and the sidecars of its endpoints."""

    west: App
    sidecars: list[App]
    gone: list[socket.socket]  # where applications do not listen
    clients: list[Peer] = field(default_factory=list)

    async def client(self) -> Peer:
        self.clients.append(await connect(Address(HOST, outbound_port(self.west))))
        return self.clients[-1]

    def count(self, name: str) -> float:
        """The sum of a metric's series; `name` is the start of their lines."""
        found = re.findall(
            rf"^isthmus_{name}.* ([0-9.e+]+)$", self.west.render().decode(), re.MULTILINE
        )
        return sum(map(float, found))

    @property
    def opened(self) -> float:
        return self.count(r'breaker_changes_total{state="open"')


@asynccontextmanager
async def shop(
    folder: Path,
    *applications: Application | None,
    fast: bool = True,
    protocol: str = "http1",
    policy: dict[str, Any] | None = None,
) -> AsyncIterator[Shop]:
    """A service of such applications; None: there is none at that endpoint, only its sidecar."""
    fleet, ports, gone = Fleet(folder), [], []
    async with AsyncExitStack() as stack:
        sidecars = []
        for number, serve in enumerate(applications):
            if serve is None:
                taken, address = reserve()
                stack.enter_context(taken)
                gone.append(taken)
                port = address.port
            else:
                port = await stack.enter_async_context(application(serve))
            # An address of its own, as a pod has.
            inbound = {"listen": [f"127.0.1.{number + 1}:0"], "fixed_destination": f"{HOST}:{port}"}
            sidecars.append(
                await stack.enter_async_context(
                    fleet.running(f"server{number}", inbound=inbound, fast_path=fast)
                )
            )
            ports.append(inbound_port(sidecars[-1]))
        endpoints = [
            {
                "address": f"127.0.1.{number + 1}",
                "identity": fleet.identity(f"server{number}"),
                "ports": {"80": port},
            }
            for number, port in enumerate(ports)
        ]
        service: dict[str, Any] = {
            "name": "shop",
            "addresses": [SERVICE],
            "ports": [{"port": 80, "protocol": protocol}],
            "endpoints": endpoints,
        }
        if policy is not None:
            service["policy"] = policy
        outbound = {**LISTEN, "fixed_destination": f"{SERVICE}:80"}
        west = await stack.enter_async_context(
            fleet.running("west", {"services": [service]}, outbound=outbound, fast_path=fast)
        )
        world = Shop(west, sidecars, gone)
        try:
            yield world
        finally:
            for client in world.clients:
                client.close()


async def ask(world: Shop, data: bytes = GET) -> Message:
    return await (await world.client()).ask(data, data.split()[0].decode())


@BOTH_PATHS
@pytest.mark.parametrize("body", [b"", b"x" * 40000], ids=["short", "long"])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
async def test_an_endpoint_whose_application_is_away_counts_as_one_that_cannot_be_connected_to(
    tmp_path: Path, fast: bool, body: bytes, chunked: bool
) -> None:
    server = Server(well)
    async with shop(
        tmp_path,
        None,
        server.serve,
        fast=fast,
        policy={"breaker": {"min_penalty": "1m", "connect_penalty": "1m"}},
    ) as world:
        client = await world.client()
        for number in range(20):
            answer = await client.ask(post(b"%d" % number + body, chunked), "POST")
            assert (answer.status, answer.body) == (200, b"%d" % number + body)
            assert answer.get(FIELD) is None
        assert [message.body for message in server.received] == [
            b"%d" % number + body for number in range(20)
        ], "each of them once"
        assert world.opened == 1, "the endpoint has failed once, and its circuit is open"


@BOTH_PATHS
async def test_a_body_that_is_too_long_to_be_kept_is_not_sent_again(
    tmp_path: Path, fast: bool
) -> None:
    server = Server(well)
    async with shop(
        tmp_path,
        None,
        server.serve,
        fast=fast,
        policy={"breaker": {"min_penalty": "1m", "connect_penalty": "1m"}},
    ) as world:
        seen = [(await ask(world, post(bytes(300_000)))).status for _ in range(20)]
        assert set(seen) <= {200, 502}
        assert seen.count(502) <= 1
        assert len(server.received) == seen.count(200)


def speaking2(
    respond: Callable[[Answer], list[tuple[bytes, bytes]]], received: list[bytes]
) -> Application:
    """An HTTP/2 application that answers each request with a head and its own body."""

    async def script(peer: Peer2) -> None:
        while True:
            number = (await peer.next(h2.events.StreamEnded)).stream_id
            assert number is not None
            message = peer.messages[number]
            received.append(message.body)
            peer.h2.send_headers(number, respond(message))
            await peer.send(number, message.body, end=True)

    async def serve(stream: trio.SocketStream) -> None:
        await speaking(script)(Peer(stream.socket))

    return serve


@BOTH_PATHS
@pytest.mark.parametrize("client", ["http1", "http2"])
async def test_streams_of_http2_go_to_another_endpoint_too(
    tmp_path: Path, fast: bool, client: str
) -> None:
    received: list[bytes] = []
    alive = speaking2(lambda _: OK, received)
    policy = {"breaker": {"min_penalty": "1m", "connect_penalty": "1m"}}
    async with shop(tmp_path, None, alive, fast=fast, protocol="http2", policy=policy) as world:
        peer2 = Peer2(await world.client(), client=True)
        if client == "http2":
            await peer2.start()
        for number in range(20):
            if client == "http2":
                answer = await peer2.ask(POST, b"%d" % number)
                assert (answer.status, answer.body, answer.get(FIELD)) == (
                    200,
                    b"%d" % number,
                    None,
                )
            else:
                assert (await ask(world, post(b"%d" % number))).body == b"%d" % number
        assert received == [b"%d" % number for number in range(20)]
        assert world.opened == 1


@BOTH_PATHS
async def test_a_call_of_grpc_goes_to_another_endpoint_and_is_unavailable_where_none_is_left(
    tmp_path: Path, fast: bool
) -> None:
    def call(address: Address) -> str:
        with grpc.insecure_channel(str(address), [("grpc.enable_retries", 0)]) as channel:
            try:
                channel.unary_unary("/t.T/t")(b"hello", timeout=30)
            except grpc.RpcError as error:
                return (
                    f"{error.code().name} {error.details()} {dict(error.trailing_metadata() or ())}"
                )
        return "OK"

    async def script(peer: Peer2) -> None:
        while True:
            number = (await peer.next(h2.events.StreamEnded)).stream_id
            assert number is not None
            peer.h2.send_headers(number, [*OK, (b"content-type", b"application/grpc")])
            await peer.send(number, peer.messages[number].body)
            await peer.trailers(number, [(b"grpc-status", b"0")])

    async def serve(stream: trio.SocketStream) -> None:
        await speaking(script)(Peer(stream.socket))

    async with shop(tmp_path, None, serve, fast=fast, protocol="http2") as world:
        address = Address(HOST, outbound_port(world.west))
        assert [await trio.to_thread.run_sync(call, address) for _ in range(10)] == ["OK"] * 10
    async with shop(
        tmp_path, None, None, fast=fast, protocol="http2", policy={"queue": {"timeout": "0s"}}
    ) as world:
        said = await trio.to_thread.run_sync(call, Address(HOST, outbound_port(world.west)))
        assert said.startswith("UNAVAILABLE connection_refused: ")
        assert FIELD.decode() not in said


@BOTH_PATHS
async def test_without_another_endpoint_the_client_gets_the_error_of_the_sidecar(
    tmp_path: Path, fast: bool
) -> None:
    async with shop(tmp_path, None, fast=fast, policy={"queue": {"timeout": "0s"}}) as world:
        for data in (GET, post(b"hello")):
            answer = await ask(world, data)
            assert answer.status in (502, 503)
            assert answer.get(FIELD) is None
            if answer.status == 502:
                said = answer.get(b"proxy-status") or b""
                assert said.startswith(b"server0.default.inbound;error=connection_refused;"), (
                    "the proxy that detected it comes first"
                )
                assert b", west.default.outbound;error=connection_refused;" in said


@BOTH_PATHS
async def test_a_request_waits_for_the_only_endpoint_while_its_application_restarts(
    tmp_path: Path, fast: bool
) -> None:
    server = Server(well)
    async with shop(tmp_path, None, fast=fast) as world, trio.open_nursery() as asking:
        statuses: list[int] = []

        async def one(data: bytes) -> None:
            statuses.append((await ask(world, data)).status)

        for number in range(40):
            asking.start_soon(one, post(b"%d" % number) if number % 2 else GET)
            await trio.sleep(0.01)
        assert not statuses, "the first one waits like the others"
        async with listening(world.gone[0], server.serve):
            await until(lambda: len(statuses) == 40)
        assert statuses == [200] * 40
        assert len(server.received) == 40


@BOTH_PATHS
async def test_an_application_cannot_claim_that_it_was_not_reached(
    tmp_path: Path, fast: bool
) -> None:
    lie = (
        b"HTTP/1.1 502 Bad Gateway\r\nIsthmus-Failure: connect_refused\r\nContent-Length:"
        b" 2\r\n\r\nno"
    )
    liar, honest = Server(lambda _: lie), Server(well)
    async with shop(tmp_path, liar.serve, honest.serve, fast=fast) as world:
        for number in range(20):
            answer = await ask(world, post(b"%d" % number))
            assert answer.status in (200, 502)
            assert answer.get(FIELD) is None
        assert len(liar.received) + len(honest.received) == 20, "each was sent once"
        assert liar.received
        assert world.opened <= 1, "as it would be by its statuses"


@BOTH_PATHS
async def test_an_application_of_http2_cannot_claim_it_either(tmp_path: Path, fast: bool) -> None:
    received: list[bytes] = []
    liar = speaking2(lambda _: [(b":status", b"503"), (FIELD, b"connect_refused")], received)
    async with shop(
        tmp_path, liar, liar, fast=fast, protocol="http2", policy={"breaker": {"failures": 0}}
    ) as world:
        client = Peer2(await world.client(), client=True)
        await client.start()
        for number in range(10):
            answer = await client.ask(POST, b"%d" % number)
            assert (answer.status, answer.get(FIELD)) == (503, None)
        assert received == [b"%d" % number for number in range(10)]
        assert not world.opened


@BOTH_PATHS
async def test_a_claim_of_a_peer_without_an_identity_is_ignored_and_not_forwarded(
    tmp_path: Path, fast: bool
) -> None:
    lie = (
        b"HTTP/1.1 502 Bad Gateway\r\nIsthmus-Failure: connect_refused\r\nContent-Length:"
        b" 2\r\n\r\nno"
    )
    liar, fleet = Server(lambda _: lie), Fleet(tmp_path)
    async with application(liar.serve) as port:
        endpoints = [{"address": HOST, "ports": {"80": port}}]
        service = {
            "name": "shop",
            "addresses": [SERVICE],
            "ports": [{"port": 80, "protocol": "http1"}],
            "endpoints": endpoints,
        }
        outbound = {**LISTEN, "fixed_destination": f"{SERVICE}:80"}
        async with fleet.running(
            "west", {"services": [service]}, outbound=outbound, fast_path=fast
        ) as west:
            client = await connect(Address(HOST, outbound_port(west)))
            for number in range(3):
                answer = await client.ask(post(b"%d" % number), "POST")
                assert (answer.status, answer.body, answer.get(FIELD)) == (502, b"no", None)
            assert len(liar.received) == 3
            client.close()


@BOTH_PATHS
async def test_a_client_without_an_identity_is_not_shown_the_field(
    tmp_path: Path, fast: bool
) -> None:
    async with shop(tmp_path, None, fast=fast) as world:
        client = await connect(Address("127.0.1.1", inbound_port(world.sidecars[0])))
        answer = await client.ask(GET)
        assert (answer.status, answer.get(FIELD)) == (502, None)
        client.close()


@BOTH_PATHS
async def test_an_application_that_closes_without_a_response_is_retried_like_a_plain_server(
    tmp_path: Path, fast: bool
) -> None:
    closing, one, two = Server(lambda _: None), Server(well), Server(well)
    async with shop(tmp_path, closing.serve, one.serve, two.serve, fast=fast) as world:
        client = await world.client()
        assert [(await client.ask()).status for _ in range(100)] == [200] * 100
        assert closing.received
        client.close()
        posts = [(await ask(world, post(b"hello"))).status for _ in range(30)]
        assert set(posts) <= {200, 502}, "what is not idempotent is not retried"


async def banner(stream: trio.SocketStream) -> None:
    """An application that sends first, and then echoes everything."""
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(b"220 ready\r\n")
        async for piece in stream:
            await stream.send_all(piece)


@BOTH_PATHS
async def test_an_opaque_connection_goes_to_another_endpoint_before_a_byte_of_it_is_sent(
    tmp_path: Path, fast: bool
) -> None:
    policy = {"breaker": {"min_penalty": "1m", "connect_penalty": "1m"}}
    async with shop(tmp_path, None, banner, fast=fast, protocol="opaque", policy=policy) as world:
        for _ in range(20):
            client = await world.client()
            await client.send(b"hello")
            assert await client.until(b"hello") == b"220 ready\r\nhello"
        assert world.opened == 1


@BOTH_PATHS
async def test_an_opaque_connection_waits_for_the_only_endpoint_while_its_application_restarts(
    tmp_path: Path, fast: bool
) -> None:
    async with shop(tmp_path, None, fast=fast, protocol="opaque") as world:
        clients = [await world.client() for _ in range(10)]
        for client in clients:
            await client.send(b"hello")
        await until(lambda: world.count("queue_waiting") >= 9)
        async with listening(world.gone[0], banner):
            for client in clients:
                assert await client.until(b"hello") == b"220 ready\r\nhello"


@pytest.mark.parametrize("alpn", ["isthmus-tcp", "isthmus-tcp-confirmed"])
async def test_a_peer_that_supports_it_gets_the_news_that_the_application_is_connected(
    tmp_path: Path, alpn: str
) -> None:
    fleet = Fleet(tmp_path)
    async with (
        application(banner) as port,
        fleet.running(
            "server", inbound={**LISTEN, "fixed_destination": f"{HOST}:{port}"}
        ) as server,
    ):
        stream = await fleet.meet(server, "west", "server", alpn=alpn)
        said = b""
        while not said.endswith(b"\n"):
            said += await stream.receive_some()
        await stream.aclose()
    assert said == ((b"" if alpn == "isthmus-tcp" else b"\0") + b"220 ready\r\n")


async def test_a_peer_without_the_confirmation_is_connected_to_all_the_same(tmp_path: Path) -> None:
    """A sidecar of an earlier version: it knows only the older name."""
    fleet = Fleet(tmp_path)
    old = fleet.material("server")
    context = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cadata=fleet.root.certificate_pem.decode()
    )
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(old["certificate"], old["key"])
    context.set_alpn_protocols(["isthmus-tcp"])

    async def serve(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True)
        with contextlib.suppress(trio.BrokenResourceError):
            await tls.send_all(b"220 ready\r\n")
            await tls.receive_some()

    async with application(serve) as port:
        endpoints = [{"address": HOST, "identity": fleet.identity("server"), "ports": {"80": port}}]
        service = {
            "name": "shop",
            "addresses": [SERVICE],
            "ports": [{"port": 80, "protocol": "opaque"}],
            "endpoints": endpoints,
        }
        outbound = {**LISTEN, "fixed_destination": f"{SERVICE}:80"}
        async with fleet.running("west", {"services": [service]}, outbound=outbound) as west:
            client = await connect(Address(HOST, outbound_port(west)))
            assert await client.until(b"\n") == b"220 ready\r\n"
            client.close()


async def refusing(stream: trio.SocketStream) -> None:
    """An application that refuses uploads by their head, reads them to their end, and keeps its
    connections."""
    peer = Peer(stream.socket)
    with contextlib.suppress(
        AssertionError, trio.BrokenResourceError
    ):  # the sidecar has ended the connection
        while True:
            head = await peer.head()
            upload, length = (
                b"/upload" in head,
                int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]),
            )
            if upload:
                await peer.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig")
            await peer.exactly(length)
            if not upload:
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@BOTH_PATHS
async def test_uploads_that_are_refused_early_fail_no_request_of_another_client(
    tmp_path: Path, fast: bool
) -> None:
    statuses: list[int] = []
    async with shop(tmp_path, refusing, fast=fast) as world, trio.open_nursery() as nursery:

        async def uploads() -> None:
            for size in (100_000, 200_000, 400_000, 1_000_000) * 3:
                answer = await ask(
                    world,
                    b"POST /upload HTTP/1.1\r\nHost: shop\r\nContent-Length: %d\r\n\r\n" % size
                    + bytes(size),
                )
                assert (answer.status, answer.body) == (413, b"big")

        async def posts() -> None:
            client = await world.client()
            statuses.extend([(await client.ask(post(b"hello"), "POST")).status for _ in range(40)])

        nursery.start_soon(uploads)
        for _ in range(5):
            nursery.start_soon(posts)
    assert statuses == [200] * 200


def two_gateways(fleet: Fleet, first: App, second: App) -> dict[str, Any]:
    """West's directory, with east's two gateways."""
    document = west_directory(inbound_port(first))
    gateways = [
        {"address": HOST, "port": inbound_port(app), "identity": fleet.identity(name)}
        for name, app in (("gateway", first), ("second", second))
    ]
    document["clusters"][0]["gateways"] = gateways
    return document


@BOTH_PATHS
@pytest.mark.parametrize("cut", ["application", "sidecar"])
async def test_a_gateway_that_could_not_connect_is_followed_by_another_one(
    tmp_path: Path, fast: bool, cut: str
) -> None:
    """One of east's gateways has an endpoint whose application, or whose sidecar, is away."""
    server, fleet = Server(well), Fleet(tmp_path)
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        taken, address = reserve()
        stack.enter_context(taken)
        port = await enter(application(server.serve))
        trust = {"trusted_gateways": [fleet.identity("gateway"), fleet.identity("second")]}
        well_off = await enter(
            fleet.running(
                "server",
                inbound={**LISTEN, "fixed_destination": f"{HOST}:{port}", **trust},
                fast_path=fast,
            )
        )
        alone = await enter(
            fleet.running(
                "server",
                inbound={**LISTEN, "fixed_destination": f"{HOST}:{address.port}", **trust},
                fast_path=fast,
            )
        )
        settings = {**LISTEN, "enabled": True}
        patience = {"policy": {"queue": {"timeout": "0s"}}}
        way = inbound_port(alone) if cut == "application" else address.port
        first = await enter(
            fleet.running(
                "gateway", east_directory(way, **patience), gateway=settings, fast_path=fast
            )
        )
        second = await enter(
            fleet.running(
                "second", east_directory(inbound_port(well_off)), gateway=settings, fast_path=fast
            )
        )
        outbound = {**LISTEN, "fixed_destination": f"{SERVICE}:80"}  # of `db`, which is east's `c`
        quick = {"probe_interval": "0s"}
        west = await enter(
            fleet.running(
                "west",
                two_gateways(fleet, first, second),
                outbound=outbound,
                clusters=quick,
                fast_path=fast,
            )
        )
        client = await connect(Address(HOST, outbound_port(west)))
        for number in range(10):
            answer = await client.ask(post(b"%d" % number), "POST")
            assert (answer.status, answer.body, answer.get(FIELD)) == (200, b"%d" % number, None)
        assert len(server.received) == 10
        assert (
            b'isthmus_errors_total{direction="gateway",reason="connect_refused"}' in first.render()
        ), "it got the request"
        client.close()


@asynccontextmanager
async def listening(taken: socket.socket, serve: Application) -> AsyncIterator[None]:
    """An application on a socket that is bound already."""
    taken.setblocking(False)
    taken.listen(256)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(taken))
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [listener])
        yield
        nursery.cancel_scope.cancel()
