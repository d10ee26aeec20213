"""Addresses that lose their identity with a change of the entries, or with an entry that the proxy
no longer follows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from control.channel.views import service_view
from control.discovery.entries import ServiceEntry
from control.discovery.usable_endpoints import Place
from proxy.config.schema_files import ControlPlaneConfig
from proxy.directory import UNIDENTIFIED, Former
from proxy.directory.channel.connector import Connector
from proxy.directory.channel.messages import Hello, Update, version_of
from proxy.directory.channel.source import ControlSource
from proxy.directory.channel.views import Content, PodView, UnknownView, encode
from proxy.directory.former_identities import FormerIdentities
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from tests.kit.channel import CONTROL, WEB, Workshop, service

VIP, ONE, TWO = "10.96.0.1", "10.1.0.1", "10.1.0.2"
A_VIP, S_WEB, A_ONE = f"a/{VIP}", "s/shop/web", f"a/{ONE}"
KEEP = 600.0
SERVICE = frozenset({"shop/web"})
MESHED = PodView(ONE, str(WEB), (4191,), "", ())
CLEAR = PodView(ONE, "", (), "", (), pod=True)
OUTSIDE = PodView(ONE, "", (), "", ())


async def never(address: Address) -> SocketStream:
    raise AssertionError(f"{address} was dialled")


class Scene:
    """The proxy's end without a connection: the tests give it the contents of entries."""

    def __init__(self, workshop: Workshop, most: int = 100, keep: float = KEEP) -> None:
        self.source = ControlSource(
            ControlPlaneConfig(address="127.0.0.1:1", identity=str(CONTROL)),
            Hello(),
            Connector(workshop.identity(WEB), never, workshop.expiries),
            FormerIdentities(keep, most),
        )

    def use(self, contents: Mapping[str, Content | None]) -> None:
        for key in contents:
            if key not in self.source.subscriptions.entries:
                self.source.release(self.source.use(key))
        self.source._use(dict(contents))

    def receive(self, key: str, content: Content) -> None:
        """The control plane sends this entry."""
        self.source.subscriptions.take()
        data, contents = encode(content), dict[str, Content | None]()
        self.source._apply(Update(key, version_of(data), data), contents)
        self.source._use(contents)

    def forget(self) -> None:
        """All entries have been unused for too long."""
        self.source.subscriptions.connected = True
        self.source.subscriptions.expire(trio.current_time())
        self.source._tidy()

    def clear(self, host: str, port: int = 8080) -> bool:
        """Whether a connection to this address goes out in clear text now."""
        address = Address(host, port)
        endpoints = self.source.current.resolve(address).endpoints
        return any(
            end.identity is None
            and self.source.former.find(end.address, trio.current_time()) is None
            for end in endpoints
        )

    @property
    def losses(self) -> dict[str, int]:
        return {kind: count for kind, count in self.source.former.losses.items() if count}


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@pytest.fixture
async def scene(workshop: Workshop) -> Scene:
    return Scene(workshop)


def view(
    *pods: str,
    clear: tuple[str, ...] = (),
    outside: tuple[str, ...] = (),
    skip: frozenset[int] | None = None,
) -> Content:
    """The service, whose pods have identities, except those in `clear`. Those in `outside` are no
    pods."""
    entry: ServiceEntry = service("web", VIP, pods)
    endpoints = tuple(
        replace(
            end,
            identity=None if end.address in clear else end.identity,
            skip_ports=skip if skip is not None else end.skip_ports,
            outside=end.address in outside,
        )
        for end in entry.endpoints
    )
    return service_view(replace(entry, endpoints=endpoints), Place())


