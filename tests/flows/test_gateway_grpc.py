"""gRPC calls that fail, from grpcio through three proxies (a sidecar, the gateway of another
cluster, a sidecar) to a server whose frames are all known.

An error of the server on a stream reaches the client as its code. A failure of the server is a
status of the proxy that detected it. docs/decisions/29-interrupted-grpc-calls.md has the
reasons."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import h2.events
import pytest
import trio

from proxy.net.address import Address
from tests.kit.apps import HOST, outbound_port
from tests.kit.clusters import Clusters, clusters
from tests.kit.http import Peer
from tests.kit.http2_peers import OK, Peer2, frames_goaway, speaking

HTTP2 = [{"port": 80, "protocol": "http2"}, {"port": 5432, "protocol": "opaque"}]
HEAD = [*OK, (b"content-type", b"application/grpc")]
MESSAGE = b"\0\0\0\0\5first"
End = Callable[[Peer2, int], Awaitable[None]]


def server(end: End, *, begun: bool) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """A server that sends a head and a message if the call is to have `begun`, and then does
    `end`."""

    async def script(peer: Peer2) -> None:
        number = (await peer.next(h2.events.StreamEnded)).stream_id
        assert number is not None
        if begun:
            peer.h2.send_headers(number, HEAD)
            await peer.send(number, MESSAGE)
        await end(peer, number)

    async def serve(stream: trio.SocketStream) -> None:
        await speaking(script)(Peer(stream.socket))

    return serve


def call(address: Address, on_message: Callable[[], None]) -> tuple[int, str, str, dict[str, str]]:
    """How many messages arrived, then the code, the details, and the metadata at the end."""
    options = [("grpc.default_authority", "c.east"), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(str(address), options) as channel:
        messages = channel.unary_stream("/t.T/t")(b"", timeout=30)
        count = 0
        try:
            for message in messages:
                assert message == b"first"
                count += 1
                trio.from_thread.run_sync(on_message)
        except grpc.RpcError as error:
            return count, error.code().name, error.details(), dict(error.trailing_metadata() or ())
        return count, "OK", "", {}


async def calling(
    all_: Clusters, on_message: Callable[[], None]
) -> tuple[int, str, str, dict[str, str]]:
    return await trio.to_thread.run_sync(call, Address(HOST, outbound_port(all_.west)), on_message)


async def ended(folder: Path, end: End, *, begun: bool) -> tuple[int, str, str, dict[str, str]]:
    async with clusters(folder, server(end, begun=begun), ports=HTTP2) as all_:
        result = await calling(all_, lambda: None)
        for app in (all_.west, all_.gateway, all_.server):
            assert b'reason="internal"' not in app.render()
    return result


def resetting(code: int) -> End:
    async def end(peer: Peer2, number: int) -> None:
        await peer.reset(number, code)

    return end


# As grpcio reads them (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md, "Errors").
CODES = {
    2: "INTERNAL",
    7: "UNAVAILABLE",
    8: "CANCELLED",
    11: "RESOURCE_EXHAUSTED",
    12: "PERMISSION_DENIED",
}


@pytest.mark.parametrize("begun", [False, True], ids=["before the head", "behind the head"])
@pytest.mark.parametrize(("code", "status"), CODES.items(), ids=CODES.values())
async def test_a_reset_of_the_server_reaches_the_client_with_its_code(
    tmp_path: Path, code: int, status: str, begun: bool
) -> None:
    _, found, details, _ = await ended(tmp_path, resetting(code), begun=begun)
    assert found == status
    assert f"RST_STREAM with error code {code}" in details


async def cut(peer: Peer2, _: int) -> None:
    peer.peer.reset()


async def goes_away(peer: Peer2, _: int) -> None:
    await peer.peer.send(frames_goaway(0))


async def breaks_the_protocol(peer: Peer2, _: int) -> None:
    await peer.peer.send(b"\0\0\1\6\0\0\0\0\0x")  # a PING of one byte: the end of the connection


ENDS = {"cut": (cut, "connection_terminated"), "GOAWAY": (goes_away, "connection_terminated"),
        "a fault of the connection": (breaks_the_protocol, "connection_terminated")}  # fmt: skip


@pytest.mark.parametrize(("end", "kind"), ENDS.values(), ids=ENDS)
async def test_a_server_that_goes_away_in_the_middle_of_a_call_is_unavailable(
    tmp_path: Path, end: End, kind: str
) -> None:
    count, found, details, _ = await ended(tmp_path, end, begun=True)
    assert (count, found) == (1, "UNAVAILABLE")
    assert details.startswith(kind), details


async def test_a_server_that_goes_away_before_it_responds_is_unavailable_and_proxy_status_names_the_proxy(
    tmp_path: Path,
) -> None:
    count, found, details, metadata = await ended(tmp_path, cut, begun=False)
    assert (count, found) == (0, "UNAVAILABLE")
    assert details.startswith("connection_terminated")
    assert metadata["proxy-status"].startswith("server.default.inbound;error=connection_terminated")


@pytest.mark.parametrize("who", ["gateway", "server"])
async def test_a_proxy_on_the_path_that_goes_away_is_unavailable_too(
    tmp_path: Path, who: str
) -> None:
    """As after the grace period of its shutdown."""
    begun = trio.Event()

    async def end(_: Peer2, __: int) -> None:
        await trio.sleep_forever()

    async with (
        clusters(tmp_path, server(end, begun=True), ports=HTTP2) as all_,
        trio.open_nursery() as nursery,
    ):

        async def cut_off() -> None:
            await begun.wait()
            (all_.gateway if who == "gateway" else all_.server).inbound.drain(grace=0)

        nursery.start_soon(cut_off)
        count, found, details, _ = await calling(all_, begun.set)
    assert (count, found) == (1, "UNAVAILABLE")
    assert details.startswith("connection_terminated"), details
