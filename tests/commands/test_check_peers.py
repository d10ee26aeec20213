"""`isthmus check`: the endpoints of the directory and the gateways of other clusters are tried. The
verdict depends on the identity that they prove."""

import json
import os
from pathlib import Path
from typing import Any

import trio

from proxy import directory
from proxy.commands.check_peers import check_peers
from proxy.identity import issue
from proxy.identity.issue import Issued
from proxy.net.address import Address
from proxy.net.socket_stream import SocketStream
from tests.commands.probed import configuration, meshed, ordinary_user, serving, snapshot, statuses
from tests.kit.ports import free_port
from tests.kit.workloads import DOMAIN, Workload, spiffe, workload


async def test_a_meshed_peer_is_proven_without_a_byte_for_its_application(
    tmp_path: Path, cart: Workload, root: Issued
) -> None:
    seen: list[Any] = []
    checkout = workload(tmp_path, "checkout", root)
    async with serving(meshed(checkout, seen)) as address:
        config = configuration(tmp_path)
        (result,) = await check_peers(
            config, cart.identity(), snapshot((address, checkout.id)), 10, 5
        )
    assert result.status == "ok", result
    assert "mutual TLS, TLSv1.3, X25519MLKEM768" in result.what
    assert seen == [(str(cart.id), b"")]


async def test_a_peer_of_another_name_is_a_failure_that_names_both(
    tmp_path: Path, cart: Workload, root: Issued
) -> None:
    checkout = workload(tmp_path, "checkout", root)
    async with serving(meshed(checkout, [])) as address:
        (result,) = await check_peers(
            configuration(tmp_path), cart.identity(), snapshot((address, spiffe("other"))), 10, 5
        )
    assert result.status == "failed"
    assert str(spiffe("checkout")) in result.what
    assert str(spiffe("other")) in result.what


async def test_a_peer_that_refuses_our_certificate_is_a_failure(
    tmp_path: Path, cart: Workload, root: Issued
) -> None:
    """It trusts itself but not us, although we trust it. Only the alert after the handshake shows
    that."""
    other = issue.make_root(DOMAIN)
    stranger = workload(tmp_path, "checkout", other)
    cart.write_roots(other, root)
    async with serving(meshed(stranger, [])) as address:
        (result,) = await check_peers(
            configuration(tmp_path), cart.identity(), snapshot((address, stranger.id)), 10, 5
        )
    assert result.status == "failed", result
    assert "refuse" in result.what
    assert "our trust root among its roots" in result.remedy


async def test_a_peer_that_we_do_not_trust_or_that_speaks_no_tls_is_a_failure(
    tmp_path: Path, cart: Workload
) -> None:
    stranger = workload(tmp_path, "checkout", issue.make_root(DOMAIN))

    async def plain(stream: SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(meshed(stranger, [])) as first, serving(plain) as second:
        known = snapshot((first, stranger.id), (Address("127.0.0.1", second.port), stranger.id))
        results = await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)
    assert statuses(results) == ["failed", "failed"]
    assert "not signed by a trust root" in results[0].what
    assert "does not speak" in results[1].what or "not TLS" in results[1].what


async def test_unmeshed_peers_need_a_connection_only(tmp_path: Path, cart: Workload) -> None:
    async def silent(stream: SocketStream) -> None:
        await stream.receive_some(1)

    async with serving(silent) as address:
        known = snapshot((address, None), (Address("127.0.0.1", free_port()), None))
        up, down = await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)
    assert up.status == "ok"
    assert down.status == "failed"
    assert "cannot connect" in down.what


async def test_who_cannot_become_the_proxys_user_is_warned_that_peers_may_not_be_peers(
    tmp_path: Path, cart: Workload
) -> None:
    async def silent(stream: SocketStream) -> None:
        await stream.receive_some(1)

    config, identity = (
        configuration(tmp_path, mark=None, intercept={"uid": os.geteuid() + 2}),
        cart.identity(),
    )
    async with serving(silent) as address:
        with ordinary_user():
            results = await check_peers(config, identity, snapshot((address, None)), 10, 5)
    assert statuses(results) == ["ok", "warning"]
    assert "own proxy may have answered" in results[1].what


async def test_a_silent_peer_is_given_up_at_the_deadline(
    tmp_path: Path, cart: Workload, root: Issued
) -> None:
    async def silent(stream: SocketStream) -> None:
        await trio.sleep_forever()

    async with serving(silent) as address:
        (result,) = await check_peers(
            configuration(tmp_path),
            cart.identity(),
            snapshot((address, spiffe("checkout"))),
            10,
            0.2,
        )
    assert result.status == "failed"


async def test_our_own_endpoint_is_left_out_and_the_number_is_bounded(
    tmp_path: Path, cart: Workload
) -> None:
    known = snapshot(*[(Address("127.0.0.1", 40000 + number), None) for number in range(5)])
    results = await check_peers(configuration(tmp_path), cart.identity(), known, 2, 5)
    assert statuses(results) == ["failed", "failed", "skipped"]
    assert "3 more endpoints" in results[-1].what
    results = await check_peers(
        configuration(tmp_path),
        cart.identity(),
        snapshot((Address("127.0.0.1", 80), cart.id)),
        2,
        5,
    )
    assert statuses(results) == ["skipped"]


async def test_endpoints_that_are_not_ready_are_not_tried(tmp_path: Path, cart: Workload) -> None:
    service = {
        "name": "s",
        "ports": [{"port": 80}],
        "endpoints": [{"address": "127.0.0.1", "ready": False}],
    }
    known = directory.parse(json.dumps({"services": [service]}), "directory.yaml")
    assert statuses(await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)) == [
        "skipped"
    ]


async def test_without_an_identity_meshed_peers_are_not_tried(tmp_path: Path) -> None:
    async def silent(stream: SocketStream) -> None:
        await stream.receive_some(1)

    async with serving(silent) as address:
        (result,) = await check_peers(
            configuration(tmp_path), None, snapshot((address, spiffe("checkout"))), 10, 5
        )
    assert result.status == "skipped"


async def test_gateways_of_other_clusters_are_tried_like_endpoints(
    tmp_path: Path, cart: Workload
) -> None:
    port, identity = free_port(), str(spiffe("gateway"))
    ways = [
        {"address": "127.0.0.1", "port": port, "identity": identity},
        {"host": "a.invalid", "identity": identity},
    ]
    known = directory.parse(
        json.dumps({"services": [], "clusters": [{"name": "east", "gateways": ways}]}),
        "directory.yaml",
    )
    (result,) = await check_peers(configuration(tmp_path), cart.identity(), known, 10, 5)
    assert result.status == "failed"
    assert f"127.0.0.1:{port}" in result.what