@pytest.mark.parametrize("key", [A_VIP, S_WEB])
async def test_an_entry_that_is_no_longer_followed_is_remembered(
    scene: Scene, key: str, autojump_clock: trio.testing.MockClock
) -> None:
    scene.use({key: view(ONE)})
    scene.forget()
    assert scene.source.subscriptions.entries == {}
    assert scene.source.former.find(Address(VIP, 80), trio.current_time()) == Former(
        str(WEB), SERVICE
    )
    scene.use({A_VIP: None, A_ONE: None})
    assert not scene.clear(VIP, 80)
    assert not scene.clear(ONE)
    assert scene.clear(VIP, 81)
    assert scene.losses == {}, "it is not known that something was lost"
    await trio.sleep(KEEP)
    assert scene.clear(VIP, 80)
    assert scene.clear(ONE)


async def test_an_entry_that_is_followed_again_is_released(scene: Scene) -> None:
    scene.use({A_VIP: view(ONE)})
    scene.forget()
    assert len(scene.source.former) == 2
    scene.use({A_VIP: view(ONE)})
    assert len(scene.source.former) == 0
    scene.forget()
    scene.use({A_ONE: CLEAR})
    assert scene.clear(ONE), "another pod has the address now"


async def test_only_a_pod_releases_an_address_without_a_sidecar(scene: Scene) -> None:
    """An endpoint without a pod at the address of a deleted pod is what any slice may list."""
    scene.use({A_VIP: view(ONE, TWO)})
    scene.use({A_VIP: view(TWO)})
    scene.use({"a/10.96.0.2": view(ONE, clear=(ONE,), outside=(ONE,))})
    assert not scene.clear(VIP, 80)
    assert not scene.clear(ONE)
    scene.use({A_ONE: OUTSIDE})
    assert not scene.clear(ONE)
    scene.use({"a/10.96.0.2": view(ONE, clear=(ONE,))})
    assert scene.clear(ONE), "another pod has the address now"


async def test_an_address_whose_identity_is_unknown_leads_nowhere(scene: Scene) -> None:
    """Not even where the control plane has no networks: it is an answer, and no silence."""
    unknown = UnknownView(pending=False)
    strange = "203.0.113.7"
    scene.use({A_ONE: unknown, f"a/{strange}": unknown})
    for host in (ONE, strange):
        assert scene.source.current.find_address(Address(host, 443)) is UNIDENTIFIED
        assert not scene.clear(host, 443)
        with trio.fail_after(1):
            await scene.source.learn(Address(host, 443))
    scene.use({A_ONE: MESHED, f"a/{strange}": None})
    assert scene.source.current.resolve(Address(ONE, 443)).endpoints[0].identity == WEB
    assert scene.clear(strange, 443)
    scene.use({A_ONE: unknown})
    assert not scene.clear(ONE, 443)
    scene.forget()
    requested = scene.source.current.requested
    assert requested is not None
    assert not requested.unidentified


