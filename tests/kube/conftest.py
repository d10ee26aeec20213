"""A real API server: the one of KUBECONFIG; without that these tests are skipped. Each test has a namespace of its own, which is deleted
afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from control.kube.access import kubeconfig_file
from control.kube.client import Client
from control.kube.objects import Meta
from tests.kube.stage import NAMESPACES, Namespace, RealStage


@pytest.fixture
def clock() -> None:
    """The machine's."""


@pytest.fixture
async def stage() -> AsyncIterator[RealStage]:
    config = os.environ.get("KUBECONFIG", "")
    if not config:
        pytest.skip("KUBECONFIG does not say which API server")
    client = Client(kubeconfig_file(Path(config)))
    name = f"rules-{secrets.token_hex(4)}"
    made = await client.create(NAMESPACES, Namespace(metadata=Meta(name=name)))
    stage = RealStage(client, name)
    await stage.account_is_there()
    yield stage
    with trio.move_on_after(30, shield=True):
        await client.delete(NAMESPACES, made)
        await client.aclose()
