"""A whole proxy whose identity comes from a SPIFFE Workload API, and what `isthmus check` says of the
API."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trio
import yaml

from proxy.app import App
from proxy.commands import check
from proxy.config.load import load
from proxy.telemetry.metrics import Metrics
from tests.kit.channel import until
from tests.kit.workload_api import DOMAIN, WEB, WorkloadApi, svid, svids

DENIED = grpc.StatusCode.PERMISSION_DENIED, "no identity issued"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[WorkloadApi]:
    agent = WorkloadApi(tmp_path)
    yield agent
    agent.stop()


def settings(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A configuration file, and the environment that names the API."""
    pauses = {"min_pause": "20ms", "max_pause": "50ms"}
    document = {
        "trust_domain": DOMAIN,
        "identity": {"source": "spiffe", "spiffe": pauses},
        "inbound": {"listen": []},
        "outbound": {"listen": []},
        "admin": {"listen": []},
    }
    file = tmp_path / "isthmus.yaml"
    file.write_text(yaml.safe_dump(document))
    return file, {"SPIFFE_ENDPOINT_SOCKET": f"unix://{tmp_path}/agent.sock"}


async def test_the_proxy_is_ready_when_the_agent_has_an_identity(
    agent: WorkloadApi, tmp_path: Path, nursery: trio.Nursery
) -> None:
    agent.answer(DENIED)
    agent.start()
    app = App(load(*settings(tmp_path)), Metrics())
    nursery.start_soon(app.run)
    await until(lambda: "has no identity for this process" in str(app.not_ready()), "a refusal")
    (reason,) = app.not_ready()
    assert reason.startswith("there is no certificate yet: the Workload API at /")
    agent.answer(svids(svid(agent.root)))
    await until(lambda: app.not_ready() == [], "the proxy is ready")
    assert app.identity is not None
    assert app.identity.id == WEB
    assert b'isthmus_identity_reloads_total{result="ok"}' in app.render()
    nursery.cancel_scope.cancel()


async def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Status, finding and remedy of each result of `isthmus check --only certificates`."""
    file, environ = settings(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    arguments = Namespace(
        config=file, only=["certificates"], timeout=5.0, probe_port=1, max_peers=1, json=True
    )
    results = await check.examine(arguments)
    return [(result.status, result.what, result.remedy) for result in results]


async def test_check_names_the_identity_and_its_roots(
    agent: WorkloadApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.start()
    certificate, root = await checked(tmp_path, monkeypatch)
    assert certificate[0] == "ok"
    words = f"the Workload API at {agent.path} has the identity {WEB}: the certificate ends in "
    assert certificate[1].startswith(words)
    assert root[:1] == ("ok",)
    assert root[1].startswith("trust root CN=cluster.local root ")


async def test_check_says_why_there_is_no_identity(
    agent: WorkloadApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((status, what, remedy),) = await checked(tmp_path, monkeypatch)
    assert status == "failed"
    assert what == f"the Workload API at {agent.path} cannot be used: No such file or directory"
    assert "look at the log of the agent" in remedy
    agent.answer(DENIED)
    agent.start()
    ((status, what, _),) = await checked(tmp_path, monkeypatch)
    assert status == "failed"
    assert "has no identity for this process (PermissionDenied: no identity issued)" in what
    agent.answer(svids())
    ((status, what, _),) = await checked(tmp_path, monkeypatch)
    assert (status, what.partition(" sent ")[2]) == (
        "failed",
        "an unusable message: it has no SVID",
    )