async def test_a_connection_to_a_new_pod_waits_until_its_identity_is_known(
    scene: Scene, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    scene.source.subscriptions.connected = True
    with scene.source.holding(Address(ONE, 80)):
        scene.receive(A_ONE, UnknownView(pending=True))
        began = trio.current_time()

        async def appear() -> None:
            await trio.sleep(1)
            scene.receive(A_ONE, MESHED)

        nursery.start_soon(appear)
        await scene.source.learn(Address(ONE, 80))
        assert trio.current_time() == began + 1
        assert scene.source.current.resolve(Address(ONE, 80)).endpoints[0].identity == WEB
        assert scene.source.unanswered == 0
        scene.receive(A_ONE, UnknownView(pending=True))
        await scene.source.learn(Address(ONE, 80))
        assert trio.current_time() == began + 4, "first_use_timeout"
        assert scene.source.current.find_address(Address(ONE, 80)) is UNIDENTIFIED
        assert scene.source.unanswered == 1


async def test_an_endpoint_that_loses_its_identity_gets_no_clear_text(
    scene: Scene, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    scene.use({A_VIP: view(ONE, TWO)})
    with caplog.at_level(logging.WARNING, "isthmus.directory"):
        scene.use({A_VIP: view(ONE, TWO, clear=(ONE,))})
    (message,) = caplog.messages
    assert message == (
        f"addresses have lost their identity in the directory: {ONE} had {WEB}; the proxy sends no"
        " clear text to them for 600 s"
    )
    assert scene.losses == {"identity": 1}
    assert not scene.clear(VIP, 80)
    scene.use({A_ONE: CLEAR})
    assert not scene.clear(ONE)
    await trio.sleep(KEEP)
    assert scene.clear(VIP, 80)
    assert scene.clear(ONE)


async def test_a_pod_that_loses_its_identity_gets_none_either_until_it_has_one(
    scene: Scene,
) -> None:
    scene.use({A_ONE: MESHED})
    scene.use({A_ONE: CLEAR})
    assert scene.losses == {"identity": 1}
    assert not scene.clear(ONE)
    scene.use({A_VIP: view(ONE)})
    assert len(scene.source.former) == 0


async def test_a_port_that_loses_the_identity_gets_no_clear_text(scene: Scene) -> None:
    scene.use({A_VIP: view(ONE)})
    scene.use({A_VIP: view(ONE, skip=frozenset({4191, 8080}))})
    assert not scene.clear(VIP, 80)
    assert scene.clear(ONE, 4191)
    assert scene.losses == {"identity": 1}


async def test_an_endpoint_that_leaves_is_remembered_when_no_entry_has_it_any_more(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.use({A_VIP: view(ONE, TWO), S_WEB: view(ONE, TWO)})
    scene.use({A_VIP: view(TWO)})
    assert len(scene.source.former) == 0
    scene.use({S_WEB: view(TWO)})
    assert scene.losses == {"endpoint": 1}
    assert not scene.clear(ONE)
    assert not caplog.messages, "pods leave every minute"
    scene.use({A_ONE: CLEAR})
    assert scene.clear(ONE), "another pod has the address now"


async def test_a_service_that_leaves_is_reported_once(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.use({A_VIP: view(ONE), S_WEB: view(ONE)})
    with caplog.at_level(logging.WARNING, "isthmus.directory"):
        scene.use({A_VIP: None})
        assert not caplog.messages
        scene.use({S_WEB: None})
    (message,) = caplog.messages
    assert message == (
        "services with identities have left the directory, or some of their addresses or ports"
        " have: shop/web; the proxy sends no clear text to them for 600 s"
    )
    assert scene.losses == {"service": 1, "endpoint": 1}


async def test_a_service_without_endpoints_that_leaves_had_an_identity(scene: Scene) -> None:
    scene.use({A_VIP: view(ONE)})
    scene.use({A_VIP: view()})
    assert scene.losses == {"endpoint": 1}
    scene.use({A_VIP: None})
    assert not scene.clear(VIP, 80)
    assert scene.losses == {"endpoint": 1, "service": 1}


async def test_without_room_to_remember_entries_stay_as_they_are(
    workshop: Workshop, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(workshop, most=2)
    scene.use({A_VIP: view(ONE)})
    scene.forget()
    assert len(scene.source.former) == 2
    scene.use({S_WEB: view(TWO)})
    scene.forget()
    scene.use({S_WEB: None})
    assert set(scene.source.subscriptions.entries) == {S_WEB}
    named = scene.source.current.find_service("web.shop", "shop")
    assert named is not None
    assert {end.address.host for end in named.targets[80].endpoints} == {TWO}
    assert len(scene.source.former) == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"], "said once"
    assert "directory.max_remembered" in caplog.text
    await trio.sleep(KEEP)
    scene.use({})
    assert scene.source.current.find_service("web.shop", "shop") is None
    assert scene.losses == {"service": 1, "endpoint": 1}
    assert not scene.clear(TWO)


async def test_what_is_lost_is_counted_even_if_nothing_is_remembered(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(workshop, keep=0.0)
    scene.use({A_VIP: view(ONE)})
    with caplog.at_level(logging.WARNING, "isthmus.directory"):
        scene.use({A_VIP: view(ONE, clear=(ONE,))})
    assert scene.losses == {"identity": 1}
    assert "connections to them go out in clear text (directory.remember)" in caplog.text
    assert scene.clear(VIP, 80)
