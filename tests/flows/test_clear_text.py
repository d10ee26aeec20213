"""No clear text to an address that had an identity, whatever the directory says now, or no longer
says.

A whole sidecar on loopback, and a listener that records the first bytes of each connection: a TLS
record, or leaked clear text. Requests, by the fast path and by the ordinary one, and opaque
connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from proxy.app import App
from proxy.errors import UpstreamTLSError
from proxy.net.address import Address
from tests.kit.apps import HOST, Fleet, application, outbound_port
from tests.kit.clusters import LISTEN
from tests.kit.http import connect, until

HANDSHAKE = b"\x16"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SECRET = b"GET / HTTP/1.1\r\nHost: shop\r\nX-Secret: tangerine\r\n\r\n"
POD = "127.0.0.7"  # where the listener is; nothing listens at the other addresses
HOW = pytest.mark.parametrize("how", ["fast", "ordinary", "opaque"])


@dataclass
class Scene:
    """`to`: the address that the application dials. The redirection sets it, so each scene has
    one."""

    fleet: Fleet
    app: App
    received: list[bytes]
    port: int  # of the listener
    how: str
    extra: dict[str, Any] = field(default_factory=dict)

    async def ask(self) -> tuple[int | None, bytes]:
        """The result of a request, or of an opaque connection with the same bytes: its status
        (None: closed without a response), and its Proxy-Status."""
        peer = await connect(Address(HOST, outbound_port(self.app)))
        await peer.send(SECRET)
        if self.how == "opaque":
            answer = b""
            with suppress(trio.BrokenResourceError):
                answer = await peer.rest()
            peer.close()
            return (200 if answer == OK else None), b""
        message = await peer.response()
        peer.close()
        return message.status, message.get(b"proxy-status") or b""

    async def say(self, *services: dict[str, Any], **top: Any) -> str:
        """Publish this directory. Returns the result of its load."""
        before = {result: self.reloads(result) for result in ("ok", "refused", "error")}
        self.fleet.direct({"services": list(services), **top}, "web")
        await until(lambda: any(self.reloads(result) > count for result, count in before.items()))
        return next(result for result, count in before.items() if self.reloads(result) > count)

    async def ask_until(self, done: Callable[[int | None], bool]) -> None:
        """Repeat the request until it gets this response: after refused TLS, the circuit breaker is
        open for about a second."""
        with trio.fail_after(30):
            while not done((await self.ask())[0]):  # noqa: ASYNC110  (it is asked, which is no event)
                await trio.sleep(0.05)

    def refusals(self) -> float:
        labels = {"direction": "outbound", "reason": "clear_text_refused"}
        return self.app.metrics.registry.get_sample_value("isthmus_errors_total", labels) or 0.0

    def reloads(self, result: str) -> float:
        return (
            self.app.metrics.registry.get_sample_value(
                "isthmus_directory_reloads_total", {"result": result}
            )
            or 0.0
        )


def shop(port: int, identity: bool = True, name: str = "shop", host: str = POD) -> dict[str, Any]:
    endpoint = {
        "address": host,
        "ports": {"80": port},
        **({"identity": Fleet.identity("shop")} if identity else {}),
    }
    at_once = {
        "queue": {"timeout": 0}
    }  # the listener completes no handshake, so a request to it fails; the wait can be short
    service = {
        "name": name,
        "addresses": [f"10.96.0.{len(name)}"],
        "ports": [{"port": 80}],
        "endpoints": [endpoint],
    }
    return {**service, "policy": at_once}


def others(port: int) -> list[dict[str, Any]]:
    """Two more services with identities, so that `shop` may leave."""
    return [
        shop(port, name=name, host=f"127.0.0.{last}")
        for name, last in (("one", 21), ("seven77", 22))
    ]


@asynccontextmanager
async def scene(
    folder: Path, how: str, to: str, *, identity: bool = True, **watching: Any
) -> AsyncIterator[Scene]:
    """The application's connections go to `to`: "pod" or "service". All services have identities at
    first."""
    received: list[bytes] = []

    async def listener(stream: trio.SocketStream) -> None:
        data = await stream.receive_some()
        while data:
            received.append(bytes(data))
            if data[:1] == HANDSHAKE:
                return
            await stream.send_all(OK)
            if how == "opaque":
                return
            data = await stream.receive_some()

    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(application(listener, POD))
        fleet = Fleet(folder, watching=watching)
        destination = f"{POD}:{port}" if to == "pod" else "10.96.0.4:80"
        outbound = {
            **LISTEN,
            "fixed_destination": destination,
            "opaque_ports": [port, 80] if how == "opaque" else [],
        }
        settings = {
            "fast_path": how != "ordinary",
            "pool": {"idle_timeout": "1m"},
            "http": {"idle_timeout": "2m"},
            "outbound": outbound,
        }
        document = {"services": [shop(port, identity), *others(port)]}
        app = await stack.enter_async_context(fleet.running("web", document, **settings))
        yield Scene(fleet, app, received, port, how)


@HOW
@pytest.mark.parametrize("to", ["pod", "service"])
async def test_an_address_that_has_left_the_directory_gets_no_clear_text(
    tmp_path: Path, to: str, how: str
) -> None:
    async with scene(tmp_path, how, to) as made:
        await made.ask()
        assert {data[:1] for data in made.received} == {HANDSHAKE}
        made.received.clear()
        assert await made.say(*others(made.port)) == "ok"
        for _ in range(2):
            status, words = await made.ask()
            assert status == (None if how == "opaque" else 502)
            assert how == "opaque" or b"error=destination_ip_prohibited" in words
        assert made.received == []
        assert made.refusals() == 2
        made.app.observe()
        value = made.app.metrics.registry.get_sample_value
        assert value("isthmus_former_identities") == 2  # the pod, and the cluster address
        for kind, count in (("service", 1), ("endpoint", 1), ("identity", 0)):
            assert value("isthmus_directory_identity_losses_total", {"kind": kind}) == count


@HOW
async def test_an_address_that_comes_back_without_an_identity_gets_none_either(
    tmp_path: Path, how: str
) -> None:
    async with scene(tmp_path, how, "service") as made:
        await made.ask()
        assert await made.say(*others(made.port)) == "ok"
        made.received.clear()
        assert await made.say(shop(made.port, identity=False), *others(made.port)) == "ok"
        await made.ask_until(lambda _: made.refusals() > 0)
        assert made.received == []


@HOW
@pytest.mark.parametrize("left", ["nothing", "no identity"])
async def test_a_directory_that_would_allow_clear_text_is_refused_and_the_old_one_stays(
    tmp_path: Path, left: str, how: str
) -> None:
    async with scene(tmp_path, how, "service") as made:
        services = (
            [] if left == "nothing" else [shop(made.port, identity=False), *others(made.port)]
        )
        assert await made.say(*services) == "refused"
        for _ in range(2):
            await made.ask()
        assert made.received
        assert {data[:1] for data in made.received} == {HANDSHAKE}


@HOW
async def test_a_change_that_the_file_allows_moves_to_clear_text_at_once(
    tmp_path: Path, how: str
) -> None:
    async with scene(tmp_path, how, "service") as made:
        await made.ask()
        made.received.clear()
        assert (
            await made.say(
                shop(made.port, identity=False),
                *others(made.port),
                allow_identity_loss=["default/shop"],
            )
            == "ok"
        )
        await made.ask_until(lambda status: status == 200)
        assert made.received == [SECRET] or made.received[0].startswith(b"GET / HTTP/1.1\r\n")


@HOW
@pytest.mark.parametrize("remember", ["300ms", "0s"])
async def test_after_the_time_that_is_set_an_unknown_address_is_itself_again(
    tmp_path: Path, remember: str, how: str
) -> None:
    async with scene(tmp_path, how, "pod", remember=remember) as made:
        assert await made.say(*others(made.port)) == "ok"
        await made.ask_until(lambda status: status == 200)
        assert made.received[-1].startswith(b"GET / HTTP/1.1\r\n")


@pytest.mark.parametrize("how", ["fast", "ordinary"])
async def test_a_connection_that_was_kept_from_before_the_identity_is_not_used_again(
    tmp_path: Path, how: str
) -> None:
    async with scene(tmp_path, how, "pod", identity=False) as made:
        assert (await made.ask())[0] == 200
        assert made.app.outbound_pools.counts() == (0, 1)
        assert await made.say(shop(made.port), *others(made.port)) == "ok"
        assert await made.say(*others(made.port)) == "ok"
        made.received.clear()
        assert (await made.ask())[0] == 502
        assert made.received == []


@pytest.mark.parametrize("own", [False, True])
async def test_the_pod_itself_is_reached_by_its_own_address(tmp_path: Path, own: bool) -> None:
    """Its own sidecar learns that it has left, as during the shutdown of the pod. This traffic does
    not leave the pod."""
    fleet, gone = Fleet(tmp_path), shop(80, name="gone", host="10.1.0.1")
    pod = {"addresses": ["10.1.0.1" if own else "10.1.0.2"]}
    async with fleet.running("web", {"services": [gone, *others(80)]}, pod=pod) as app:
        made = Scene(fleet, app, [], 80, "fast")
        assert await made.say(*others(80)) == "ok"
        assert app.runtime.clear_text_allowed(Address("10.1.0.1", 80)) is own
        if not own:
            with pytest.raises(
                UpstreamTLSError,
                match=r"10\.1\.0\.1:80 had the identity .* for default/gone and has none",
            ):
                app.runtime.check_clear_text(Address("10.1.0.1", 80))


async def test_a_gateway_lets_nothing_out_either(tmp_path: Path) -> None:
    received: list[bytes] = []

    async def listener(stream: trio.SocketStream) -> None:
        received.append(bytes(await stream.receive_some()))

    fleet = Fleet(tmp_path)
    async with application(listener, POD) as port:
        exported = {**shop(port), "export": True}
        document = {"services": [exported, *others(port)]}
        async with fleet.running("gateway", document, gateway={**LISTEN, "enabled": True}) as gate:
            made = Scene(fleet, gate, received, port, "fast")
            gate_directory = {
                "services": [{**shop(port, identity=False), "export": True}, *others(port)]
            }
            fleet.direct({"services": others(port)}, "gateway")
            await until(lambda: made.reloads("ok") == 1)
            fleet.direct(gate_directory, "gateway")
            await until(lambda: made.reloads("ok") == 2)
            stream = await fleet.meet(gate, "west", "gateway")
            await stream.send_all(
                b"GET / HTTP/1.1\r\nHost: shop.default.svc.cluster.local\r\nX-Secret:"
                b" tangerine\r\n\r\n"
            )
            answer = await stream.receive_some()
            await trio.aclose_forcefully(stream)
            assert answer.startswith(b"HTTP/1.1 502")
            assert b"error=destination_ip_prohibited" in answer
            assert received == []
