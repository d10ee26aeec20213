"""A whole proxy whose certificate comes from the control plane. Without a certificate it is not ready
and passes nothing, in either direction, and it stops on a signal."""

from __future__ import annotations

import json
import os
import signal
from argparse import Namespace
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from lab.kube_api.server import ApiServer
from proxy.app import App
from proxy.commands import check
from proxy.config.load import load
from proxy.identity.identity import Identity
from proxy.identity.issue import make_root
from proxy.net.address import Address
from proxy.net.dial import Dialer
from proxy.net.tls.handshake import TLSOffer, tls_client
from proxy.telemetry.metrics import Metrics
from tests.kit.apps import HOST, application
from tests.kit.channel import until
from tests.kit.issuing import CONTROL, DOMAIN, WEB, Issuing
from tests.kit.own_identity import port_of
from tests.kit.workloads import workload


async def greet(stream: trio.SocketStream) -> None:
    await stream.send_all(b"220 ready\r\n")
    await trio.sleep_forever()


def settings(issuing: Issuing, port: int, **inbound: Any) -> Path:
    """A configuration file; the application is at `port`."""
    token = issuing.folder / "token"
    token.write_text(issuing.account_token())
    document = {
        "identity": {
            "source": "control",
            "roots": [str(issuing.roots)],
            "control": {
                "address": f"{HOST}:{issuing.port or 1}",
                "identity": str(CONTROL),
                "token": str(token),
                "min_pause": "20ms",
                "max_first_pause": "50ms",
            },
        },
        "inbound": {
            "listen": [f"{HOST}:0"],
            "fixed_destination": f"{HOST}:{port}",
            "opaque_ports": [port],
            "require_identity": True,
            **inbound,
        },
        "outbound": {"listen": []},
        "admin": {"listen": []},
    }
    file = issuing.folder / "isthmus.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with application(greet) as found:
        yield found


async def test_nothing_passes_before_the_first_certificate(
    issuing: Issuing, port: int, nursery: trio.Nursery
) -> None:
    async with issuing.serving():
        tokens = issuing.server.behaviour.tokens
        file = settings(issuing, port)
        accepted = tokens.copy()
        tokens.clear()
        tokens[""] = {}
        app = App(load(file, {}), Metrics())
        nursery.start_soon(app.run)
        await until(lambda: "does not accept the token" in str(app.not_ready()), "a refusal")
        (reason,) = app.not_ready()
        assert reason.startswith("there is no certificate yet: the control plane gives no cert")
        assert app.own.current is not None
        assert not app.own.current.known
        assert b'isthmus_identity_reloads_total{result="error"}' in app.render()
        # The kernel accepts a client, and the proxy does not answer it yet.
        mate = peer(issuing)
        stream = await Dialer().dial(Address(HOST, port_of(app.listeners.inbound)))
        with trio.move_on_after(0.2) as waited:
            await stream.receive_some()
        assert waited.cancelled_caught
        tokens.update(accepted)
        await until(lambda: app.not_ready() == [], "the proxy is ready")
        assert app.identity is not None
        assert app.identity.id == WEB
        tls = await tls_client(
            stream,
            mate.client_context,
            TLSOffer(WEB.sni, (b"isthmus-tcp",)),
            verify=lambda chain: mate.verify_chain(chain, WEB),
            timeout=10.0,
        )
        with trio.fail_after(10):
            assert await tls.receive_some() == b"220 ready\r\n"
        tls.close()
        nursery.cancel_scope.cancel()


def peer(issuing: Issuing) -> Identity:
    """Another workload of the mesh."""
    return workload(issuing.folder, "mate", issuing.root).identity()


async def test_a_signal_ends_a_proxy_that_waits(issuing: Issuing, port: int) -> None:
    app = App(load(settings(issuing, port), {}), Metrics())
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(app.run)
            await until(lambda: "cannot connect" in str(app.not_ready()), "a failed attempt")
            os.kill(os.getpid(), signal.SIGTERM)


async def checked(file: Path, name: str = "certificates") -> list[tuple[str, str]]:
    """Status and finding of each result of one check of `isthmus check`."""
    arguments = Namespace(
        config=file, only=[name], timeout=5.0, probe_port=1, max_peers=1, json=True
    )
    results = await check.examine(arguments)
    assert json.loads(check._as_json(results))["checks"]
    return [(result.status, result.what) for result in results]


async def test_check_gets_a_certificate(issuing: Issuing, port: int) -> None:
    async with issuing.serving():
        root, token, issued = await checked(settings(issuing, port))
        assert (root[0], token[0], issued[0]) == ("ok", "ok", "ok")
        assert "trust root CN=cluster.local root" in root[1]
        assert "is of the service account shop/web, for 6 days" in token[1]
        assert f"issues certificates for {WEB}" in issued[1]


async def test_check_says_why_there_is_no_certificate(issuing: Issuing, port: int) -> None:
    async with issuing.serving():
        file = settings(issuing, port)
        issuing.server.behaviour.tokens.clear()
        issuing.server.behaviour.tokens[""] = {}
        assert (await checked(file))[2] == (
            "failed",
            (
                "the control plane gives no certificate: the API server does not accept the token for"
                " this audience (token)"
            ),
        )
        (issuing.folder / "token").unlink()
        assert [status for status, _ in await checked(file)] == ["ok", "failed"]
        issuing.roots.unlink()
        assert [status for status, _ in await checked(file)] == ["failed", "failed"]


async def test_check_says_that_the_control_plane_is_away(issuing: Issuing, port: int) -> None:
    failed = (await checked(settings(issuing, port)))[2]
    assert failed[0] == "failed"
    assert "the control plane at 127.0.0.1:1: cannot connect to 127.0.0.1:1" in failed[1]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "ok: the control plane has the same time"),
        (130, "warning: the control plane's clock is 2 minutes"),
        (-130, "warning: the control plane's clock is 2 minutes"),
    ],
)
async def test_check_compares_the_clocks(
    tmp_path: Path, nursery: trio.Nursery, port: int, seconds: int, expected: str
) -> None:
    skew = timedelta(seconds=seconds)
    old = make_root(DOMAIN, now=datetime.now(UTC) - timedelta(hours=1))
    folder = tmp_path / "skewed"
    folder.mkdir()
    issuing = Issuing(folder, ApiServer(nursery), old, now=lambda: datetime.now(UTC) + skew)
    async with issuing.serving():
        found = await checked(settings(issuing, port), "clock")
    (result,) = [f"{status}: {what}" for status, what in found if "control plane" in what]
    assert result.startswith(expected)
    if seconds:
        assert result.endswith("ahead" if seconds > 0 else "behind")
